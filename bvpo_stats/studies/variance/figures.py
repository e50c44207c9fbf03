"""Figures of the variance study."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from bvpo_stats.statistics.proportions import Interval
from bvpo_stats.studies.base import MODE_NAMES
from bvpo_stats.studies.style import BLUE, GREEN, OCHRE, RED, REST, curves, draw_files, forest, on, plain_ticks, sns
from bvpo_stats.studies.variance.report import Histogram, VarianceReport

COLOURS = {"thinking": BLUE, "nothinking": OCHRE, "trace": BLUE, "answer": GREEN, "no-trace answer": OCHRE}
NAMES = {**MODE_NAMES, "trace": "trace (Thinking)", "answer": "answer (Thinking)",
         "no-trace answer": "answer (NoThinking)"}  # fmt: skip
_ROOM = 2.0  # height of the figure of positions over its highest point, at most
_RATIOS = {
    ("table3", "logp_variance_ratio"): "Variance of log p",
    ("table3", "logp_geometric_ratio"): "its geometric mean",
    ("table3", "length_variance_ratio"): "Variance of length",
    ("table3", "length_geometric_ratio"): "its geometric mean ",  # another row than the one above
    ("table4", "mean_length_ratio"): "Mean length",
    ("table5", "nll_ratio"): "NLL, trace / answer",
}


def draw(report: VarianceReport, folder: Path) -> list[Path]:
    """Draws ratios, distributions of length and log-probability, and NLL by position."""
    plots = {"ratios": plot_ratios, "lengths": plot_lengths, "logps": plot_logps, "nll_by_position": plot_positions}
    return draw_files(folder, {name: partial(plot, report) for name, plot in plots.items()})


def plot_ratios(report: VarianceReport, ax: Axes | None = None) -> Axes:
    """What a trace does to a response: every ratio with its interval, and the paper's.

    Args:
        report: Of the variance study.
        ax: Where to draw; a new figure when None.
    """
    found: dict[tuple[str, str], Interval | None] = {at: getattr(report, at[0]).get(at[1]) for at in _RATIOS}
    shown = {at: entry for at, entry in found.items() if entry is not None and entry.value is not None}
    rows = [
        {"name": f"{_RATIOS[at]}\n{_words(x)}", "value": x.value, "low": x.low, "high": x.high}
        for at, x in shown.items()
    ]
    published = report.published or {}
    with on(ax, height=0.6 + 0.6 * len(rows)) as ax:
        ax.set_xscale("log")
        forest(ax, rows)
        paper = {row: published[t][n] for row, (t, n) in enumerate(shown) if n in published.get(t, {})}
        if paper:
            ax.plot(list(paper.values()), list(paper), "D", color=RED, ms=6, label="paper")
        ax.axvline(1, **REST)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_locator(NullLocator())
        plain_ticks(ax, "x")
        ax.margins(x=0.08)
        ax.set(xlabel="Ratio, log scale (Thinking / NoThinking; last row trace / answer)")
        ax.set_title(f"What a trace does to a response ({_level(report)} intervals)")
    return ax


def plot_lengths(report: VarianceReport, ax: Axes | None = None) -> Axes:
    """The distribution of response lengths, by mode.

    Args:
        report: Of the variance study.
        ax: Where to draw; a new figure when None.
    """
    return _distribution(report.lengths, ax, xlabel="Length of a response (tokens)", title="How long are responses?")


def plot_logps(report: VarianceReport, ax: Axes | None = None) -> Axes:
    """The distribution of the joint log-probability of a response, by mode.

    Args:
        report: Of the variance study.
        ax: Where to draw; a new figure when None.
    """
    label = "Joint log-probability of a response (nats)"
    return _distribution(report.logps, ax, xlabel=label, title="How probable are responses?")


def _distribution(histogram: Histogram, ax: Axes | None, **words: Any) -> Axes:
    edges = np.asarray(histogram.edges)
    middles = (edges[1:] + edges[:-1]) / 2
    with on(ax, height=3.2) as ax:
        for mode, counts in histogram.counts.items():
            look = {"element": "step", "color": COLOURS[mode], "alpha": 0.35}
            label = f"{NAMES[mode]} (n = {sum(counts)})"
            sns.histplot(x=middles, weights=counts, bins=edges.tolist(), stat="probability", label=label, ax=ax, **look)
        ax.set(ylabel="Share of responses", **words)
    return ax


def plot_positions(report: VarianceReport, ax: Axes | None = None) -> Axes:
    """How predictable tokens are, by their position within trace and answer.

    Args:
        report: Of the variance study.
        ax: Where to draw; a new figure when None.
    """
    rows = [
        {"at": (b.start + b.stop - 1) / 2 + 1, "value": b.nll.value, "low": b.nll.low, "high": b.nll.high,
         "segment": NAMES[segment]}
        for segment, bins in report.positions.items()
        for b in bins
    ]  # fmt: skip
    colours = {NAMES[segment]: COLOURS[segment] for segment in ("trace", "answer", "no-trace answer")}
    with on(ax) as ax:
        ax.set_xscale("log")
        if rows:
            curves(ax, rows, x="at", hue="segment", palette=colours, markers=dict(zip(colours, "o^s", strict=True)))
            top = _ROOM * float(np.nanmax([np.nan if row["value"] is None else row["value"] for row in rows]))
            ax.set_ylim(0, min(top, ax.get_ylim()[1]) or 1.0)  # a wide band never hides the curves
        plain_ticks(ax, "x")
        ax.set(xlabel="Position within the segment (tokens from its start)", ylabel="NLL (nats per token)")
        ax.set_title(f"How predictable are tokens? ({_level(report)} bands)")
    return ax


def _words(entry: Interval) -> str:
    return f"{entry.value:.3g}" + ("" if entry.low is None else f" ({entry.low:.3g} to {entry.high:.3g})")


def _level(report: VarianceReport) -> str:
    return f"{report.definitions.level:.0%}"
