"""Intervals for shares of successes whose trials come in clusters: accuracies and win rates, and their differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from bvpo_stats.statistics.clusters import Interval, jackknife_interval

Values = Float[np.ndarray, " clusters"]


def proportion_interval(means: Values, *, trials: float = 1.0, level: float = 0.95) -> Interval:
    r"""Wilson's interval with the effective number of trials of a clustered sample.

    With p the average of the N cluster means m_i in [0, 1] and v = sum_i (m_i - p)^2 / (N (N - 1)) the variance of p,
    the sample is worth n = p (1 - p) / v independent trials, at least N - 1 and at most all that were made (N times
    ``trials``); where p is 0 or 1 nothing is seen of v, and n = N. With t the quantile of Student's t_{N-1},

        centre = (p + t^2 / 2n) / (1 + t^2 / n),   half width = t sqrt(p (1 - p) / n + t^2 / 4n^2) / (1 + t^2 / n).

    Unlike p +- t sqrt(v) it stays within [0, 1] and keeps its coverage near the ends, where benchmarks of a few dozen
    problems live.

    Args:
        means: Share of successes in each cluster (problem); all clusters count alike.
        trials: Mean number of trials behind each.
        level: Confidence level.

    Returns:
        p and its interval; no ends with a single cluster, nothing without clusters.

    Source:
        Dean and Pagano (2015), Evaluating confidence interval methods for binomial proportions in clustered surveys;
        the effective sample size is Korn and Graubard's (1998).

    >>> proportion_interval(np.array([1.0, 1.0, 0.0, 1.0]), level=0.5).value
    0.75
    """
    values = np.asarray(means, dtype=np.float64)
    count = len(values)
    if not count:
        return Interval(None, None, None)
    p = float(values.mean())
    if count < 2:
        return Interval(p, None, None)
    variance = float(values.var(ddof=1)) / count
    if p in (0.0, 1.0):
        worth = float(count)
    else:
        worth = min(count * trials, p * (1 - p) / variance if variance > 0 else np.inf)
    t = float(stats.t.ppf(0.5 + level / 2, count - 1))
    shrink = 1 + t**2 / worth
    centre = (p + t**2 / (2 * worth)) / shrink
    half = t * float(np.sqrt(p * (1 - p) / worth + t**2 / (4 * worth**2))) / shrink
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def mean_interval(values: Values, *, level: float = 0.95) -> Interval:
    """Student's interval for a mean over clusters (the jackknife's, for a mean); nothing without clusters."""
    rows = np.asarray(values, dtype=np.float64)
    return jackknife_interval(rows[:, None], lambda x: x[..., 0], level=level) if len(rows) else Interval(*[None] * 3)


def difference_interval(new: Values, old: Values, *, level: float = 0.95) -> Interval:
    """Student's interval for the mean difference of two paired series, one pair a cluster.

    The ends are None where every difference is the same: the data then say nothing of how differences vary.

    Args:
        new: Cluster means under the one treatment.
        old: Of the same clusters under the other.
        level: Confidence level.
    """
    differences = np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64)
    found = mean_interval(differences, level=level)
    return found if len(differences) and np.ptp(differences) > 0 else Interval(found.value, None, None)


def average_interval(groups: Sequence[Values], *, level: float = 0.95) -> Interval:
    """The plain average of several means, each over clusters of its own (Table 2's column Avg.).

    The groups are independent, so variances add: v = sum_b v_b / B^2 with v_b = s_b^2 / N_b, on Satterthwaite's degrees
    of freedom (sum v_b)^2 / sum v_b^2 / (N_b - 1).

    Args:
        groups: One series of cluster means (or of paired differences) per group.
        level: Confidence level.
    """
    series = [np.asarray(group, dtype=np.float64) for group in groups]
    if not series or not all(len(group) for group in series):
        return Interval(None, None, None)
    value = float(np.mean([group.mean() for group in series]))
    if min(map(len, series)) < 2:
        return Interval(value, None, None)
    variances = np.array([group.var(ddof=1) / len(group) for group in series])
    if not variances.sum() > 0:
        return Interval(value, None, None)
    freedom = variances.sum() ** 2 / np.sum(variances**2 / np.array([len(group) - 1 for group in series]))
    half = float(stats.t.ppf(0.5 + level / 2, freedom) * np.sqrt(variances.sum()) / len(series))
    return Interval(value, value - half, value + half)
