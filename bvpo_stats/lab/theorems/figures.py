"""Figures of the theorems study: one a theorem, from the data of its topic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
    PAPER,
    RED,
    REST,
    VIOLET,
    across,
    curves,
    draw_files,
    on,
    plain_ticks,
    sns,
)

_TWO = 1.96
"""Standard errors to either side of a measured point: 95%."""
_ALPHA = "alpha: 0 is g_e (empty trace), 1 is g_t (with trace)"
Data = dict[str, Any]


def theorem_figures(topics: Mapping[str, Data], folder: Path) -> list[Path]:
    """Draws the figures of topics, data by name, as PNG files into a folder and returns their paths."""
    shown = {file: partial(plot, topics[topic]) for file, (topic, plot) in _FIGURES.items() if topics.get(topic)}
    return draw_files(folder, shown)


def plot_trace_variance(data: Data, ax: Axes | None = None) -> Axes:
    """Variance left over alpha: trace sampling alone, and all sampling for two ratios.

    Args:
        data: Of the topic ``theorem1``.
        ax: Where to draw; a new figure when None.
    """
    alpha = np.linspace(0, 1, 101)
    with on(ax, most=3) as ax:
        sns.lineplot(x=alpha, y=alpha**2, color=BLUE, label="trace sampling alone: alpha²", ax=ax)
        _measured(ax, data["points"], "alpha", unit=data["trace_part"])
        for ratio, style in ((data["main_ratio"], "--"), (data["ratios"][-1], "-.")):
            mixed = alpha**2 + (1 - alpha) ** 2 * ratio
            sns.lineplot(x=alpha, y=mixed, ls=style, color=OCHRE, label=f"y' sampled too, ratio {ratio:.2g}", ax=ax)
        ax.axhline(1, **REST)
        ax.axvline(data["paper_alpha"], **PAPER, label="paper's 0.5")
        ax.set(ylim=(0, min(2.5, 1.05 * max(1.2, data["ratios"][-1]))), xlim=(-0.02, 1.02), xlabel=_ALPHA)
        ax.set(ylabel="Var(g_c) / Var(g_t)", title="What mixing leaves of the variance (Theorem 1)")
    return ax


def plot_parabola(data: Data, ax: Axes | None = None) -> Axes:
    """The exact error over alpha, what samples measured of it, and where a mix beats both of its parts.

    Args:
        data: Of the topic ``theorem2``.
        ax: Where to draw; a new figure when None.
    """
    unc = data["alpha_unc"]
    with on(ax, most=3) as ax:
        ax.axvspan(max(0.0, 2 * unc - 1), min(1.0, 2 * unc), color=GREEN, alpha=0.12, lw=0, label="beats both parts")
        _curve(ax, data["exact"], "alpha", "value", color=BLUE, label="exact")
        _measured(ax, data["points"], "alpha")
        best = min(point["value"] for point in data["exact"])
        ax.plot(min(1.0, max(0.0, unc)), best, "*", color=GREEN, ms=14, label=f"alpha* = {unc:.2f}", zorder=5)
        ax.axvline(data["paper_alpha"], **PAPER, label="paper's 0.5")
        ax.axhline(data["zero"], color=VIOLET, lw=1.3, ls="--", label="zero vector")
        ax.set(xlim=(-0.02, 1.02), ylim=(0, None), xlabel=_ALPHA, ylabel="E norm(g_c - mu)²")
        ax.set_title("The error is a parabola in alpha (Theorem 2, single examples)")
    return ax


def plot_window(data: Data, ax: Axes | None = None) -> Axes:
    """The error of 0.5 over that of the better part, for populations and batch sizes, over their best alpha.

    Args:
        data: Of the topic ``theorem2``.
        ax: Where to draw; a new figure when None.
    """
    points = data["window"]
    unc, ratio = np.array([(p["alpha_unc"], p["paper"] / min(p["trace"], p["empty"])) for p in points]).T
    order = ["B = 1 to 2", "B = 4 to 16", "B = 32 to 128"]
    size = [order[(p["batch_size"] > 2) + (p["batch_size"] > 16)] for p in points]
    with on(ax) as ax:
        ax.axvspan(0.25, 0.75, color=GREEN, alpha=0.12, lw=0, label="alpha_unc in (1/4, 3/4)")
        ax.axhline(1, **REST)
        apart = {"palette": [BLUE, OCHRE, VIOLET], "markers": ["o", "s", "^"], "hue_order": order, "style_order": order}
        sns.scatterplot(x=unc, y=ratio, hue=size, style=size, s=34, linewidth=0, ax=ax, **apart)
        _log(ax, "y")
        edge = max(1.0, float(np.max(np.abs(unc - 0.5))) + 0.55)
        ax.set_xlim(min(-0.05, float(unc.min()) - 0.05), min(edge, float(unc.max()) + 0.1))
        ax.set(xlabel="alpha_unc of the population and batch size", ylabel="MSE(0.5) / MSE of the better part")
        ax.set_title("When does alpha = 0.5 beat both parts? (exact)")
    return ax


def plot_batch_size(data: Data, ax: Axes | None = None) -> Axes:
    """The exact best alpha over the batch size, between its two limits, and what samples measured of it.

    Args:
        data: Of the topic ``batch_size``.
        ax: Where to draw; a new figure when None.
    """
    with on(ax, most=3) as ax:
        _curve(ax, data["curve"], "batch_size", "value", color=BLUE, label="exact alpha(1/B)")
        _measured(ax, data["points"], "batch_size")
        for name, style in (("variance_only", "--"), ("bias_only", ":")):
            ax.axhline(data[name], color=INK, lw=1.2, ls=style, label=name.replace("_", " ") + " limit")
        ax.axvline(data["paper_batch_size"], **PAPER, label=f"paper's B = {data['paper_batch_size']}")
        ax.axhline(1, color=GREEN, lw=1, alpha=0.7, label="alpha* is clipped at 1")
        ax.set_xscale("log", base=2)
        plain_ticks(ax, "x")
        ax.set(xlabel="Batch size B (examples per step)", ylabel="alpha_unc")
        ax.set_title("The best alpha depends on the batch size")
    return ax


def plot_bound(data: Data, ax: Axes | None = None) -> Axes:
    """Both sides of equation (3) by alpha, the right side in its three parts, and equation (4).

    Args:
        data: Of the topic ``theorem3``.
        ax: Where to draw; a new figure when None.
    """
    rows = data["rows"]
    names = ["alpha_k" if row["alpha"] == "alpha_k" else f"alpha = {row['alpha']}" for row in rows]
    place, floor = np.arange(len(rows)), np.zeros(len(rows))
    left, left_half, half = (
        np.array([row[k] for row in rows]) for k in ("gradient_sq", "gradient_sq_half", "bound_half")
    )
    bars: dict[str, Any] = {"width": 0.34, "zorder": 2}
    lines: dict[str, Any] = {"fmt": "none", "color": INK, "elinewidth": 2}
    with on(ax, height=3.9, most=2) as ax:
        for key, colour, label in (("descent", VIOLET, "descent term"), ("bias_sq", OCHRE, "mean norm(Bias)²"),
                                   ("noise", BLUE, "eta L Var")):  # fmt: skip
            part = np.array([row[key] for row in rows])
            ax.bar(place + 0.2, part, bottom=floor, color=colour, label=f"(3): {label}", **bars)
            floor = floor + part
        ax.bar(place - 0.2, left, color=GREEN, label="mean norm(grad L_m)²", **bars)
        ax.errorbar(place + 0.2, floor, half, **lines)
        ax.errorbar(place - 0.2, left, left_half, **lines)
        for at, row in enumerate(rows):
            ax.annotate(f"(4): {row['uniform_bound'] / left[at]:.0f}x", (at, floor[at] + half[at]), xytext=(0, 5),
                        textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
        ax.set_xticks(place, names)
        ax.grid(visible=False, axis="x")
        ax.margins(y=0.15)
        where = f"B = {data['batch_size']}, eta L = {data['eta_l']:.2f}"
        ax.set(ylabel="norm(gradient)²", xlabel=f"{where}; (4): the uniform bound over the left side")
        ax.set_title(f"Both sides of Theorem 3's bound, {data['paths']} paths of {data['steps']} steps (95%)")
    return ax


def plot_one_step(data: Data, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Expected change of the loss over alpha with both bounds, and what each criterion calls best.

    Args:
        data: Of the topic ``theorem4``.
        axes: Where to draw, one a step size; a new figure when None.
    """
    rows = {row["rho"]: row for row in data["rows"]}
    series = {"change": ("expected change (exact)", BLUE), "bound": ("bound (14)", VIOLET),
              "kept_bound": ("bound, nothing dropped", OCHRE)}  # fmt: skip
    with across(axes, len(data["curves"]), width=7.6, height=3.9, most=3) as axes:
        for ax, curve in zip(axes, data["curves"], strict=True):
            row, alpha = rows[curve["rho"]], curve["alpha"]
            for (key, (label, colour)), style in zip(series.items(), ("o-", "--", "-."), strict=True):
                ax.plot(alpha, curve[key], style, color=colour, label=label)
            for key, mark, label in (("bound", "v", "least of (14): Theorem 4"), ("kept_bound", "D", "alpha_J")):
                at = np.interp(row[key], alpha, curve[key])
                ax.plot(row[key], at, mark, color=series[key][1], ms=7, label=label, clip_on=False)
            ax.plot(row["loss"], row["change_loss"], "*", color=GREEN, ms=13, label="best for the loss", clip_on=False)
            ax.axhline(0, **REST)
            ax.set(title=f"eta L = {curve['rho']:g}", xlabel="alpha", xlim=(0, 1))
        axes[0].set_ylabel("Change of L_m in one step (nats)")
    return axes


