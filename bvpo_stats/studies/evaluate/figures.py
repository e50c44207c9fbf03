"""Figures of an evaluation: scores, and differences from the base model, with their intervals."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from bvpo_stats.statistics.proportions import Interval
from bvpo_stats.studies.evaluate.report import Column, EvaluationReport
from bvpo_stats.studies.style import INK, RED, interval_bar, legend_below, panels
from bvpo_stats.studies.variance.figures import COLOURS, NAMES

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")
_PAPER = {"base": "|", "BVPO": "x"}


def draw(report: EvaluationReport, folder: Path) -> list[Path]:
    """Draws scores, and where several models were compared, their differences from the base; nothing unjudged."""
    if not report.columns:
        return []
    paths = [folder / "scores.png"]
    _draw(report, "scores", paths[0])
    if report.differences:
        paths.append(folder / "differences.png")
        _draw(report, "differences", paths[-1])
    return paths


def _draw(report: EvaluationReport, what: str, path: Path) -> None:
    """A panel for each mode; in it a row for each column of the table and a mark for each model."""
    columns = [column for column in report.columns if column.percent]
    entries, difference = getattr(report, what), what == "differences"
    modes = list(next(iter(entries.values())))
    height = 1.6 + max(0.42, 0.2 * len(entries)) * len(columns)
    width = 6.4 if len(modes) == 1 else 8.4
    with panels(path, len(modes), width=width, height=height, sharex=True, sharey=True) as (figure, axes):
        for panel, mode in zip(axes, modes, strict=True):
            if difference:
                panel.axvline(0, color=INK, lw=1, ls=":")
            else:
                _published(report, columns, mode, panel)
            for place, label in enumerate(entries):
                step = 0.7 / len(entries) * (place - (len(entries) - 1) / 2)
                marker = _MARKERS[list(report.models).index(label) % len(_MARKERS)]
                _marks(panel, [entries[label][mode][column.name] for column in columns], step, label, mode, marker)
            panel.set_title(NAMES[mode])
            panel.set_xlabel("Difference from the base (points)" if difference else "Score (percent)")
            panel.margins(x=0.08)
        axes[0].set_yticks(range(len(columns)), [f"{column.title}\n{column.metric}" for column in columns])
        axes[0].set_ylim(len(columns) - 0.5, -0.6)
        level = f"{report.level:.0%} intervals"
        figure.suptitle(f"What changed, paired by prompt ({level})" if difference else f"Scores ({level})")
        if len(entries) > 1 or report.published:
            legend_below(axes[0])


def _marks(axes: Axes, cells: list[Interval], step: float, label: str, mode: str, marker: str) -> None:
    colour = COLOURS[mode]
    for row, cell in enumerate(cells):
        low, high = (None if end is None else 100 * end for end in (cell.low, cell.high))
        interval_bar(axes, low, high, row + step, colour=colour)
    known = [(100 * cell.value, row + step) for row, cell in enumerate(cells) if cell.value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker, color=colour, ms=6, lw=0, label=label)


def _published(report: EvaluationReport, columns: list[Column], mode: str, axes: Axes) -> None:
    """The paper's figures for its base model and for BVPO, above the measured ones."""
    published = report.published or {"scores": {}}
    for method, marker in _PAPER.items():
        printed = published["scores"].get(method, {}).get(mode, {})
        points = [(printed[c.name], row - 0.42) for row, c in enumerate(columns) if c.name in printed]
        if points:
            name = published["model"] if method == "base" else method
            axes.plot(*zip(*points, strict=True), marker, color=RED, ms=7, mew=1.8, lw=0, label=f"{name}, paper")
