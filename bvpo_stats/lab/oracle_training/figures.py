"""Figures of the oracle training study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bvpo_stats.studies.style import INK, PALETTE, band, figure, panels

_ESTIMATED, _EXACT = "adaptive", "exact"


Results = Sequence[dict[str, Any]]
"""Of `bvpo_stats.lab.oracle_training.report.summary`, one a step size."""


def oracle_training_figures(results: Results, level: float, folder: Path) -> list[Path]:
    """Draws the figures as PNG files into a folder and returns their paths.

    Args:
        results: By step size.
        level: Of the intervals.
        folder: Where the files go.
    """
    paths = []
    compared = [entry for entry in results if "comparisons" in entry]
    if compared:
        paths.append(folder / "gradient_over_alpha.png")
        _against_paper(compared, level, paths[-1])
    estimated = [entry for entry in results if _ESTIMATED in entry["methods"]]
    if estimated:
        paths.append(folder / "alpha_over_steps.png")
        _alphas(estimated, paths[-1])
    return paths


def _against_paper(entries: Results, level: float, path: Path) -> None:
    """Mean squared gradient of every method over that of alpha = 0.5."""
    names = list(entries[0]["methods"])
    places = np.arange(len(names))
    with figure(path, width=7.2, height=4.2) as (fig, axes):
        offsets = np.linspace(-0.22, 0.22, len(entries)) if len(entries) > 1 else [0.0]
        for entry, offset, colour in zip(entries, offsets, PALETTE, strict=False):
            found = [entry["comparisons"][name]["over_paper"] for name in names]
            value, low, high = (np.array([x[key] for x in found], dtype=float) for key in ("value", "low", "high"))
            axes.errorbar(places + offset, value, (value - low, high - value), fmt="o", ms=4, lw=1.3, color=colour,
                          label=f"ηL = {entry['eta_l']:g}")  # fmt: skip
        axes.axhline(1, color=INK, lw=1, ls="-.")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if round(x * 10) in (5, 7, 15) else "")
        axes.set_xticks(places, [name.replace(", ", "\n") for name in names], rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("mean norm(∇L_m)², over alpha = 0.5")
        axes.set_title(f"SGD on the oracle, exact gradient norms ({level:.0%} over seeds)")
        fig.legend(loc="outside lower center", ncols=len(entries), fontsize=9)


def _alphas(entries: Results, path: Path) -> None:
    """Estimated alpha over steps with its range over seeds, beside the exact one's mean; a panel for each step size."""
    with panels(path, len(entries), width=3.0 * len(entries) + 0.6, height=3.2, sharey=True) as (fig, axes):
        for entry, one in zip(entries, axes, strict=True):
            curve = entry["methods"][_ESTIMATED]["curves"]
            band(one, curve["step"], curve["alpha_low"], curve["alpha_high"], colour=PALETTE[0])
            one.plot(curve["step"], curve["alpha"], color=PALETTE[0], lw=2, label="estimated (range over seeds)")
            exact = entry["methods"].get(_EXACT)
            if exact is not None:
                one.plot(exact["curves"]["step"], exact["curves"]["alpha"], color=PALETTE[1], lw=1.2, ls="--",
                         label="exact")  # fmt: skip
            one.axhline(0.5, color=INK, lw=1, ls="-.", label="paper's 0.5")
            one.set_ylim(-0.02, 1.02)
            one.set_xlabel("Step")
            one.set_title(f"ηL = {entry['eta_l']:g}")
        axes[0].set_ylabel("alpha, mean over seeds")
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3 if len(entries) > 1 else 1)
