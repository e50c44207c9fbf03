"""Figures of a training run: loss, reward margins, and alpha with its interval."""

from __future__ import annotations

from pathlib import Path

from bvpo_stats.studies.style import BLUE, GREEN, OCHRE, RED, band, figure, legend_below, numbers
from bvpo_stats.studies.train.report import TrainReport

_SERIES = (("", "all pairs, as the loss weighs them", GREEN, "-"), ("trace/", "D_t, with traces", BLUE, "--"),
           ("empty/", "D_e, empty trace", OCHRE, ":"))  # fmt: skip


def draw(report: TrainReport, folder: Path) -> list[Path]:
    """Draws loss and reward margins, and alpha where it changes."""
    if not report.history:
        return []
    _metric(report, "loss", "Loss (nats)", folder / "loss.png")
    _metric(report, "rewards/margins", "Reward margin, chosen - rejected", folder / "reward_margins.png")
    paths = [folder / "loss.png", folder / "reward_margins.png"]
    if report.alpha["updates"] or len({point["alpha"] for point in report.alpha["trajectory"]}) > 1:
        _alpha(report, folder / "alpha.png")
        paths.append(folder / "alpha.png")
    return paths


def _metric(report: TrainReport, name: str, label: str, path: Path) -> None:
    history = report.history
    steps = [entry["step"] for entry in history]
    with figure(path) as (_, axes):
        shown = [entry for entry in _SERIES if any(entry[0] + name in row for row in history)]
        if len(shown) == 2:  # one set alone: the weighted series is that set's
            shown = shown[1:]
        for prefix, words, colour, line in shown:
            axes.plot(steps, numbers([row.get(prefix + name) for row in history]), line, color=colour, lw=1.6,
                      label=words)  # fmt: skip
        axes.set_xlabel("Optimizer step")
        axes.set_ylabel(label)
        axes.set_title(f"{label.partition(' (')[0].partition(',')[0]} during training ({_name(report)})")
        legend_below(axes)


def _alpha(report: TrainReport, path: Path) -> None:
    alpha = report.alpha
    points = alpha["trajectory"]
    steps = [point["step"] for point in points]
    with figure(path, height=4.0) as (_, axes):
        if any(point["low"] is not None for point in points):
            low, high = (numbers([point[end] for point in points]) for end in ("low", "high"))
            band(axes, steps, low, high, colour=GREEN)
            axes.plot(
                [],
                [],
                color=GREEN,
                alpha=0.35,
                lw=7,
                label=f"{alpha['level']:.0%} interval of the {'start' if alpha['rule'] == 'rising' else 'estimate'}",
            )
        axes.step(steps, numbers([point["alpha"] for point in points]), where="mid", color=BLUE, lw=1.8,
                  label="alpha in use")  # fmt: skip
        if alpha["setting"] == "adaptive":
            axes.axhline(alpha["prior"], color=RED, lw=1.2, ls="-.", label=f"prior {alpha['prior']:g}")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("Optimizer step")
        axes.set_ylabel("alpha (0: D_e, 1: D_t alone)")
        axes.set_title(f"alpha during training, B = {report.batch_size}")
        legend_below(axes, most=2)


def _name(report: TrainReport) -> str:
    method = {"dpo": "DPO", "simpo": "SimPO"}.get(report.method)
    return method or f"BVPO, alpha {report.alpha['setting']}"
