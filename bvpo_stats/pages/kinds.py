"""The kinds of report: how each is presented and drawn. A new study adds one line to `KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo_stats.lab.oracle_training import figures as oracle_training_figures
from bvpo_stats.lab.oracle_training import output as oracle_training_output
from bvpo_stats.lab.theorems import figures as theorems_figures
from bvpo_stats.lab.theorems import output as theorems_output
from bvpo_stats.studies.alpha_star import figures as alpha_star_figures
from bvpo_stats.studies.alpha_star import output as alpha_star_output
from bvpo_stats.studies.alpha_star.report import AlphaReport
from bvpo_stats.studies.base import Presentation
from bvpo_stats.studies.evaluate import figures as evaluate_figures
from bvpo_stats.studies.evaluate import output as evaluate_output
from bvpo_stats.studies.pairs import output as pairs_output
from bvpo_stats.studies.sample import output as sample_output
from bvpo_stats.studies.traces import report as traces_report
from bvpo_stats.studies.train import figures as train_figures
from bvpo_stats.studies.train import output as train_output
from bvpo_stats.studies.variance import figures as variance_figures
from bvpo_stats.studies.variance import output as variance_output

Report = dict[str, Any]
"""A ``report.json``."""


def _no_figures(report: Report, folder: Path) -> list[Path]:
    return []


@dataclass(frozen=True)
class Kind:
    """What to do with the reports of one study.

    Attributes:
        study: What stands under ``study`` in its ``report.json``.
        present: Makes findings, tables and notes of a report.
        figures: Draws a report's figures into a folder and returns their paths.
    """

    study: str
    present: Callable[[Report], Presentation]
    figures: Callable[[Report, Path], list[Path]] = _no_figures


def _present_alpha_star(report: Report) -> Presentation:
    return alpha_star_output.present(AlphaReport.from_dict(report))


KINDS: dict[str, Kind] = {
    kind.study: kind
    for kind in (  # in the order of the story that a page tells
        Kind("variance", variance_output.present, variance_figures.variance_figures),
        Kind("sample", sample_output.present),
        Kind("pairs", pairs_output.present),
        Kind("traces", traces_report.present),
        Kind("alpha-star", _present_alpha_star, alpha_star_figures.alpha_figures),
        Kind("theorems", theorems_output.present, theorems_figures.theorem_figures),
        Kind("train", train_output.present, train_figures.train_figures),
        Kind("evaluate", evaluate_output.present, evaluate_figures.evaluation_figures),
        Kind("oracle-training", oracle_training_output.present, oracle_training_figures.oracle_training_figures),
    )
}


def story_order(study: str | None) -> int:
    """Place of a study on a page; unknown ones come last."""
    return list(KINDS).index(study) if study in KINDS else len(KINDS)
