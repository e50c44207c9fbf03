"""Figures of the oracle training study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from bvpo_stats.lab.oracle_training.report import OracleTrainingReport
from bvpo_stats.studies.style import BLUE, INK, OCHRE, PALETTE, REST, across, draw_files, forest, on, sns
from bvpo_stats.training.alpha import DEFAULT_RULE

_DPO = "alpha = 1"
_SIZES = ("small", "middle", "large")


def draw(report: OracleTrainingReport, folder: Path) -> list[Path]:
    """Draws the figures as PNG files into a folder and returns their paths."""
    plots: dict[str, Callable[..., Axes | Sequence[Axes]]] = (
        {"final_loss_over_best_fixed": plot_regrets, "map": plot_gains} if report.cells else {}
    )
    return draw_files(folder, {name: partial(plot, report) for name, plot in plots.items()})


def plot_regrets(report: OracleTrainingReport, ax: Axes | None = None) -> Axes:
    """Mean regret of every method with its interval, on the models that judge (on all where none does).

    Args:
        report: Of oracle training.
        ax: Where to draw; a new figure when None.
    """
    found = [report.summary(optimizer, "judge") or report.summary(optimizer, "all")
             for optimizer in report.settings["optimizers"]]  # fmt: skip
    shown = {
        s["optimizer"] + ("" if s["half"] == "judge" else " (models that choose)"): s for s in found if s is not None
    }
    rows = [
        {"name": method["name"], "optimizer": whose}
        | {end: 100 * entry[key] for end, key in (("value", "mean"), ("low", "low"), ("high", "high"))}
        for whose, summary in shown.items()
        for method in report.methods
        if (entry := summary["methods"].get(method["name"], {}).get("over_best"))
    ]
    with on(ax, width=7.2, height=0.34 * len(report.methods) + 1.6) as ax:
        order = [method["name"] for method in report.methods]
        forest(ax, rows, order=order, hue="optimizer", palette=PALETTE[: len(shown)], dodge=0.45, markersize=4)
        ax.axvline(0, color=INK, lw=1, ls="-.")
        ax.set(xlim=(-20, 45), xlabel="final L_m over the best fixed alpha's, %")
        ax.set_title("Which alpha trains best? Models that judge")
    return ax


def plot_gains(report: OracleTrainingReport, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """What the best fixed alpha and the default gain over DPO, a box of all settings, over the step size.

    Args:
        report: Of oracle training.
        axes: Where to draw, one an optimizer; a new figure when None.
    """
    names, optimizers = [method["name"] for method in report.methods], report.settings["optimizers"]
    fixed = [k for k, method in enumerate(report.methods) if method["source"] == "fixed"]
    with across(axes, len(optimizers), width=3.0 * len(optimizers) + 0.8, height=3.4, sharey=True) as axes:
        for optimizer, ax in zip(optimizers, axes, strict=True):
            size, whose, over = [], [], []
            for cell in (cell for cell in report.cells if cell["optimizer"] == optimizer):
                ends = np.array([np.nan if losses is None else losses[-1] for losses in cell["losses"]])
                found = {"best fixed": ends[fixed].min()}
                if DEFAULT_RULE in names:
                    found[DEFAULT_RULE] = ends[names.index(DEFAULT_RULE)]
                size += [_SIZES[cell["size"]]] * len(found)
                whose += list(found)
                over += [100 * (loss / ends[names.index(_DPO)] - 1) for loss in found.values()]
            palette = {"best fixed": OCHRE, DEFAULT_RULE: BLUE}
            look = {"palette": palette, "fill": False, "fliersize": 2.5, "gap": 0.2, "linewidth": 1.3}
            sns.boxplot(x=size, y=over, hue=whose, order=_SIZES, ax=ax, **look)
            ax.axhline(0, **REST)
            ax.set(xlabel="step size", ylabel="", title=optimizer)
        axes[0].set_ylabel("final L_m over DPO's, %")
    return axes
