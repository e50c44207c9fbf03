"""The visual language of all figures, on seaborn.

- **Ground.** Figures are transparent, for light and dark pages alike. Text and axes are of one grey whose contrast is
  about 4.3:1 on white and on near-black, the most that one colour can have on both; data colours have 3:1 or more.
- **Colour.** Five colours after Okabe and Ito's, moved so far that they keep their contrast on both grounds and stay
  apart for readers who see no red, no green or no blue. Series differ in marker or line as well, where they can.
- **Uncertainty.** Every estimate stands with its interval, a bar or a band: `estimates` makes the table that seaborn's
  ``lineplot`` and ``pointplot`` draw so, with `ESTIMATE`.
- **Words.** Axes carry units; titles say what is shown and at which level; legends stand below the axes, where they can
  cover no data.

A plot function takes a report and axes, and returns the axes. Without axes it makes a figure of its own in this style
(`on`, `across`); axes that are given keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from bvpo_stats.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

BLUE, OCHRE, GREEN, RED, VIOLET = "#0173b2", "#cc8400", "#029e73", "#d04a3a", "#8844dd"
PALETTE = [to_rgb(colour) for colour in (BLUE, OCHRE, GREEN, RED, VIOLET)]
INK = "#767b82"
PAPER: dict[str, Any] = {"color": RED, "lw": 1.2, "ls": "-."}
"""Line of what the paper says."""
REST: dict[str, Any] = {"color": INK, "lw": 1, "ls": ":"}
"""Line of no effect."""
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.grid": True,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 10,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
}
_FOR_FILES = ContextVar("figures are for files, not for the screen", default=False)


class _Seaborn:
    """seaborn, imported when something is drawn: it brings pandas along and takes a second."""

    def __getattr__(self, name: str) -> Any:
        try:
            import seaborn
        except ImportError as error:
            raise UserError("Figures need seaborn, which is not installed: pip install 'bvpo-stats[plots]'.") from error
        return getattr(seaborn, name)


sns: Any = _Seaborn()


@contextmanager
def across(
    given: Sequence[Axes] | None, columns: int, *, width: float = 6.4, height: float = 3.6, most: int = 4, **layout: Any
) -> Iterator[list[Axes]]:
    """Axes to draw on, in a new figure where none are given, and one legend for all of them at the end.

    Args:
        given: The caller's axes, as many as columns; None for a new figure.
        columns: Panels side by side.
        width: Inches, of a new figure.
        height: Inches, of a new figure.
        most: Entries in a row of its legend.
        **layout: ``sharex``, ``sharey``, ... of `matplotlib.pyplot.subplots`.

    Raises:
        UserError: Another number of axes than columns.
    """
    if given is not None:
        if len(given) != columns:
            raise UserError(f"`axes`: this plot has {columns} panels; {len(given)} axes were given.")
        yield list(given)
        for axes in given:
            _legend(axes, axes.legend)
        return
    with plt.rc_context(_STYLE):
        make: Any = Figure if _FOR_FILES.get() else plt.figure
        figure = make(figsize=(width, height), layout="constrained")
        made = list(figure.subplots(1, columns, squeeze=False, **layout).flat)
        yield made
        legend_below(made[0], most)
        for axes in made[1:]:
            if axes.get_legend():
                axes.get_legend().remove()


@contextmanager
def on(given: Axes | None, *, width: float = 6.4, height: float = 3.6, most: int = 4) -> Iterator[Axes]:
    """One panel of `across`."""
    with across(None if given is None else [given], 1, width=width, height=height, most=most) as (axes,):
        yield axes


def draw_files(folder: Path, plots: Mapping[str, Callable[[], Axes | Sequence[Axes]]]) -> list[Path]:
    """Draws plots as PNG files, ``FOLDER/NAME.png``, and returns their paths.

    Args:
        folder: Where they go.
        plots: Name to what draws a figure of its own and returns its axes.
    """
    files = _FOR_FILES.set(True)
    try:
        for name, plot in plots.items():
            drawn = plot()
            first = drawn if isinstance(drawn, Axes) else drawn[0]
            _save(first.figure, folder / f"{name}.png")
    finally:
        _FOR_FILES.reset(files)
    return [folder / f"{name}.png" for name in plots]


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
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn, list(drawn.subplots(rows, columns, squeeze=False, **layout).flat)
        _save(drawn, path)


def _save(drawn: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_STYLE):
        drawn.savefig(path, dpi=144, metadata={"Software": None})


def estimates(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows with ``value``, ``low`` and ``high`` as a table in which each stands three times: low end, value, high end.

    None is unknown: an interval without both ends is left out, and so is the point of a value that is not to be quoted.

    Args:
        rows: One an estimate; all other columns are kept.
    """
    import pandas as pd

    long = []
    for row in rows:
        ends = (row["low"], row["high"])
        low, high = ends if all(end is not None and math.isfinite(end) for end in ends) else (None, None)
        long += [{**row, "value": value} for value in (low, row["value"], high)]
    table = pd.DataFrame(long)
    table["value"] = table["value"].astype(float)
    return table


