"""Figures of the alpha-star study."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bvpo_stats.studies.alpha_star.report import AlphaReport
from bvpo_stats.studies.style import (
    BLUE,
    GREEN,
    OCHRE,
    PAPER,
    RED,
    REST,
    curves,
    draw_files,
    forest,
    on,
    plain_ticks,
    sns,
)

_MOST_LAYERS = 64
"""Layers beyond this number are drawn without names of their own."""


def draw(report: AlphaReport, folder: Path) -> list[Path]:
    """Draws error over alpha, alpha over batch sizes, alpha by layer, trace weights; what has no data is left out."""
    plots = {
        "error_over_alpha": (plot_error, report.parabola),
        "alpha_over_batch_size": (plot_batch_sizes, report.parabola),
        "alpha_by_layer": (plot_layers, report.layers),
        "trace_weights": (plot_trace_weights, report.marginal.answers.get("ess")),
    }
    return draw_files(folder, {name: partial(plot, report) for name, (plot, data) in plots.items() if data})


def plot_error(report: AlphaReport, ax: Axes | None = None) -> Axes:
    """The error of a step over alpha with its band; where alpha*, the paper's 0.5 and the zero vector stand.

    Args:
        report: Of alpha-star.
        ax: Where to draw; a new figure when None.
    """
    star, mse = report.alpha_star, {name: math.nan if v is None else v for name, v in report.mse.items()}
    rows = [dict(zip(report.parabola, row, strict=True)) for row in zip(*report.parabola.values(), strict=True)]
    with on(ax) as ax:
        curves(ax, rows, x="alpha", label="mix")
        if star is not None and star.identified and star.value is not None:
            ax.axvspan(star.low, star.high, color=GREEN, alpha=0.15, lw=0, label="interval of alpha*")
            ax.plot(star.value, mse["alpha_star"], "*", color=GREEN, ms=13, label=f"alpha* = {star.value:.2f}",
                    clip_on=False, zorder=5)  # fmt: skip
        ax.plot(0.5, mse["half"], "D", color=RED, ms=6, label="paper's 0.5", zorder=4)
        ax.axhline(mse["zero"], color=OCHRE, lw=1.3, ls="--", label="zero vector")
        ax.set(xlim=(0, 1), xlabel="alpha: 0 is g_e (empty trace), 1 is g_t (with trace)")
        ax.set_ylim(bottom=min(0.0, float(np.min([row["value"] for row in rows]))))
        ax.set(
            ylabel="norm(bias)² + (ηL/B) Var", title=f"Error of a step over alpha, {_where(report)} {_level(report)}"
        )
    return ax


def plot_batch_sizes(report: AlphaReport, ax: Axes | None = None) -> Axes:
    """alpha* over the batch size, for each step size asked for; a band without a line is not identified.

    Args:
        report: Of alpha-star.
        ax: Where to draw; a new figure when None.
    """
    rows = [
        {"B": p.batch_size, "value": p.alpha if p.identified else None, "low": p.low, "high": p.high,
         "step": f"alpha*, ηL = {p.eta_l:.3g}"}
        for p in sorted(report.curve, key=lambda p: p.eta_l != report.eta_l)
    ]  # fmt: skip
    with on(ax) as ax:
        steps = len({row["step"] for row in rows})
        curves(ax, rows, x="B", hue="step", markers=["o", "s"][:steps], palette=[BLUE, OCHRE][:steps])
        if not all(point.identified for point in report.curve):
            ax.plot([], [], color=BLUE, alpha=0.2, lw=8, label="band without a line: not identified")
        ax.axvline(report.batch_size, **REST, label=f"B = {report.batch_size:g}")
        ax.axhline(0.5, **PAPER, label="paper's 0.5")
        ax.set_xscale("log", base=2)
        plain_ticks(ax, "x")
        ax.set(ylim=(-0.02, 1.02), xlabel="Batch size B (examples per step)", ylabel="alpha*")
        ax.set_title(f"alpha* depends on the batch size {_level(report)}")
    return ax


def plot_layers(report: AlphaReport, ax: Axes | None = None) -> Axes:
    """alpha* of each layer beside the one for all; an interval without a point is not identified.

    Args:
        report: Of alpha-star.
        ax: Where to draw; a new figure, as high as there are layers, when None.
    """
    star, names = report.alpha_star, [layer.block.split("model.")[-1] for layer in report.layers]
    rows = [
        {"name": name, "value": x.alpha if x.identified else None, "low": x.low, "high": x.high}
        for name, x in zip(names, report.layers, strict=True)
    ]
    with on(ax, height=1.6 + 0.24 * min(len(rows), _MOST_LAYERS)) as ax:
        forest(
            ax,
            rows,
            label="a layer" + ("" if all(x.identified for x in report.layers) else "; no point: not identified"),
        )
        if star is not None and star.value is not None:
            ax.axvline(star.value, color=GREEN, lw=1.3, ls="--", label="one alpha* for all")
        if len(rows) > _MOST_LAYERS:
            ax.set(ylabel="Layer, from the input down", yticks=[])
        ax.set(xlim=(-0.01, 1.01), xlabel="alpha*", title=f"alpha* by layer, {_where(report)} {_level(report)}")
    return ax


def plot_trace_weights(report: AlphaReport, ax: Axes | None = None) -> Axes:
    """Effective traces per answer against the anchor gap, or their distribution where no gap is known.

    Args:
        report: Of alpha-star.
        ax: Where to draw; a new figure when None.
    """
    marginal = report.marginal
    ess, gap = (np.array(marginal.answers[name], dtype=float) for name in ("ess", "anchor_gap"))
    with on(ax) as ax:
        if np.isfinite(gap).any():
            sns.scatterplot(x=gap, y=ess, s=18, color=BLUE, alpha=0.5, linewidth=0, ax=ax)
            limit = math.nan if marginal.log_traces is None else marginal.log_traces
            ax.axvline(limit, **PAPER, label=f"log K = {limit:.2f}: certified to the left")
            ax.set(xlabel="Anchor gap J (nats)", ylabel="Effective traces", ylim=(0.9, None))
        else:
            top = max(2.0, math.ceil(float(np.nanmax(ess))))
            sns.histplot(x=ess, bins=np.linspace(1, top, 25).tolist(), color=BLUE, element="step", ax=ax)
            ax.set(xlabel="Effective traces", ylabel="Answers")
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(f"Trace weights behind mu ({len(ess)} answers, K = {marginal.traces_per_answer:g})")
    return ax


def _where(report: AlphaReport) -> str:
    return f"B = {report.batch_size:g}, ηL = {report.eta_l:.3g}"


def _level(report: AlphaReport) -> str:
    return f"({report.level:.0%} intervals)"
