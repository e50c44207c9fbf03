"""All theorems in one run: the report, its files, and whether anything that should hold does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bvpo_stats.lab.theorems.alpha import batch_scaling, proposition1, theorem2
from bvpo_stats.lab.theorems.bias import drift, marginal_gradient, reference_point
from bvpo_stats.lab.theorems.config import TheoremConfig
from bvpo_stats.lab.theorems.convergence import theorem3, theorem4
from bvpo_stats.lab.theorems.ground import Ground
from bvpo_stats.lab.theorems.log_probabilities import appendix_b
from bvpo_stats.lab.theorems.report import TheoremsReport, TopicReport
from bvpo_stats.lab.theorems.variance import theorem1
from bvpo_stats.progress import progress
from bvpo_stats.store.run_folder import open_run

TOPICS: tuple[Callable[[Ground], TopicReport], ...] = (
    theorem1,
    theorem2,
    proposition1,
    batch_scaling,
    theorem3,
    theorem4,
    reference_point,
    drift,
    marginal_gradient,
    appendix_b,
)
"""In the order of the paper; what the paper leaves out stands after what it bears on."""


def check_theorems(config: TheoremConfig | None = None) -> TheoremsReport:
    """Makes every check, without writing anything.

    Args:
        config: The settings; the default takes about half a minute on one core.
    """
    ground = Ground(config or TheoremConfig())
    reports = []
    with progress("Theorems", len(TOPICS), "topics") as advance:
        for topic in TOPICS:
            reports.append(topic(ground))
            advance(1)
    return TheoremsReport(ground.config, tuple(reports))


def run_theorems(config: TheoremConfig, output: Path) -> TheoremsReport:
    """Makes every check and writes ``report.json``, ``report.md`` and figures; the same folder again checks again.

    Args:
        config: The settings.
        output: The folder.

    Raises:
        UserError: The folder belongs to something else.
    """
    with open_run(output, TheoremsReport.study, asdict(config)) as folder:
        report = check_theorems(config)
        report.write(folder)
    return report
