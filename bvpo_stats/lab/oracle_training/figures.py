"""Figures of the oracle training study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bvpo_stats.lab.oracle_training.report import OracleTrainingReport
from bvpo_stats.studies.style import BLUE, INK, OCHRE, PALETTE, figure, interval_bar, legend_below, panels
from bvpo_stats.training.alpha import DEFAULT_RULE

_DPO = "alpha = 1"


def draw(report: OracleTrainingReport, folder: Path) -> list[Path]:
    """Draws the figures as PNG files into a folder and returns their paths."""
    if not report.cells:
        return []
    paths = [folder / "final_loss_over_best_fixed.png", folder / "map.png"]
    _regrets(report, paths[0])
    _map(report, paths[1])
    return paths


def _regrets(report: OracleTrainingReport, path: Path) -> None:
    """Mean regret of every method with its interval, on the models that judge (on all where none does)."""
    shown = [
        summary
        for optimizer in report.settings["optimizers"]
        if (summary := report.summary(optimizer, "judge") or report.summary(optimizer, "all")) is not None
    ]
    names = [method["name"] for method in report.methods]
    with figure(path, width=7.2, height=0.34 * len(names) + 1.6) as (_, axes):
        for number, (summary, colour) in enumerate(zip(shown, PALETTE, strict=False)):
            for row, name in enumerate(names):
                if name not in summary["methods"]:
                    continue
                entry = summary["methods"][name]["over_best"]
                y = row + 0.22 * (number - (len(shown) - 1) / 2)
                if entry["high"] < 1e8:
                    interval_bar(axes, entry["low"] * 100, entry["high"] * 100, y, colour=colour)
                axes.plot(entry["mean"] * 100, y, "o", ms=4, color=colour, label=None if row else _whose(summary))
        axes.axvline(0, color=INK, lw=1, ls="-.")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(-20, 45)
        axes.set_xlabel("final L_m over the best fixed alpha's, %")
        axes.set_title("Which alpha trains best? Models that judge")
        legend_below(axes)


def _whose(summary: dict[str, Any]) -> str:
    return summary["optimizer"] + ("" if summary["half"] == "judge" else " (models that choose)")


def _map(report: OracleTrainingReport, path: Path) -> None:
    """What the best fixed alpha and the default gain over DPO, one point a setting, over the step size."""
    names = [method["name"] for method in report.methods]
    fixed = [k for k, method in enumerate(report.methods) if method["source"] == "fixed"]
    optimizers = report.settings["optimizers"]
    with panels(path, len(optimizers), width=3.0 * len(optimizers) + 0.8, height=3.4, sharey=True) as (_, axes):
        for optimizer, one in zip(optimizers, axes, strict=True):
            cells = [cell for cell in report.cells if cell["optimizer"] == optimizer]
            for offset, (label, colour) in zip(
                (-0.15, 0.15), (("best fixed", OCHRE), (DEFAULT_RULE, BLUE)), strict=True
            ):
                for cell in cells:
                    ends = np.array([np.nan if losses is None else losses[-1] for losses in cell["losses"]])
                    if label == DEFAULT_RULE and label not in names:
                        continue
                    value = ends[fixed].min() if label == "best fixed" else ends[names.index(label)]
                    x = cell["size"] + offset + 0.05 * report.settings["horizons"].index(cell["horizon"])
                    marker = "o" if cell["beta"] == 1 else "^"
                    one.plot(x, 100 * (value / ends[names.index(_DPO)] - 1), marker, ms=3, color=colour, alpha=0.7)
                one.plot([], [], "o", color=colour, label=label)
            one.axhline(0, color=INK, lw=1, ls="-.")
            one.set_xticks(range(3), ("small", "middle", "large"))
            one.set_xlabel("step size")
            one.set_title(optimizer)
        axes[0].set_ylabel("final L_m over DPO's, %")
        legend_below(axes[0])
