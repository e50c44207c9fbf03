"""The kinds of report: how each is presented and drawn. A new study adds one line to `KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo_stats import plots
from bvpo_stats.studies import (
    alpha_star_output,
    evaluate_output,
    oracle_training_output,
    pairs_output,
    sample_output,
    traces_report,
    train_output,
    variance_output,
)
from bvpo_stats.studies.alpha_star_report import AlphaReport
from bvpo_stats.studies.presentation import Presentation
from bvpo_stats.studies.theorems import output as theorems_output

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
        Kind("variance", variance_output.present, plots.variance_figures),
        Kind("sample", sample_output.present),
        Kind("pairs", pairs_output.present),
        Kind("traces", traces_report.present),
        Kind("alpha-star", _present_alpha_star, plots.alpha_figures),
        Kind("theorems", theorems_output.present, plots.theorem_figures),
        Kind("train", train_output.present, plots.train_figures),
        Kind("evaluate", evaluate_output.present, plots.evaluation_figures),
        Kind("oracle-training", oracle_training_output.present, plots.oracle_training_figures),
    )
}


def story_order(study: str | None) -> int:
    """Place of a study on a page; unknown ones come last."""
    return list(KINDS).index(study) if study in KINDS else len(KINDS)
