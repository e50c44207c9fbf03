"""Figures of an evaluation: scores, and differences from the base model, with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from bvpo_stats.plots.style import INK, PALETTE, figure
from bvpo_stats.plots.variance import COLOURS, NAMES

_MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def evaluation_figures(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws scores, and where several models were compared, their differences from the base.

    Args:
        report: ``report.json`` of ``bvpo-stats evaluate``.
        folder: Where the PNG files go.

    Returns:
        The files written; none where nothing was judged.
    """
    if not report["columns"]:
        return []
    paths = [folder / "scores.png"]
    _points(report, report["scores"], paths[0], difference=False)
    if report["differences"]:
        paths.append(folder / "differences.png")
        _points(report, report["differences"], paths[-1], difference=True)
    return paths


def _points(report: dict[str, Any], scores: dict[str, Any], path: Path, *, difference: bool) -> None:
    """One row per column of the table, one mark per model and mode, the interval as a bar."""
    columns = [column for column in report["columns"] if column["percent"]]
    series = [(label, mode) for label, modes in scores.items() for mode in modes]
    step = 0.8 / max(1, len(series))
    with figure(path, height=1.5 + max(0.55, 0.24 * len(series)) * len(columns)) as (fig, axes):
        for number, (label, mode) in enumerate(series):
            colour, marker = COLOURS[mode], _MARKERS[list(report["models"]).index(label) % len(_MARKERS)]
            rows = [row + step * (number - (len(series) - 1) / 2) for row in range(len(columns))]
            entries = [scores[label][mode][column["name"]] for column in columns]
            _bars(axes, rows, entries, colour)
            drawn = [(100 * e["value"], row) for row, e in zip(rows, entries, strict=True) if e["value"] is not None]
            if drawn:
                name = f"{label}, {NAMES[mode]}"
                axes.plot(*zip(*drawn, strict=True), marker, color=colour, ms=6, label=name, lw=0)
        if not difference:
            _published(report, columns, axes)
        else:
            axes.axvline(0, color=INK, lw=1, ls=":")
        axes.set_yticks(range(len(columns)), [f"{column['title']}\n{column['metric']}" for column in columns])
        axes.set_ylim(len(columns) - 0.5, -0.5)
        axes.margins(x=0.08)
        level = f"{report['level']:.0%} intervals"
        axes.set_xlabel("Difference from the base model (percentage points)" if difference else "Score (percent)")
        axes.set_title(f"What changed, paired by prompt ({level})" if difference else f"Scores ({level})")
        fig.legend(loc="outside lower center", ncols=2, fontsize=9)


def _bars(axes: Axes, rows: list[float], entries: list[dict[str, Any]], colour: Any) -> None:
    for row, entry in zip(rows, entries, strict=True):
        if entry["low"] is not None:
            ends = [100 * entry["low"], 100 * entry["high"]]
            axes.plot(ends, [row, row], color=colour, lw=3, alpha=0.45, solid_capstyle="butt")


def _published(report: dict[str, Any], columns: list[dict[str, Any]], axes: Axes) -> None:
    for method, modes in ((report["published"] or {}).get("scores") or {}).items():
        points = [
            (modes[mode][column["name"]], row)
            for row, column in enumerate(columns)
            for mode in modes
            if mode in next(iter(report["scores"].values())) and column["name"] in modes[mode]
        ]
        if points and method in ("base", "BVPO"):
            marker = "|" if method == "base" else "x"
            axes.plot(
                *zip(*points, strict=True), marker, color=PALETTE[3], ms=10, mew=2, lw=0, label=f"paper, {method}"
            )
