"""Intervals for smooth functions of averages over clusters (questions)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

Statistic = Callable[[Float[np.ndarray, "*rows features"]], Float[np.ndarray, "*rows"]]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; None where it is undefined (not estimable from these data).

    Attributes:
        value: Point estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float | None
    low: float | None
    high: float | None


def jackknife_interval(
    clusters: Float[np.ndarray, "clusters features"],
    statistic: Statistic,
    *,
    level: float = 0.95,
    positive: bool = False,
) -> Interval:
    r"""Delete-one-cluster jackknife interval for theta = f(mean over clusters of the feature vectors).

    With theta_(i) the value without cluster i, the variance estimate is
    v = (N-1)/N * sum_i (theta_(i) - mean theta_(.))^2 and the interval theta +- t_{N-1} sqrt(v). Every figure made from
    the same clusters moves together, so ratios of two modes of the same questions are paired by construction.

    Args:
        clusters: One row of features per cluster.
        statistic: f, mapping feature vectors [..., features] to values [...].
        level: Confidence level.
        positive: Work on log theta, for ratios and other positive quantities: the interval is then theta * exp(+-...),
            never negative, and closer to its level where theta is skewed.

    Returns:
        The plug-in value and its interval; the ends are None with a single cluster or where f is not finite.

    Source:
        Efron and Stein (1981), The jackknife estimate of variance.

    >>> rows = np.array([[2.0, 1.0], [4.0, 2.0], [6.0, 3.0]])
    >>> jackknife_interval(rows, lambda x: x[..., 0] / x[..., 1])
    Interval(value=2.0, low=2.0, high=2.0)
    """
    rows = np.asarray(clusters, dtype=np.float64)
    n = rows.shape[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(rows.mean(axis=0)))
        if not np.isfinite(value):
            return Interval(None, None, None)
        if n < 2:
            return Interval(value, None, None)
        without = np.asarray(statistic((rows.sum(axis=0) - rows) / (n - 1)))
        if not positive:
            return deleted_interval(value, without, level=level)
        found = deleted_interval(float(np.log(value)), np.log(without), level=level)
    if found.low is None or found.high is None:
        return Interval(value, None, None)
    return Interval(value, float(np.exp(found.low)), float(np.exp(found.high)))


def deleted_interval(value: float, without: Float[np.ndarray, " clusters"], *, level: float = 0.95) -> Interval:
    """The delete-one-cluster jackknife interval of any estimate, from its values without each cluster in turn.

    Args:
        value: The estimate from all clusters.
        without: theta_(i), the estimate without cluster i.
        level: Confidence level.

    Returns:
        theta +- t_{N-1} sqrt(v) with v as in :func:`jackknife_interval`; no ends where a value is not finite or there
        are fewer than two clusters.
    """
    n = len(without)
    if n < 2 or not np.isfinite(without).all():
        return Interval(value, None, None)
    spread = np.sqrt((n - 1) / n * np.sum((without - without.mean()) ** 2))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * spread)
    return Interval(value, value - half, value + half)
