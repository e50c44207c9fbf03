"""Confidence intervals for squared norms of means, such as norm(b_t)^2.

The variance of ``U = norm(x-bar)^2`` (diagonal removed) has a part that grows with the norm and one that does not:

    Var U = 4 x' Sigma x / N + 2 tr(Sigma^2) / (N (N - 1)),      x = E x_i.

A standard error from the sample puts the *estimated* mean into the first part. Near x = 0 estimate and standard error
then rise and fall together, and intervals miss the truth from below. Wilson's (1927) cure for proportions works here
too: let the variance belong to the value under test. With V the squared norm of the plain sample mean, of which the
jackknife variance ``v`` is the first part's estimate,

    { theta : (U - theta)^2 <= q^2 [ v theta / V + 2 E r^2 / (N (N - 1)) ] },

an interval in closed form. ``E r^2 = tr(Sigma^2)`` comes from `bvpo_stats.statistics.interactions`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bvpo_stats.statistics.interactions import interaction_variance
from bvpo_stats.statistics.intervals import SimpleInterval, jackknife_covariance, jackknife_normal, t_quantile
from bvpo_stats.statistics.summary import Array, MomentSummary

BIAS_TRACE = {"t": 1.0, "m": -1.0}
BIAS_EMPTY = {"e": 1.0, "m": -1.0}
MARGINAL = {"m": 1.0}


def squared_norm(summary: MomentSummary, combination: Mapping[str, float], level: float = 0.95) -> SimpleInterval:
    """``norm(E sum_a w_a a)^2``, unbiased, with Wilson's interval clipped at 0 (endpoints only).

    Args:
        summary: Moments; ``m`` falls back on ``t`` at the reference point, where norm(b_t)^2 is 0.
        combination: Weight of each member, such as `BIAS_TRACE`, ``{"t": 1, "m": -1}``.
        level: Confidence level.

    Returns:
        Value, jackknife standard error and interval, arrays over the summary's leading axes. Without interactions the
        jackknife interval ``U +- t se``.
    """
    weights = np.zeros(len(summary.members))
    for member, weight in combination.items():
        weights[summary.index(member)] += weight

    def form(x: Array) -> Array:
        return np.einsum("...ab,a,b->...", x, weights, weights).sum(axis=-1)

    values = form(summary.U + (summary.shift if weights.sum() else 0))
    if summary.interactions is None:
        return jackknife_normal(values, summary.group_sizes, level, floor=0.0)
    sizes = summary.group_sizes
    n = sizes.sum(axis=-1)
    variance = jackknife_covariance(values[..., None, :], sizes)[..., 0, 0]
    plug_in = values[..., 0] + form(summary.covariance)[..., 0] / n
    second_order = 2 * interaction_variance(form(summary.interactions), sizes) / (n * (n - 1))
    low, high = wilson_ends(values[..., 0], variance, plug_in, second_order, t_quantile(level, summary.n_groups))
    return SimpleInterval(values[..., 0], np.sqrt(variance), np.maximum(low, 0.0), np.maximum(high, 0.0), level)


def wilson_ends(value: Array, variance: Array, plug_in: Array, second_order: Array, q: float) -> tuple[Array, Array]:
    """Roots of ``(U - theta)^2 = q^2 (v theta / V + w)``; the point U where nothing varies.

    >>> low, high = wilson_ends(np.array(0.0), np.array(4.0), np.array(1.0), np.array(0.0), 2.0)
    >>> float(low), float(high)
    (0.0, 16.0)
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = np.nan_to_num(q**2 * variance / plug_in, posinf=0.0, neginf=0.0)
    root = np.sqrt(np.maximum(slope**2 / 4 + slope * value + q**2 * second_order, 0.0))
    return value + slope / 2 - root, value + slope / 2 + root