def _value(seen: pd.Series[float]) -> float:
    """Of what `estimates` left of a row: both ends and the value, the value alone, or both ends."""
    return math.nan if len(seen) == 2 else float(seen.iloc[len(seen) // 2])


def _ends(seen: pd.Series[float]) -> tuple[float, float]:
    return float(seen.iloc[0]), float(seen.iloc[-1])


ESTIMATE: dict[str, Any] = {"estimator": _value, "errorbar": _ends}
"""Arguments with which seaborn draws the rows of `estimates`, each as one point with its interval."""


def curves(axes: Axes, rows: Iterable[Mapping[str, Any]], *, x: str, hue: str | None = None, **how: Any) -> None:
    """Curves through estimates, with their bands.

    Args:
        axes: Where.
        rows: See `estimates`.
        x: Column of the position.
        hue: Column that tells curves apart; they differ in colour, line and marker.
        **how: More arguments of ``seaborn.lineplot``.
    """
    apart = {} if hue is None else {"hue": hue, "style": hue, "markeredgewidth": 0}
    if {"palette", "color"}.isdisjoint(how) and hue is None:
        how["color"] = BLUE
    sns.lineplot(estimates(rows), x=x, y="value", sort=False, ax=axes, **ESTIMATE, **apart, **how)


def forest(axes: Axes, rows: Iterable[Mapping[str, Any]], *, y: str = "name", **how: Any) -> None:
    """Estimates below one another, each with its interval.

    Args:
        axes: Where.
        rows: See `estimates`.
        y: Column with the words at the left.
        **how: More arguments of ``seaborn.pointplot``.
    """
    defaults = {"linestyle": "none", "err_kws": {"linewidth": 2.2}, "color": BLUE, "markersize": 6}
    how = {**defaults, **how}
    table = estimates(rows)
    if "hue" in how:
        del how["color"]
        if table[how["hue"]].nunique() < 2:  # seaborn divides by the number of others
            how.pop("dodge", None)
    sns.pointplot(table, x="value", y=y, orient="h", native_scale=False, ax=axes, **ESTIMATE, **how)
    axes.set_ylabel("")


def plain_ticks(axes: Axes, *names: str) -> None:
    """Ticks of a logarithmic axis (``x`` or ``y``) as plain numbers."""
    for name in names:
        getattr(axes, f"{name}axis").set_major_formatter(lambda value, _: f"{value:g}")


def legend_below(axes: Axes, most: int = 4) -> None:
    """One legend for the figure of these axes, below them, in even rows of at most ``most`` entries."""
    drawn: Any = axes.figure
    _legend(axes, drawn.legend, most, loc="outside lower center")


def _legend(axes: Axes, make: Callable[..., Any], most: int = 4, **where: Any) -> None:
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each label once
    if (legend := axes.get_legend()) is not None:
        legend.remove()
    if entries:
        rows = math.ceil(len(entries) / most)
        make(entries.values(), entries.keys(), ncols=math.ceil(len(entries) / rows) if where else 1, **where)
