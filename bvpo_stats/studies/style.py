"""The visual language of all figures.

- **Ground.** Figures are transparent, for light and dark pages alike. Text and axes are of one grey whose contrast is
  about 4.3:1 on white and on near-black, the most that one colour can have on both; data colours have 3:1 or more.
- **Colour.** Five colours after Okabe and Ito's, moved so far that they keep their contrast on both grounds and stay
  apart for readers who see no red, no green or no blue. Series differ in marker or line as well, where they can.
- **Uncertainty.** Every estimate stands with its interval: a bar (`interval_bar`) or a band (`band`).
- **Words.** Axes carry units; titles say what is shown and at which level; legends stand below the axes, where they can
  cover no data (`legend_below`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed, and none is opened

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

BLUE, OCHRE, GREEN, RED, VIOLET = "#0173b2", "#cc8400", "#029e73", "#d04a3a", "#8844dd"
PALETTE = [to_rgb(colour) for colour in (BLUE, OCHRE, GREEN, RED, VIOLET)]
INK = "#767b82"
_BAR: dict[str, Any] = {"lw": 2.2, "solid_capstyle": "butt"}
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def figure(path: Path, *, width: float = 6.4, height: float = 3.6) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one panel in the house style, saved as PNG at the end.

    Args:
        path: Where it goes.
        width: Inches.
        height: Inches.
    """
    with panels(path, 1, width=width, height=height) as (drawn, (axes,)):
        yield drawn, axes


@contextmanager
def panels(
    path: Path, columns: int, *, rows: int = 1, width: float = 6.4, height: float = 3.6, **layout: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with several panels in the house style, saved as PNG at the end.

    Args:
        path: Where it goes.
        columns: Panels side by side.
        rows: Rows of panels.
        width: Inches, of all together.
        height: Inches, of all together.
        **layout: ``sharex``, ``sharey``, ... of `matplotlib.pyplot.subplots`.
    """
    with plt.rc_context(_STYLE):
        size = (width, height)
        drawn, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **layout)
        try:
            yield drawn, list(axes.flat)
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path, dpi=144, metadata={"Software": None})
        finally:
            plt.close(drawn)


def interval_bar(
    axes: Axes, low: float | None, high: float | None, row: float, *, colour: Any, certain: bool = True
) -> None:
    """A horizontal interval at height ``row``, dotted where its estimate is not to be quoted; nothing without ends."""
    if low is not None and high is not None:
        axes.plot([low, high], [row, row], ls="-" if certain else ":", color=colour, **_BAR)


def error_bar(
    axes: Axes, x: float, low: float | None, high: float | None, *, colour: Any, certain: bool = True
) -> None:
    """A vertical interval at ``x``, dotted where its estimate is not to be quoted; nothing without ends."""
    if low is not None and high is not None:
        axes.plot([x, x], [low, high], ls="-" if certain else ":", color=colour, **_BAR)


def band(axes: Axes, x: ArrayLike, low: ArrayLike, high: ArrayLike, *, colour: Any) -> None:
    """A confidence band behind a curve, its edges drawn; gaps where an end is missing (NaN)."""
    at, lower, upper = (np.asarray(values, dtype=float) for values in (x, low, high))
    axes.fill_between(at, lower, upper, color=colour, alpha=0.2, lw=0)
    for edge in (lower, upper):
        axes.plot(at, edge, color=colour, lw=0.8, alpha=0.7)


def numbers(values: Sequence[float | None]) -> np.ndarray:
    """Numbers of a report as an array, None as NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def plain_ticks(axes: Axes, *names: str) -> None:
    """Ticks of a logarithmic axis (``x`` or ``y``) as plain numbers."""
    for name in names:
        getattr(axes, f"{name}axis").set_major_formatter(lambda value, _: f"{value:g}")


def legend_below(axes: Axes, most: int = 4) -> None:
    """One legend for the figure of these axes, below them, in even rows of at most ``most`` entries."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = math.ceil(len(labels) / math.ceil(len(labels) / most))
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)  # type: ignore[union-attr]