def plot_temperature(data: Data, ax: Axes | None = None) -> Axes:
    """The bias of g_t over the temperature at which its traces were sampled.

    Args:
        data: Of the topic ``reference_point``.
        ax: Where to draw; a new figure when None.
    """
    with on(ax, height=3.2) as ax:
        _curve(
            ax, data["temperatures"], "temperature", "bias", color=BLUE, marker="o", label="norm(b_t) / norm(mu), exact"
        )
        ax.axvline(data["paper_temperature"], **PAPER, label="paper's temperature")
        ax.axhline(0, **REST)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ax.set(xlabel="Sampling temperature of the traces (theta = theta_ref)", ylabel="Bias of g_t / gradient")
        ax.set_title("g_t is unbiased at temperature 1 only")
    return ax


def plot_drift(data: Data, ax: Axes | None = None) -> Axes:
    """The bias of g_t over the distance from the reference, beside the law that it follows.

    Args:
        data: Of the topic ``drift``.
        ax: Where to draw; a new figure when None.
    """
    series = {"bias": ("norm(b_t), exact", BLUE, "o", ""), "law": ("drift law, slope 1", GREEN, "", "--"),
              "rest": ("what the law misses, slope 2", OCHRE, "s", "-.")}  # fmt: skip
    with on(ax, height=3.4) as ax:
        for key, (label, colour, marker, line) in series.items():
            _curve(ax, data["steps"], "distance", key, color=colour, marker=marker, ls=line, label=label)
        _log(ax, "x")
        ax.set(yscale="log", xlabel="Distance from theta_ref, norm(delta)", ylabel="norm of the bias")
        ax.set_title("The bias of g_t grows with the drift (one prompt and pair)")
    return ax


