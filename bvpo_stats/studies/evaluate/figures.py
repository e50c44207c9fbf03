"""Figures of an evaluation: scores, and differences from the base model, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from bvpo_stats.studies.evaluate.report import EvaluationReport
from bvpo_stats.studies.style import RED, REST, across, draw_files, forest
from bvpo_stats.studies.variance.figures import COLOURS, NAMES

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")


def draw(report: EvaluationReport, folder: Path) -> list[Path]:
    """Draws scores, and where several models were compared, their differences from the base; nothing unjudged."""
    plots = {"scores": plot_scores} if report.columns else {}
    if report.columns and report.differences:
        plots["differences"] = plot_differences
    return draw_files(folder, {name: partial(plot, report) for name, plot in plots.items()})


def plot_scores(report: EvaluationReport, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Every score with its interval, a panel a mode, beside what the paper prints of the same model.

    Args:
        report: Of an evaluation.
        axes: Where to draw, one a mode; a new figure when None.
    """
    return _plot(report, "scores", axes)


def plot_differences(report: EvaluationReport, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Every compared model less the base model, paired by prompt.

    Args:
        report: Of an evaluation of several models.
        axes: Where to draw, one a mode; a new figure when None.
    """
    return _plot(report, "differences", axes)


def _plot(report: EvaluationReport, what: str, given: Sequence[Axes] | None) -> list[Axes]:
    """A panel for each mode; in it a row for each column of the table and a mark for each model."""
    columns, entries = [column for column in report.columns if column.percent], getattr(report, what)
    published = report.published or {}
    modes, difference = list(next(iter(entries.values()))), what == "differences"
    names = [f"{column.title}\n{column.metric}" for column in columns]
    size: dict[str, Any] = {
        "width": 6.4 if len(modes) == 1 else 8.4,
        "height": 1.6 + max(0.42, 0.2 * len(entries)) * len(columns),
    }
    with across(given, len(modes), sharex=True, sharey=True, **size) as axes:
        for ax, mode in zip(axes, modes, strict=True):
            rows = [
                {"name": name, "model": model}
                | {key: None if (end := getattr(cell, key)) is None else 100 * end for key in ("value", "low", "high")}
                for model in entries
                for name, column in zip(names, columns, strict=True)
                for cell in (entries[model][mode][column.name],)
            ]
            several: dict[str, Any] = (
                {"hue": "model", "palette": [COLOURS[mode]] * len(entries), "dodge": 0.6} if len(entries) > 1 else {}
            )
            markers = [_MARKERS[list(report.models).index(model) % len(_MARKERS)] for model in entries]
            forest(ax, rows, markers=markers if several else markers[0], **({"color": COLOURS[mode]} | several))
            if difference:
                ax.axvline(0, **REST)
            for name, marker in (("base", "|"), ("BVPO", "x")) if published and not difference else ():
                printed = published["scores"].get(name, {}).get(mode, {})
                points = [(printed[c.name], row - 0.42) for row, c in enumerate(columns) if c.name in printed]
                label = f"{published['model'] if name == 'base' else name}, paper"
                if points:
                    ax.plot(*zip(*points, strict=True), marker, color=RED, ms=7, mew=1.8, lw=0, label=label)
            ax.set(title=NAMES[mode], xlabel="Difference from the base (points)" if difference else "Score (percent)")
            ax.margins(x=0.08)
        axes[0].set_ylim(len(columns) - 0.5, -0.6)
        level = f"{report.level:.0%} intervals"
        if given is None:
            axes[0].figure.suptitle(f"What changed, paired by prompt ({level})" if difference else f"Scores ({level})")  # type: ignore[union-attr]
    return axes
