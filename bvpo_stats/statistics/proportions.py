"""Intervals over clusters: functions of averages, accuracies and win rates, and win rates freed of length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.special import expit

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


def average_interval(groups: Sequence[Float[np.ndarray, " _"]], *, level: float = 0.95) -> Interval:
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


_CELLS = 4_000_000  # of the table deletions x prompts at a time
_STEPS = 60
_LARGEST = 30.0  # log odds beyond which the maximum is at infinity


def length_controlled_rate(wins: Values, lengths: Values, *, level: float = 0.95) -> Interval:
    r"""The win rate that the model would have with answers as long as the baseline's.

    A generalised linear model of the outcome w_i in [0, 1] (1 a win, 1/2 a tie) against the length difference d_i of
    the two answers,

        P(win_i) = logistic(theta + phi tanh(d_i / s)),     s the standard deviation of the d_i,

    is fitted by maximum likelihood (the cross-entropy of w_i, so that ties count half). theta is the model's own
    advantage, phi what length buys. The length-controlled win rate is the prediction at d_i = 0, logistic(theta). This
    is the published form of AlpacaEval 2 without its third term, the difficulty of each instruction: that one was
    fitted over many models on AlpacaEval's own prompts and judge, and cannot be had from one comparison.

    The interval is by delete-one-prompt jackknife on theta (each time with s of the remaining prompts), mapped through
    the logistic function.

    Args:
        wins: Outcome of each prompt.
        lengths: Length of the model's answer minus that of the baseline's, in characters as in AlpacaEval.
        level: Confidence level.

    Returns:
        The rate and its interval. Where all answers are as long as the baseline's it is the plain win rate. Undefined
        (None) where the likelihood has no maximum: all outcomes are the same, length tells wins from losses perfectly,
        or all differences are one and the same number other than 0.

    Source:
        Dubois, Galambosi, Liang and Hashimoto (2024), Length-controlled AlpacaEval, Section 3.
    """
    every, without = _log_odds(wins, lengths)
    if not np.isfinite(every):
        return Interval(None, None, None)
    found = deleted_interval(every, without, level=level)
    low, high = (None if end is None else float(expit(end)) for end in (found.low, found.high))
    return Interval(float(expit(every)), low, high)


def length_controlled_difference(
    new: tuple[Values, Values], old: tuple[Values, Values], *, level: float = 0.95
) -> Interval:
    """Difference of two models' length-controlled win rates on the same prompts; prompts are deleted from both at once.

    Args:
        new: Wins and length differences of the one model.
        old: Of the other, prompt by prompt.
        level: Confidence level.
    """
    (new_all, new_without), (old_all, old_without) = _log_odds(*new), _log_odds(*old)
    value = float(expit(new_all) - expit(old_all))
    if not np.isfinite(value):
        return Interval(None, None, None)
    return deleted_interval(value, expit(new_without) - expit(old_without), level=level)


def _log_odds(wins: Values, lengths: Values) -> tuple[float, Values]:
    """Theta from all prompts, and without each in turn; NaN where it does not exist."""
    y, d = np.asarray(wins, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    n = len(y)
    every = float(fit_log_odds(y, d, np.ones((1, n)))[0, 0]) if n else float("nan")
    rows = max(1, _CELLS // max(1, n))
    parts = []
    for start in range(0, n, rows):
        size = min(rows, n - start)
        weights = np.ones((size, n))
        weights[np.arange(size), start + np.arange(size)] = 0.0
        parts.append(fit_log_odds(y, d, weights)[:, 0])
    return every, np.concatenate(parts) if parts else np.zeros(0)


def fit_log_odds(
    wins: Values, lengths: Values, weights: Float[np.ndarray, "fits clusters"]
) -> Float[np.ndarray, "fits 2"]:
    """Newton's method for many weighted fits at once.

    Args:
        wins: Outcomes in [0, 1].
        lengths: Length differences.
        weights: 0 or 1 for each fit and prompt.

    Returns:
        (theta, phi) of each fit; NaN where there is no maximum.
    """
    x = np.tanh(_standardised(lengths, weights))
    alike = (np.abs(x) * weights).sum(axis=1) == 0.0  # no length difference at all: only theta is left to fit
    fit = np.zeros((len(weights), 2))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for _ in range(_STEPS):
            p = expit(fit[:, :1] + fit[:, 1:] * x)
            error, curve = weights * (wins - p), weights * p * (1 - p)
            slope = np.stack([error.sum(axis=1), (error * x).sum(axis=1)], axis=1)
            a, b, c = curve.sum(axis=1), (curve * x).sum(axis=1), (curve * x * x).sum(axis=1) + alike
            step = np.stack([c * slope[:, 0] - b * slope[:, 1], a * slope[:, 1] - b * slope[:, 0]], axis=1)
            step /= (a * c - b * b)[:, None]
            step = np.clip(step, -2.0, 2.0)  # far from the maximum Newton may overshoot
            fit += step
            if np.all(~np.isfinite(step) | (np.abs(step) < 1e-12)):
                break
        lost = ~np.isfinite(fit).all(axis=1) | (np.abs(fit) > _LARGEST).any(axis=1) | (np.abs(step) > 1e-8).any(axis=1)
    fit[lost] = np.nan
    return fit


def _standardised(lengths: Values, weights: Float[np.ndarray, "fits clusters"]) -> Float[np.ndarray, "fits clusters"]:
    """Length differences over their standard deviation (n - 1) among the prompts of each fit; not centred."""
    count = weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (weights * lengths).sum(axis=1, keepdims=True) / count
        spread = np.sqrt((weights * (lengths - mean) ** 2).sum(axis=1, keepdims=True) / (count - 1))
        return np.where(lengths == 0.0, 0.0, lengths / spread)
