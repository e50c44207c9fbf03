"""Figures of the variance study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from bvpo_stats.plots.style import INK, PALETTE, figure

COLOURS = {"thinking": PALETTE[0], "nothinking": PALETTE[1], "trace": PALETTE[0], "answer": PALETTE[2],
           "no-trace answer": PALETTE[1]}  # fmt: skip
NAMES = {"thinking": "Thinking", "nothinking": "NoThinking", "trace": "trace (Thinking)", "answer": "answer (Thinking)",
         "no-trace answer": "answer (NoThinking)"}  # fmt: skip


def variance_figures(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the figures of a variance report.

    Args:
        report: ``report.json`` of ``bvpo-stats variance``.
        folder: Where the PNG files go.

    Returns:
        The files written.
    """
    paths = [folder / name for name in ("ratios.png", "lengths.png", "logps.png", "nll_by_position.png")]
    _ratios(report, paths[0])
    _distribution(report["lengths"], "Length of a response (tokens)", paths[1])
    _distribution(report["logps"], "Joint log-probability of a response (nats)", paths[2])
    _positions(report, paths[3])
    return paths


def _ratios(report: dict[str, Any], path: Path) -> None:
    entries = [
        ("Variance of log p", report["table3"]["logp_variance_ratio"], "table3", "logp_variance_ratio"),
        ("Variance of length", report["table3"]["length_variance_ratio"], "table3", "length_variance_ratio"),
        ("Mean length", report["table4"]["mean_length_ratio"], "table4", "mean_length_ratio"),
        ("NLL, trace / answer", report["table5"]["nll_ratio"], "table5", "nll_ratio"),
    ]
    entries = [entry for entry in entries if entry[1]["value"] is not None]
    with figure(path, height=2.7) as (_, axes):
        for row, (_, entry, table, name) in enumerate(entries):
            value, low, high = entry["value"], entry["low"], entry["high"]
            if low is not None:
                axes.plot([low, high], [row, row], color=COLOURS["thinking"], lw=3, alpha=0.45, solid_capstyle="butt")
            axes.plot(value, row, "o", color=COLOURS["thinking"], ms=8)
            axes.annotate(f"{value:.2f}", (value, row), xytext=(0, 8), textcoords="offset points", ha="center")
            if report.get("published"):
                axes.plot(report["published"][table][name], row, "D", color=PALETTE[3], ms=6,
                          label="paper" if row == 0 else None)  # fmt: skip
        axes.axvline(1, color=INK, lw=1, ls=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(range(len(entries)), [label for label, *_ in entries])
        axes.set_ylim(len(entries) - 0.5, -0.7)
        axes.margins(x=0.08)
        axes.set_xlabel("Ratio (log scale): Thinking / NoThinking, in the last row trace / answer")
        axes.set_title(f"What a trace does to a response ({_level(report)} intervals)")
        if report.get("published"):
            axes.legend(loc="best")


def _distribution(histogram: dict[str, Any], label: str, path: Path) -> None:
    edges = np.asarray(histogram["edges"])
    with figure(path, height=3.2) as (_, axes):
        for mode, counts in histogram["counts"].items():
            total = max(1, sum(counts))
            axes.stairs(np.asarray(counts) / total, edges, fill=True, color=COLOURS[mode], alpha=0.35)
            axes.stairs(
                np.asarray(counts) / total, edges, color=COLOURS[mode], lw=1.5, label=f"{NAMES[mode]} (n = {total})"
            )
        axes.set_xlabel(label)
        axes.set_ylabel("Share of responses")
        axes.set_title("Responses with and without a trace")
        axes.legend(loc="best")


def _positions(report: dict[str, Any], path: Path) -> None:
    with figure(path) as (_, axes):
        for segment, bins in report["positions"].items():
            if not bins:
                continue
            centre = np.array([(b["start"] + b["stop"] - 1) / 2 + 1 for b in bins])
            value, low, high = (
                np.array([np.nan if b["nll"][k] is None else b["nll"][k] for b in bins], dtype=float)
                for k in ("value", "low", "high")
            )
            axes.fill_between(centre, low, high, color=COLOURS[segment], alpha=0.2, lw=0)
            axes.plot(centre, value, "o-", color=COLOURS[segment], ms=4, lw=1.5, label=NAMES[segment])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel("Position within the segment (tokens from its start)")
        axes.set_ylabel("NLL (nats per token)")
        axes.set_ylim(bottom=0)
        axes.set_title(f"How predictable are tokens? ({_level(report)} bands)")
        axes.legend(loc="best")


def _level(report: dict[str, Any]) -> str:
    return f"{report['definitions']['level']:.0%}"
