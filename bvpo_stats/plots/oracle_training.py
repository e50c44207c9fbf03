"""Figures of the oracle training study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bvpo_stats.plots.style import INK, PALETTE, figure

_ESTIMATED, _EXACT = "adaptive", "exact"


def oracle_training_figures(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the figures of an oracle-training report.

    Args:
        report: ``report.json`` of ``bvpo-stats oracle-training``.
        folder: Where the PNG files go.

    Returns:
        The files written.
    """
    paths = []
    if any("comparisons" in entry for entry in report["results"]):
        paths.append(folder / "gradient_over_alpha.png")
        _against_paper(report, paths[-1])
    if any(_ESTIMATED in entry["methods"] for entry in report["results"]):
        paths.append(folder / "alpha_over_steps.png")
        _alphas(report, paths[-1])
    return paths


def _against_paper(report: dict[str, Any], path: Path) -> None:
    """Mean squared gradient of every method over that of alpha = 0.5."""
    entries = [entry for entry in report["results"] if "comparisons" in entry]
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
        axes.set_title(f"SGD on the oracle, exact gradient norms ({report['settings']['level']:.0%} over seeds)")
        fig.legend(loc="outside lower center", ncols=len(entries), fontsize=9)


def _alphas(report: dict[str, Any], path: Path) -> None:
    """Estimated alpha over steps with its range over seeds, beside the exact one's mean."""
    with figure(path) as (fig, axes):
        for entry, colour in zip(report["results"], PALETTE, strict=False):
            ours = entry["methods"].get(_ESTIMATED)
            if ours is None:
                continue
            curve = ours["curves"]
            axes.fill_between(curve["step"], curve["alpha_low"], curve["alpha_high"], color=colour, alpha=0.12, lw=0)
            axes.plot(curve["step"], curve["alpha"], color=colour, lw=1.8, label=f"estimated, ηL = {entry['eta_l']:g}")
            exact = entry["methods"].get(_EXACT)
            if exact is not None:
                axes.plot(exact["curves"]["step"], exact["curves"]["alpha"], color=colour, lw=1.2, ls="--",
                          label=f"exact, ηL = {entry['eta_l']:g}")  # fmt: skip
        axes.axhline(0.5, color=INK, lw=1, ls="-.")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("Step")
        axes.set_ylabel("alpha")
        axes.set_title("alpha over training: mean over seeds, shaded their range")
        fig.legend(loc="outside lower center", ncols=3, fontsize=8)