def plot_snis(data: Data, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """The bias of a score estimated from K traces: none of them, or one of them, from the posterior.

    Args:
        data: Of the topic ``marginal_gradient``.
        axes: Two to draw on; a new figure when None.
    """
    with across(axes, 2, width=7.6, height=3.4) as axes:
        left, right = axes
        _curve(left, data["curve"], "traces", "leading_order", color=VIOLET, ls="--", label="leading order, 1/K")
        _curve(left, data["curve"], "traces", "snis", color=OCHRE, marker="o", label="SNIS, exact")
        left.plot([], [], "s-", color=BLUE, label="anchored SNIS, exact")
        _log(left, "y")
        _curve(right, data["curve"], "traces", "anchored", color=BLUE, marker="s")
        right.set(yscale="log", ylim=(1e-17, 1e-12), ylabel="")
        for ax, title in ((left, "All traces from the prior"), (right, "One trace from the posterior")):
            ax.set_xscale("log", base=2)
            plain_ticks(ax, "x")
            ax.set(title=title, xlabel="Traces per answer, K")
        left.set_ylabel("norm(bias) / norm(S)")
    return axes


def plot_log_probability(data: Data, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Ratio of score variances against that of log p, question by question, oracle and embedded model.

    Args:
        data: Of the topic ``appendix_b``.
        axes: Where to draw, one a model; a new figure when None.
    """
    titles = {
        name: title for name, title in (("oracle", "Oracles (exact)"), ("embedded", "Embedded model")) if name in data
    }
    with across(axes, len(titles), width=3.8 * len(titles), height=3.9) as axes:
        for ax, (name, title) in zip(axes, titles.items(), strict=True):
            rows = [row for row in data[name] if min(row.values()) > 0]
            x, y = (
                np.array([row[f"{of}_thinking"] / row[f"{of}_nothinking"] for row in rows])
                for of in ("logp", "gradient")
            )
            sns.scatterplot(x=x, y=y, s=22, color=BLUE, alpha=0.8, linewidth=0, label="one question", ax=ax)
            across_, up = data[f"{name}_ratios"]["logp"], data[f"{name}_ratios"]["gradient"]
            yerr, xerr = ([[x["value"] - x["low"]], [x["high"] - x["value"]]] for x in (up, across_))
            ax.errorbar(across_["value"], up["value"], yerr, xerr, fmt="D", color=RED, ms=6, elinewidth=2.2,
                        label="ratio of averages, 95%")  # fmt: skip
            ends = [min(x.min(), y.min()), max(x.max(), y.max())]
            ax.plot(ends, ends, **REST, label="equal ratios")
            _log(ax, "x", "y")
            ax.set(title=title, xlabel="Var(log p) ratio, Thinking / NoThinking", ylabel="")
        axes[0].set_ylabel("tr Cov(score) ratio")
    return axes


def _curve(ax: Axes, points: Iterable[Data], x: str, y: str, **how: Any) -> None:
    at, height = np.array([(point[x], point[y]) for point in points]).T
    sns.lineplot(x=at, y=height, errorbar=None, markeredgewidth=0, ax=ax, **how)


def _measured(ax: Axes, points: Iterable[Data], x: str, unit: float = 1.0) -> None:
    """Measured points with two standard errors to either side."""
    rows = [
        {x: p[x], "value": p["value"] / unit}
        | {end: (p["value"] + sign * _TWO * p["standard_error"]) / unit for end, sign in (("low", -1), ("high", 1))}
        for p in points
    ]
    curves(ax, rows, x=x, ls="", marker="o", markeredgewidth=0, err_style="bars", err_kws={"elinewidth": 2.2},
           label="measured, 95%")  # fmt: skip


def _log(ax: Axes, *names: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of every decade, or at 1 alone where there are many."""
    for name in names:
        getattr(ax, f"set_{name}scale")("log")
        low, high = getattr(ax, f"get_{name}lim")()
        axis = getattr(ax, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
        axis.set_minor_formatter(NullFormatter())
    plain_ticks(ax, *names)


_FIGURES: dict[str, tuple[str, Callable[..., Any]]] = {
    "theorem1_variance": ("theorem1", plot_trace_variance),
    "theorem2_parabola": ("theorem2", plot_parabola),
    "theorem2_window": ("theorem2", plot_window),
    "batch_size": ("batch_size", plot_batch_size),
    "theorem3_bound": ("theorem3", plot_bound),
    "theorem4_step": ("theorem4", plot_one_step),
    "temperature": ("reference_point", plot_temperature),
    "drift": ("drift", plot_drift),
    "snis_bias": ("marginal_gradient", plot_snis),
    "log_probability": ("appendix_b", plot_log_probability),
}
