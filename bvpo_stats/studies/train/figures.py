"""Figures of a training run: loss, reward margins, and alpha with its interval."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from bvpo_stats.studies.style import BLUE, GREEN, OCHRE, PAPER, curves, draw_files, on
from bvpo_stats.studies.train.report import TrainReport

_SERIES = {"": "all pairs, as the loss weighs them", "trace/": "D_t, with traces", "empty/": "D_e, empty trace"}
_COLOURS = dict(zip(_SERIES.values(), (GREEN, BLUE, OCHRE), strict=True))


def draw(report: TrainReport, folder: Path) -> list[Path]:
    """Draws loss and reward margins, and alpha where it changes."""
    plots = {"loss": plot_loss, "reward_margins": plot_margins} if report.history else {}
    if plots and (report.alpha["updates"] or len({point["alpha"] for point in report.alpha["trajectory"]}) > 1):
        plots["alpha"] = plot_alpha
    return draw_files(folder, {name: partial(plot, report) for name, plot in plots.items()})


def plot_loss(report: TrainReport, ax: Axes | None = None) -> Axes:
    """The loss of D_t, of D_e, and as they are weighed, over the steps.

    Args:
        report: Of a training run.
        ax: Where to draw; a new figure when None.
    """
    return _metric(report, "loss", "Loss (nats)", ax)


def plot_margins(report: TrainReport, ax: Axes | None = None) -> Axes:
    """The reward margin of D_t, of D_e, and as they are weighed, over the steps.

    Args:
        report: Of a training run.
        ax: Where to draw; a new figure when None.
    """
    return _metric(report, "rewards/margins", "Reward margin, chosen - rejected", ax)


def _metric(report: TrainReport, name: str, label: str, ax: Axes | None) -> Axes:
    shown = {prefix: words for prefix, words in _SERIES.items() if any(prefix + name in row for row in report.history)}
    if len(shown) == 2:  # one set alone: the weighted series is that set's
        del shown[""]
    rows = [
        {"step": row["step"], "value": row.get(prefix + name), "low": None, "high": None, "set": words}
        for prefix, words in shown.items()
        for row in report.history
    ]
    method = {"dpo": "DPO", "simpo": "SimPO"}.get(report.method) or f"BVPO, alpha {report.alpha['setting']}"
    with on(ax) as ax:
        curves(ax, rows, x="step", hue="set", palette=_COLOURS)
        ax.set(xlabel="Optimizer step", ylabel=label)
        ax.set_title(f"{label.partition(' (')[0].partition(',')[0]} during training ({method})")
    return ax


def plot_alpha(report: TrainReport, ax: Axes | None = None) -> Axes:
    """The alpha in use over the steps, and the interval of what it was estimated from.

    Args:
        report: Of a training run whose alpha changes.
        ax: Where to draw; a new figure when None.
    """
    alpha, points = report.alpha, report.alpha["trajectory"]
    with on(ax, height=4.0, most=3) as ax:
        if any(point["low"] is not None for point in points):
            band = [{**point, "value": None} for point in points]
            curves(ax, band, x="step", color=GREEN)
            what = "start" if alpha["rule"] == "rising" else "estimate"
            ax.plot([], [], color=GREEN, alpha=0.3, lw=7, label=f"{alpha['level']:.0%} interval of the {what}")
        ax.step(
            [p["step"] for p in points], [p["alpha"] for p in points], where="mid", color=BLUE, label="alpha in use"
        )
        if alpha["setting"] == "adaptive":
            ax.axhline(alpha["prior"], **PAPER, label=f"prior {alpha['prior']:g}")
        ax.set(ylim=(-0.02, 1.02), xlabel="Optimizer step", ylabel="alpha (0: D_e, 1: D_t alone)")
        ax.set_title(f"alpha during training, B = {report.batch_size}")
    return ax
