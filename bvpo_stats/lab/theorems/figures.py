"""Figures of the theorems study: one a theorem, from the data of its topic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from bvpo_stats.studies.style import (
    BLUE,
    GREEN,
    INK,
    OCHRE,
    RED,
    VIOLET,
    error_bar,
    figure,
    legend_below,
    panels,
    plain_ticks,
)

_TWO = 1.96
"""Standard errors to either side of a measured point: 95%."""
Data = dict[str, Any]


def theorem_figures(topics: Mapping[str, Data], folder: Path) -> list[Path]:
    """Draws the figures of topics, data by name, as PNG files into a folder and returns their paths."""
    paths = []
    for file, topic, draw in _FIGURES:
        if topics.get(topic):
            draw(topics[topic], folder / file)
            paths.append(folder / file)
    return paths


def _trace_variance(data: Data, path: Path) -> None:
    """Variance left over alpha: trace sampling alone, and all sampling for two ratios."""
    alphas = np.linspace(0, 1, 101)
    with figure(path) as (_, axes):
        axes.plot(alphas, alphas**2, color=BLUE, lw=1.8, label="trace sampling alone: alpha²")
        for point in data["points"]:
            value, half = point["value"] / data["trace_part"], _TWO * point["standard_error"] / data["trace_part"]
            error_bar(axes, point["alpha"], value - half, value + half, colour=BLUE)
            axes.plot(point["alpha"], value, "o", color=BLUE, ms=5, label=_once(axes, "measured, 95%"))
        for ratio, style in ((data["main_ratio"], "--"), (data["ratios"][-1], "-.")):
            mixed = alphas**2 + (1 - alphas) ** 2 * ratio
            axes.plot(alphas, mixed, style, color=OCHRE, lw=1.6, label=f"y' sampled too, ratio {ratio:.2g}")
        axes.axhline(1, color=INK, lw=1, ls=":")
        axes.axvline(data["paper_alpha"], color=RED, lw=1, ls="-.", label="paper's 0.5")
        axes.set_ylim(0, min(2.5, 1.05 * max(1.2, data["ratios"][-1])))
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("alpha: 0 is g_e (empty trace), 1 is g_t (with trace)")
        axes.set_ylabel("Var(g_c) / Var(g_t)")
        axes.set_title("What mixing leaves of the variance (Theorem 1)")
        legend_below(axes, most=3)


def _parabola(data: Data, path: Path) -> None:
    alpha, value = (np.array([p[key] for p in data["exact"]]) for key in ("alpha", "value"))
    best, unc = float(np.min(value)), data["alpha_unc"]
    with figure(path) as (_, axes):
        axes.axvspan(max(0.0, 2 * unc - 1), min(1.0, 2 * unc), color=GREEN, alpha=0.12, lw=0, label="beats both parts")
        axes.plot(alpha, value, color=BLUE, lw=1.6, label="exact")
        for point in data["points"]:
            half = _TWO * point["standard_error"]
            error_bar(axes, point["alpha"], point["value"] - half, point["value"] + half, colour=BLUE)
            axes.plot(point["alpha"], point["value"], "o", color=BLUE, ms=4, label=_once(axes, "measured, 95%"))
        axes.plot(min(1.0, max(0.0, unc)), best, "*", color=GREEN, ms=14, label=f"alpha* = {unc:.2f}", zorder=5)
        axes.axvline(data["paper_alpha"], color=RED, lw=1, ls="-.", label="paper's 0.5")
        axes.axhline(data["zero"], color=VIOLET, lw=1.3, ls="--", label="zero vector")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("alpha: 0 is g_e (empty trace), 1 is g_t (with trace)")
        axes.set_ylabel("E norm(g_c - mu)²")
        axes.set_title("The error is a parabola in alpha (Theorem 2, single examples)")
        legend_below(axes, most=3)


def _window(data: Data, path: Path) -> None:
    points = data["window"]
    unc = np.array([p["alpha_unc"] for p in points])
    ratio = np.array([p["paper"] / min(p["trace"], p["empty"]) for p in points])
    size = np.array([p["batch_size"] for p in points])
    edge = max(1.0, float(np.max(np.abs(unc - 0.5))) + 0.55)
    with figure(path) as (_, axes):
        axes.axvspan(0.25, 0.75, color=GREEN, alpha=0.12, lw=0, label="alpha_unc in (1/4, 3/4)")
        axes.axhline(1, color=INK, lw=1, ls=":")
        for low, high, marker, colour in ((1, 2, "o", BLUE), (4, 16, "s", OCHRE), (32, 128, "^", VIOLET)):
            chosen = (size >= low) & (size <= high)
            axes.plot(unc[chosen], ratio[chosen], marker, color=colour, ms=5, ls="", label=f"B = {low} to {high}")
        _log(axes, "y")
        axes.set_xlim(min(-0.05, float(unc.min()) - 0.05), min(edge, float(unc.max()) + 0.1))
        axes.set_xlabel("alpha_unc of the population and batch size")
        axes.set_ylabel("MSE(0.5) / MSE of the better part")
        axes.set_title("When does alpha = 0.5 beat both parts? (exact)")
        legend_below(axes, most=4)


def _batch_size(data: Data, path: Path) -> None:
    size, value = (np.array([p[key] for p in data["curve"]]) for key in ("batch_size", "value"))
    with figure(path) as (_, axes):
        axes.plot(size, value, color=BLUE, lw=1.6, label="exact alpha(1/B)")
        for point in data["points"]:
            half = _TWO * point["standard_error"]
            error_bar(axes, point["batch_size"], point["value"] - half, point["value"] + half, colour=BLUE)
            axes.plot(point["batch_size"], point["value"], "o", color=BLUE, ms=4, label=_once(axes, "measured, 95%"))
        for name, style in (("variance_only", "--"), ("bias_only", ":")):
            axes.axhline(data[name], color=INK, lw=1.2, ls=style, label=name.replace("_", " ") + " limit")
        axes.axvline(
            data["paper_batch_size"], color=RED, lw=1, ls="-.", label=f"paper's B = {data['paper_batch_size']}"
        )
        axes.axhline(1, color=GREEN, lw=1, alpha=0.7, label="alpha* is clipped at 1")
        axes.set_xscale("log", base=2)
        plain_ticks(axes, "x")
        axes.set_xlabel("Batch size B (examples per step)")
        axes.set_ylabel("alpha_unc")
        axes.set_title("The best alpha depends on the batch size")
        legend_below(axes, most=3)


def _bound(data: Data, path: Path) -> None:
    """Both sides of equation (3) by alpha, the right side in its three parts, and equation (4)."""
    rows = data["rows"]
    parts = (("descent", VIOLET, "descent term"), ("bias_sq", OCHRE, "mean norm(Bias)²"), ("noise", BLUE, "eta L Var"))
    with figure(path, height=3.9) as (_, axes):
        for place, row in enumerate(rows):
            floor = 0.0
            for key, colour, label in parts:
                axes.bar(place + 0.2, row[key], 0.34, bottom=floor, color=colour, label=_once(axes, f"(3): {label}"))
                floor += row[key]
            error_bar(axes, place + 0.2, floor - row["bound_half"], floor + row["bound_half"], colour=INK)
            axes.bar(place - 0.2, row["gradient_sq"], 0.34, color=GREEN, label=_once(axes, "mean norm(grad L_m)²"))
            half = row["gradient_sq_half"]
            error_bar(axes, place - 0.2, row["gradient_sq"] - half, row["gradient_sq"] + half, colour=INK)
            times = row["uniform_bound"] / row["gradient_sq"]
            axes.annotate(f"(4): {times:.0f}x", (place, floor + row["bound_half"]), xytext=(0, 5),
                          textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
        names = ["alpha_k" if row["alpha"] == "alpha_k" else f"alpha = {row['alpha']}" for row in rows]
        axes.set_xticks(range(len(rows)), names)
        axes.margins(y=0.15)
        axes.set_ylabel("norm(gradient)²")
        axes.set_title(f"Both sides of Theorem 3's bound, {data['paths']} paths of {data['steps']} steps (95%)")
        axes.set_xlabel(
            f"B = {data['batch_size']}, eta L = {data['eta_l']:.2f}; (4): the uniform bound over the left side"
        )
        legend_below(axes, most=2)


def _one_step(data: Data, path: Path) -> None:
    """Expected change of the loss over alpha with both bounds, and what each criterion calls best."""
    rows = {row["rho"]: row for row in data["rows"]}
    with panels(path, len(data["curves"]), width=7.6, height=3.9) as (_, all_axes):
        for axes, curve in zip(all_axes, data["curves"], strict=True):
            row = rows[curve["rho"]]
            axes.plot(curve["alpha"], curve["change"], "o-", color=BLUE, ms=4, lw=1.8, label="expected change (exact)")
            axes.plot(curve["alpha"], curve["bound"], "--", color=VIOLET, lw=1.4, label="bound (14)")
            axes.plot(curve["alpha"], curve["kept_bound"], "-.", color=OCHRE, lw=1.4, label="bound, nothing dropped")
            axes.plot(row["bound"], np.interp(row["bound"], curve["alpha"], curve["bound"]), "v", color=VIOLET, ms=8,
                      label="least of (14): Theorem 4", clip_on=False)  # fmt: skip
            at = np.interp(row["kept_bound"], curve["alpha"], curve["kept_bound"])
            axes.plot(row["kept_bound"], at, "D", color=OCHRE, ms=6, label="alpha_J", clip_on=False)
            axes.plot(
                row["loss"], row["change_loss"], "*", color=GREEN, ms=13, label="best for the loss", clip_on=False
            )
            axes.axhline(0, color=INK, lw=1, ls=":")
            axes.set_title(f"eta L = {curve['rho']:g}")
            axes.set_xlabel("alpha")
            axes.set_xlim(0, 1)
        all_axes[0].set_ylabel("Change of L_m in one step (nats)")
        legend_below(all_axes[0], most=3)


def _temperature(data: Data, path: Path) -> None:
    points = data["temperatures"]
    temperature, bias = (np.array([p[key] for p in points]) for key in ("temperature", "bias"))
    with figure(path, height=3.2) as (_, axes):
        axes.plot(temperature, bias, "o-", color=BLUE, lw=1.6, ms=5, label="norm(b_t) / norm(mu), exact")
        axes.axvline(data["paper_temperature"], color=RED, lw=1, ls="-.", label="paper's temperature")
        axes.axhline(0, color=INK, lw=1, ls=":")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("Sampling temperature of the traces (theta = theta_ref)")
        axes.set_ylabel("Bias of g_t / gradient")
        axes.set_title("g_t is unbiased at temperature 1 only")
        legend_below(axes)


def _drift(data: Data, path: Path) -> None:
    steps = data["steps"]
    distance = np.array([p["distance"] for p in steps])
    with figure(path, height=3.4) as (_, axes):
        for key, style, colour, label in (
            ("bias", "o", BLUE, "norm(b_t), exact"),
            ("law", "--", GREEN, "drift law, slope 1"),
            ("rest", "s-.", OCHRE, "what the law misses, slope 2"),
        ):
            axes.plot(distance, [p[key] for p in steps], style, color=colour, ms=5, lw=1.5, label=label)
        _log(axes, "x")
        axes.set_yscale("log")
        axes.set_xlabel("Distance from theta_ref, norm(delta)")
        axes.set_ylabel("norm of the bias")
        axes.set_title("The bias of g_t grows with the drift (one prompt and pair)")
        legend_below(axes)


def _snis(data: Data, path: Path) -> None:
    """Bias over K, plain on the left and anchored, which is rounding alone, on the right."""
    curve = data["curve"]
    traces = np.array([p["traces"] for p in curve])
    with panels(path, 2, width=7.6, height=3.4) as (_, (left, right)):
        left.plot(traces, [p["leading_order"] for p in curve], "--", color=VIOLET, lw=1.4, label="leading order, 1/K")
        left.plot(traces, [p["snis"] for p in curve], "o-", color=OCHRE, lw=1.6, ms=5, label="SNIS, exact")
        left.plot([], [], "s-", color=BLUE, lw=1.6, ms=5, label="anchored SNIS, exact")
        _log(left, "y")
        right.plot(traces, [p["anchored"] for p in curve], "s-", color=BLUE, lw=1.6, ms=5)
        right.set_yscale("log")
        right.set_ylim(1e-17, 1e-12)
        for axes, title in ((left, "All traces from the prior"), (right, "One trace from the posterior")):
            axes.set_title(title)
            axes.set_xscale("log", base=2)
            plain_ticks(axes, "x")
            axes.set_xlabel("Traces per answer, K")
        left.set_ylabel("norm(bias) / norm(S)")
        legend_below(left)


def _log_probability(data: Data, path: Path) -> None:
    """Ratio of score variances against that of log p, question by question, oracle and embedded model."""
    panel_names = [(name, title) for name, title in (("oracle", "Oracles (exact)"), ("embedded", "Embedded model"))
                   if name in data]  # fmt: skip
    with panels(path, len(panel_names), width=3.8 * len(panel_names), height=3.9) as (_, all_axes):
        for axes, (name, title) in zip(all_axes, panel_names, strict=True):
            rows = [row for row in data[name] if min(row.values()) > 0]
            x = np.array([row["logp_thinking"] / row["logp_nothinking"] for row in rows])
            y = np.array([row["gradient_thinking"] / row["gradient_nothinking"] for row in rows])
            axes.plot(x, y, "o", color=BLUE, ms=4, alpha=0.8, mew=0, label="one question")
            ratios = data[f"{name}_ratios"]
            across, up = ratios["logp"], ratios["gradient"]
            axes.plot([across["low"], across["high"]], [up["value"]] * 2, color=RED, lw=2.2)
            error_bar(axes, across["value"], up["low"], up["high"], colour=RED)
            axes.plot(across["value"], up["value"], "D", color=RED, ms=6, label="ratio of averages, 95%")
            ends = [min(x.min(), y.min()), max(x.max(), y.max())]
            axes.plot(ends, ends, color=INK, lw=1, ls=":", label="equal ratios")
            _log(axes, "x", "y")
            axes.set_title(title)
            axes.set_xlabel("Var(log p) ratio, Thinking / NoThinking")
        all_axes[0].set_ylabel("tr Cov(score) ratio")
        legend_below(all_axes[0])


def _log(axes: Axes, *names: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of every decade, or at 1 alone where there are many."""
    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        low, high = getattr(axes, f"get_{name}lim")()
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
        axis.set_minor_formatter(NullFormatter())
    plain_ticks(axes, *names)


def _once(axes: Axes, label: str) -> str | None:
    """The label the first time it is asked for on these axes, then none."""
    return None if label in axes.get_legend_handles_labels()[1] else label


_FIGURES: tuple[tuple[str, str, Callable[[Data, Path], None]], ...] = (
    ("theorem1_variance.png", "theorem1", _trace_variance),
    ("theorem2_parabola.png", "theorem2", _parabola),
    ("theorem2_window.png", "theorem2", _window),
    ("batch_size.png", "batch_size", _batch_size),
    ("theorem3_bound.png", "theorem3", _bound),
    ("theorem4_step.png", "theorem4", _one_step),
    ("temperature.png", "reference_point", _temperature),
    ("drift.png", "drift", _drift),
    ("snis_bias.png", "marginal_gradient", _snis),
    ("log_probability.png", "appendix_b", _log_probability),
)
