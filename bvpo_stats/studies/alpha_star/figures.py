"""Figures of the alpha-star study."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from bvpo_stats.studies.alpha_star.report import AlphaReport
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

_MIX, _BEST, _PAPER, _ZERO = BLUE, GREEN, RED, OCHRE
_MOST_LAYERS = 64
"""Layers beyond this number are drawn without names of their own."""


def draw(report: AlphaReport, folder: Path) -> list[Path]:
    """Draws error over alpha, alpha over batch sizes, alpha by layer, trace weights; what has no data is left out."""
    paths = []
    if report.parabola:
        _parabola(report, folder / "error_over_alpha.png")
        _curve(report, folder / "alpha_over_batch_size.png")
        paths += [folder / "error_over_alpha.png", folder / "alpha_over_batch_size.png"]
    if report.layers:
        _layers(report, folder / "alpha_by_layer.png")
        paths.append(folder / "alpha_by_layer.png")
    if report.marginal.answers.get("ess"):
        _weights(report, folder / "trace_weights.png")
        paths.append(folder / "trace_weights.png")
    return paths


def _parabola(report: AlphaReport, path: Path) -> None:
    curve = {name: np.array(values, dtype=float) for name, values in report.parabola.items()}
    star = report.alpha_star
    mse = {name: math.nan if value is None else value for name, value in report.mse.items()}
    with figure(path) as (_, axes):
        band(axes, curve["alpha"], curve["low"], curve["high"], colour=_MIX)
        axes.plot(curve["alpha"], curve["value"], color=_MIX, lw=1.8, label="mix")
        if star is not None and star.identified and star.value is not None:
            axes.axvspan(star.low, star.high, color=_BEST, alpha=0.15, lw=0, label="interval of alpha*")
            axes.plot(star.value, mse["alpha_star"], "*", color=_BEST, ms=13, label=f"alpha* = {star.value:.2f}",
                      clip_on=False, zorder=5)  # fmt: skip
        axes.plot(0.5, mse["half"], "D", color=_PAPER, ms=6, label="paper's 0.5", zorder=4)
        axes.axhline(mse["zero"], color=_ZERO, lw=1.3, ls="--", label="zero vector")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=min(0.0, float(np.min(curve["value"]))))
        axes.set_xlabel("alpha: 0 is g_e (empty trace), 1 is g_t (with trace)")
        axes.set_ylabel("norm(bias)² + (ηL/B) Var")
        axes.set_title(f"Error of a step over alpha, {_where(report)} ({report.level:.0%} bands)")
        legend_below(axes)


def _curve(report: AlphaReport, path: Path) -> None:
    with figure(path) as (_, axes):
        steps = sorted({point.eta_l for point in report.curve}, key=lambda x: x != report.eta_l)
        for eta_l, colour, style in zip(steps, (_MIX, OCHRE), ("o-", "s--"), strict=False):
            points = [p for p in report.curve if p.eta_l == eta_l]
            size, low, high = (numbers([getattr(p, key) for p in points]) for key in ("batch_size", "low", "high"))
            value = numbers([p.alpha if p.identified else None for p in points])
            band(axes, size, low, high, colour=colour)
            axes.plot(size, value, style, color=colour, ms=4, lw=1.5, label=f"alpha*, ηL = {eta_l:.3g}")
        if not all(point.identified for point in report.curve):
            axes.plot([], [], color=_MIX, alpha=0.2, lw=8, label="band without a line: not identified")
        axes.axvline(report.batch_size, color=INK, lw=1, ls=":", label=f"B = {report.batch_size:g}")
        axes.axhline(0.5, color=_PAPER, lw=1, ls="-.", label="paper's 0.5")
        axes.set_xscale("log", base=2)
        plain_ticks(axes, "x")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("Batch size B (examples per step)")
        axes.set_ylabel("alpha*")
        axes.set_title(f"alpha* depends on the batch size ({report.level:.0%} bands)")
        legend_below(axes)


def _layers(report: AlphaReport, path: Path) -> None:
    layers, star = report.layers, report.alpha_star
    rows = np.arange(len(layers))
    named = len(layers) <= _MOST_LAYERS
    with figure(path, height=1.6 + 0.24 * min(len(layers), _MOST_LAYERS)) as (_, axes):
        for row, layer in zip(rows, layers, strict=True):
            interval_bar(axes, layer.low, layer.high, float(row), colour=_MIX, certain=layer.identified)
            if layer.identified and layer.alpha is not None:
                axes.plot(layer.alpha, row, "o", color=_MIX, ms=6, clip_on=False, zorder=3)
        axes.plot([], [], "o-", color=_MIX, label="one layer; dotted: not identified")
        if star is not None and star.value is not None:
            axes.axvline(star.value, color=_BEST, lw=1.3, ls="--", label="one alpha* for all")
        if named:
            axes.set_yticks(rows, [_short(layer.block) for layer in layers])
        else:
            axes.set_ylabel("Layer, from the input down")
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlim(-0.01, 1.01)
        axes.set_xlabel("alpha*")
        axes.set_title(f"alpha* by layer, {_where(report)} ({report.level:.0%} intervals)")
        legend_below(axes)


def _weights(report: AlphaReport, path: Path) -> None:
    """Effective traces per answer against the anchor gap, or their distribution where no gap is known."""
    marginal = report.marginal
    ess, gap = numbers(marginal.answers["ess"]), numbers(marginal.answers["anchor_gap"])
    with figure(path) as (_, axes):
        if np.isfinite(gap).any():
            axes.scatter(gap, ess, s=14, color=_MIX, alpha=0.5, lw=0)
            limit = math.nan if marginal.log_traces is None else marginal.log_traces
            axes.axvline(limit, color=_PAPER, lw=1.3, ls="--", label=f"log K = {limit:.2f}: certified to the left")
            axes.set_xlabel("Anchor gap J (nats)")
            axes.set_ylabel("Effective traces")
            axes.set_ylim(0.9, None)
            legend_below(axes)
        else:
            top = max(2.0, math.ceil(float(np.nanmax(ess))))
            axes.hist(ess[np.isfinite(ess)], bins=np.linspace(1, top, 25).tolist(), color=_MIX, alpha=0.6)
            axes.set_xlabel("Effective traces")
            axes.set_ylabel("Answers")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"Trace weights behind mu ({len(ess)} answers, K = {marginal.traces_per_answer:g})")


def _where(report: AlphaReport) -> str:
    return f"B = {report.batch_size:g}, ηL = {report.eta_l:.3g}"


def _short(block: str) -> str:
    return block.removeprefix("base_model.model.").removeprefix("model.")
