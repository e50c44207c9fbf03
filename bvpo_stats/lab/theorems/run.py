"""All theorems in one run: the report, its files, and whether anything that should hold does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bvpo_stats.lab.theorems.batch_size import batch_scaling
from bvpo_stats.lab.theorems.checks import Check, TopicReport
from bvpo_stats.lab.theorems.convergence import theorem3
from bvpo_stats.lab.theorems.ground import Ground, TheoremConfig
from bvpo_stats.lab.theorems.log_probabilities import appendix_b
from bvpo_stats.lab.theorems.optimal_alpha import proposition1, theorem2
from bvpo_stats.lab.theorems.output import present
from bvpo_stats.lab.theorems.step_size import theorem4
from bvpo_stats.lab.theorems.trace_bias import drift, reference_point
from bvpo_stats.lab.theorems.trace_variance import theorem1
from bvpo_stats.lab.theorems.trace_weights import marginal_gradient
from bvpo_stats.progress import progress
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.studies.base import software_versions, to_json

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


@dataclass(frozen=True)
class TheoremsReport:
    """Every claim with its numbers and verdict.

    Attributes:
        config: The settings.
        topics: The checks by theorem or question.
        versions: Software versions.
    """

    config: TheoremConfig
    topics: tuple[TopicReport, ...]
    versions: dict[str, str]

    @property
    def alarms(self) -> tuple[Check, ...]:
        """Claims that should have held and do not."""
        return tuple(check for topic in self.topics for check in topic.alarms)

    def to_dict(self) -> dict[str, Any]:
        """The report as it stands in ``report.json``."""
        return {
            "study": "theorems",
            "config": asdict(self.config),
            "topics": [asdict(topic) for topic in self.topics],
            "n_checks": sum(len(topic.checks) for topic in self.topics),
            "alarms": [check.claim for check in self.alarms],
            "versions": self.versions,
        }

    def plot(self, folder: Path) -> list[Path]:
        """Draws the figures into a folder."""
        from bvpo_stats.lab.theorems.figures import theorem_figures

        return theorem_figures(self.to_dict(), folder)

    def _repr_html_(self) -> str:
        return present(self.to_dict()).html()


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
    return TheoremsReport(ground.config, tuple(reports), software_versions())


def run_theorems(config: TheoremConfig, output: Path) -> TheoremsReport:
    """Makes every check and writes ``report.json``, ``report.md`` and figures; the same folder again checks again.

    Args:
        config: The settings.
        output: The folder.

    Raises:
        UserError: The folder belongs to something else.
    """
    with open_run(output, "theorems", asdict(config)) as folder:
        report = check_theorems(config)
        plain = report.to_dict()
        write_atomic(folder / "report.json", to_json(plain))
        figures = report.plot(folder / "figures")
        write_atomic(folder / "report.md", present(plain).markdown(figures, report.versions))
    return report
