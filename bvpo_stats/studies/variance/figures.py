"""Figures of the variance study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from bvpo_stats.statistics.proportions import Interval
from bvpo_stats.studies.base import MODE_NAMES
from bvpo_stats.studies.style import (
    BLUE,
    GREEN,
    INK,
    OCHRE,
    RED,
    band,
    figure,
    interval_bar,
    legend_below,
    numbers,
    plain_ticks,
)
from bvpo_stats.studies.variance.report import Histogram, VarianceReport

COLOURS = {"thinking": BLUE, "nothinking": OCHRE, "trace": BLUE, "answer": GREEN, "no-trace answer": OCHRE}
_ROOM = 2.0  # height of the figure of positions over its highest point, at most
MARKERS = {"trace": "o-", "answer": "^-.", "no-trace answer": "s--"}
NAMES = {**MODE_NAMES, "trace": "trace (Thinking)", "answer": "answer (Thinking)",
         "no-trace answer": "answer (NoThinking)"}  # fmt: skip


def draw(report: VarianceReport, folder: Path) -> list[Path]:
    """Draws ratios, distributions of length and log-probability, and NLL by position."""
    paths = [folder / name for name in ("ratios.png", "lengths.png", "logps.png", "nll_by_position.png")]
    _ratios(report, paths[0])
    _distribution(report.lengths, "How long are responses?", "Length of a response (tokens)", paths[1])
    _distribution(report.logps, "How probable are responses?", "Joint log-probability of a response (nats)", paths[2])
    _positions(report, paths[3])
    return paths


def _ratios(report: VarianceReport, path: Path) -> None:
    rows: list[tuple[str, Interval | None, str, str]] = [
        ("Variance of log p", report.table3["logp_variance_ratio"], "table3", "logp_variance_ratio"),
        ("its geometric mean", report.table3.get("logp_geometric_ratio"), "table3", "logp_geometric_ratio"),
        ("Variance of length", report.table3["length_variance_ratio"], "table3", "length_variance_ratio"),
        ("its geometric mean", report.table3.get("length_geometric_ratio"), "table3", "length_geometric_ratio"),
        ("Mean length", report.table4["mean_length_ratio"], "table4", "mean_length_ratio"),
        ("NLL, trace / answer", report.table5["nll_ratio"], "table5", "nll_ratio"),
    ]
    entries = [
        (label, entry, table, name)
        for label, entry, table, name in rows
        if entry is not None and entry.value is not None
    ]
    with figure(path, height=0.6 + 0.6 * len(entries)) as (_, axes):
        for row, (_, entry, table, name) in enumerate(entries):
            value, low, high = entry.value, entry.low, entry.high
            interval_bar(axes, low, high, row, colour=COLOURS["thinking"])
            axes.plot(numbers([value]), row, "o", color=COLOURS["thinking"], ms=6)
            if report.published and name in report.published[table]:
                axes.plot(report.published[table][name], row, "D", color=RED, ms=6,
                          label="paper" if row == 0 else None)  # fmt: skip
        axes.axvline(1, color=INK, lw=1, ls=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plain_ticks(axes, "x")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(range(len(entries)), [f"{label}\n{_words(entry)}" for label, entry, *_ in entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.set_xlabel("Ratio, log scale (Thinking / NoThinking; last row trace / answer)")
        axes.set_title(f"What a trace does to a response ({_level(report)} intervals)")
        if report.published:
            legend_below(axes)


def _distribution(histogram: Histogram, title: str, label: str, path: Path) -> None:
    edges = np.asarray(histogram.edges)
    with figure(path, height=3.2) as (_, axes):
        for mode, counts in histogram.counts.items():
            total = max(1, sum(counts))
            axes.stairs(np.asarray(counts) / total, edges, fill=True, color=COLOURS[mode], alpha=0.35)
            axes.stairs(
                np.asarray(counts) / total, edges, color=COLOURS[mode], lw=1.5, label=f"{NAMES[mode]} (n = {total})"
            )
        axes.set_xlabel(label)
        axes.set_ylabel("Share of responses")
        axes.set_title(title)
        legend_below(axes)


def _positions(report: VarianceReport, path: Path) -> None:
    with figure(path) as (_, axes):
        top = 0.0
        for segment, bins in report.positions.items():
            if not bins:
                continue
            centre = np.array([(b.start + b.stop - 1) / 2 + 1 for b in bins])
            value, low, high = (numbers([getattr(b.nll, k) for b in bins]) for k in ("value", "low", "high"))
            band(axes, centre, low, high, colour=COLOURS[segment])
            top = max(top, _ROOM * float(np.nanmax(value)))
            axes.plot(centre, value, MARKERS[segment], color=COLOURS[segment], ms=4, lw=1.5, label=NAMES[segment])
        axes.set_xscale("log")
        plain_ticks(axes, "x")
        axes.set_xlabel("Position within the segment (tokens from its start)")
        axes.set_ylabel("NLL (nats per token)")
        axes.set_ylim(0, min(top, axes.get_ylim()[1]) or 1.0)  # a wide band never hides the curves
        axes.set_title(f"How predictable are tokens? ({_level(report)} bands)")
        legend_below(axes)


def _words(entry: Interval) -> str:
    if entry.low is None:
        return f"{entry.value:.3g}"
    return f"{entry.value:.3g} ({entry.low:.3g} to {entry.high:.3g})"


def _level(report: VarianceReport) -> str:
    return f"{report.definitions.level:.0%}"
