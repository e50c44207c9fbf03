"""From trajectories to results: means over seeds, paired differences, Theorem 3's bound, and the two goals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from bvpo_stats.statistics.moments import Array
from bvpo_stats.statistics.proportions import Interval, jackknife_interval

PAPER = "alpha = 0.5"
ESTIMATED = "adaptive"
GAIN = 0.9
"""The goal: at most this share of the paper's mean squared gradient."""

_CURVE_POINTS = 75


def summary(rows: Iterable[dict[str, Any]], level: float, steps: int) -> list[dict[str, Any]]:
    """Results by step size.

    Args:
        rows: One a trajectory, as `bvpo_stats.lab.oracle_training.loop.train` gives them, with ``eta_l``, ``eta``,
            ``method`` and ``seed``.
        level: Confidence level of the intervals over seeds.
        steps: Steps of a trajectory.

    Returns:
        For each step size the table of methods and, where there are the methods for it, the comparison of the estimated
        alpha with the best fixed one and with the paper's.
    """
    cells: dict[float, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        cells.setdefault(row["eta_l"], {}).setdefault(row["method"], []).append(row)
    return [_step_size(eta_l, methods, level, steps) for eta_l, methods in cells.items()]


def _step_size(eta_l: float, methods: dict[str, list[dict[str, Any]]], level: float, steps: int) -> dict[str, Any]:
    table = {name: _method(rows, level, steps) for name, rows in methods.items()}
    found = {"eta_l": eta_l, "eta": next(iter(methods.values()))[0]["eta"], "methods": table}
    fixed = [name for name in methods if name.startswith("alpha = ")]
    if ESTIMATED not in methods or PAPER not in methods:
        return found
    best = min(fixed, key=lambda name: table[name]["grad_sq"]["value"])
    found["best_fixed"] = best
    found["comparisons"] = {
        name: {
            "minus_best_fixed": asdict(_difference(methods[name], methods[best], level)),
            "over_paper": asdict(_ratio(methods[name], methods[PAPER], level)),
        }
        for name in methods
    }
    ours = found["comparisons"][ESTIMATED]
    found["at_or_below_best_fixed"] = _at_or_below(ours["minus_best_fixed"])
    found["ten_percent_below_paper"] = ours["over_paper"]["value"] <= GAIN
    return found


def _method(rows: list[dict[str, Any]], level: float, steps: int) -> dict[str, Any]:
    values = {name: np.array([row[name] for row in rows]) for name, value in rows[0].items() if _is_number(value)}
    eta = rows[0]["eta"]
    progress = 2 * (values["loss_start"] - values["loss_end"]) / (steps * eta)
    bound = progress + values["bias_sq"] + eta * values["smoothness"] * values["variance"]
    thin = np.unique(np.linspace(0, steps - 1, min(steps, _CURVE_POINTS)).round().astype(int))
    alphas = np.array([row["alpha_curve"] for row in rows])[:, thin]
    return {
        "grad_sq": asdict(_mean(values["grad_sq"], level)),
        "loss_end": asdict(_mean(values["loss_end"], level)),
        "bound": asdict(_mean(bound, level)),
        "bias_sq": float(values["bias_sq"].mean()),
        "variance": float(values["variance"].mean()),
        "smoothness": float(values["smoothness"].mean()),
        "smoothness_mean": float(values["smoothness_mean"].mean()),
        "noise_curvature": float(values["noise_curvature"].mean()),
        "alpha": float(values["alpha"].mean()),
        "held": float(values["held"].mean()),
        "curves": {
            "step": thin.tolist(),
            "grad_sq": np.array([row["grad_sq_curve"] for row in rows])[:, thin].mean(axis=0).tolist(),
            "alpha": alphas.mean(axis=0).tolist(),
            "alpha_low": alphas.min(axis=0).tolist(),
            "alpha_high": alphas.max(axis=0).tolist(),
        },
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mean(values: Array, level: float) -> Interval:
    return jackknife_interval(values[:, None], lambda x: x[..., 0], level=level)


def _difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], level: float) -> Interval:
    """Mean difference over seeds that share their data."""
    return _mean(_paired(ours)[:, 0] - _paired(theirs)[:, 0], level)


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], level: float) -> Interval:
    both = np.concatenate([_paired(ours), _paired(theirs)], axis=1)
    return jackknife_interval(both, lambda x: x[..., 0] / x[..., 1], level=level, positive=True)


def _paired(rows: list[dict[str, Any]]) -> Array:
    return np.array([[row["grad_sq"]] for row in sorted(rows, key=lambda row: row["seed"])])


def _at_or_below(difference: dict[str, float]) -> bool:
    """Not significantly above: the interval of the paired difference reaches zero or lies below it."""
    return difference["low"] <= 0
