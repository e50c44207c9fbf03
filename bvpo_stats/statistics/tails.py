r"""Means, and ratios of means, where a few clusters hold most of the sum: variances of single questions above all.

A mean of variances over questions is ruled by the few questions that vary most. Where their spread is log-normal with a
standard deviation of 2 in the log (a scale of sd 1), the usual jackknife interval of 200 questions covers the truth in
80% of samples, and misses on the low side: samples that lack the rare large value have both a small mean and a small
standard error. No reweighting of what was seen can mend that (the bootstrap-t gains 4 points); what is missing has to
be extrapolated. The interval here is the hull of two, both on the log scale:

- **the sample's own**: log theta +- t se by leaving clusters out, with the degrees of freedom that the kurtosis of the
  influences leaves to the standard error, 2 N / (N / n_eff - 1) (N for normal ones; Satterthwaite);
- **the tail's**: values above a cut come from a log-normal distribution, fitted by maximum likelihood with all values
  below the cut censored; below it the sample speaks for itself. So small variances, of which any number may be near
  zero, have no say in how large the largest are. The cut is at 40% of the positive values; it rises to 60 and 80% where
  the fit promises larger values than were seen (the largest would be that small in fewer than 1 in 100 samples).

What that covers, and what it costs, is measured in ``benchmarks/tails.md``. Where tails are power laws without a
variance nothing covers; `TailInterval.few` says where few clusters rule.

Sources: Olsen (1978) for the likelihood, which is concave in (mu / sigma, 1 / sigma); Satterthwaite (1946).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.special import digamma, log_ndtr, ndtr

from bvpo_stats.errors import UserError, check_level
from bvpo_stats.statistics.moments import Array
from bvpo_stats.statistics.proportions import Interval, Values, jackknife_interval

CUTS = (0.4, 0.6, 0.8)
"""Shares of the positive values that the fit of the tail leaves out, tried in turn."""
FEW = 5.0
"""n_eff below which few clusters rule (see `few_limit`)."""
_LARGEST_SEEN = 0.01  # a fit is given up where the largest value seen would be so small in fewer samples than this
_LEAST_ABOVE = 5  # values that a fit of two parameters needs
_STEPS = 60


@dataclass(frozen=True)
class TailInterval(Interval):
    """An interval with what it rests on.

    Attributes:
        n_eff: Effective number of clusters, ``(sum d^2)^2 / sum d^4`` over the changes d that leaving one out makes.
        largest_share: Share of sum d^2 of the one cluster that matters most.
        few: Whether few clusters rule (`few_limit`): the interval then leans on the log-normal tail, which the sample
            cannot confirm.
    """

    n_eff: float | None = None
    largest_share: float | None = None
    few: bool = False


def effective_number(squares: Array) -> tuple[Array, Array]:
    """How many clusters an estimate rests on, and the largest one's share of its variance.

    With psi_i the influence of cluster i (its centred pseudo-value) and p_i = psi_i^2 / sum psi^2,

        n_eff = 1 / sum p_i^2 = (sum psi^2)^2 / sum psi^4,      share = max p_i.

    N where all matter alike, about N / 3 where the influences are normal, near 1 where one cluster rules: then the
    sample says as little about the spread of the estimate as one observation would, and an interval means little.

    Args:
        squares: ``[..., G]``, psi_i^2, or any multiple of the parts that the clusters have in a variance.

    Returns:
        n_eff and the share, ``[...]`` each. Where nothing varies (all zero) all clusters matter alike; NaN where a
        square is not finite or there is none.

    Source:
        Kish's (1965) effective sample size, with the squared influences as weights.

    >>> [x.tolist() for x in effective_number(np.array([[4.0, 4.0, 4.0, 4.0], [4.0, 0.0, 0.0, 0.0]]))]
    [[4.0, 1.0], [0.25, 1.0]]
    """
    values = np.asarray(squares, dtype=np.float64)
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan), np.full(values.shape[:-1], np.nan)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        largest = values.max(axis=-1, keepdims=True)
        relative = np.where(largest == 0, 1.0, values / largest)  # of the largest, so that no square overflows
        total = relative.sum(axis=-1)
        return total**2 / (relative**2).sum(axis=-1), 1 / total


def few_limit(clusters: int) -> float:
    """n_eff below which few clusters rule: 5; a tenth of the clusters where that is less, but no less than 1.5."""
    return min(FEW, max(1.5, clusters / 10))


def tail_interval(above: Values, below: Values | None = None, *, level: float = 0.95) -> TailInterval:
    """Interval of a mean over clusters, or of a ratio of two means, of values that are at least zero.

    Args:
        above: One value a cluster, such as a question's variance.
        below: Of the same clusters in the same order, for the ratio mean(above) / mean(below).
        level: Confidence level.

    Returns:
        The plain value and its interval. No value where a value or the ratio is not finite; no ends where the sample
        does not say how clusters differ: fewer than two, all alike, or one that holds the whole mean.

    Raises:
        UserError: A negative value.

    >>> found = tail_interval(np.array([1.0, 2.0, 4.0, 1.0, 3.0]))
    >>> found.value, round(found.low, 2), round(found.high, 2), round(found.n_eff, 1)
    (2.2, 1.03, 4.71, 2.9)
    """
    check_level(level)
    columns = [np.asarray(values, dtype=np.float64)[None] for values in (above, below) if values is not None]
    if any((values < 0).any() for values in columns):
        raise UserError("a mean over clusters was asked for on the log scale, but a value is negative.")
    if not columns[0].size or not all(np.isfinite(values).all() for values in columns):
        return TailInterval(None, None, None)
    means = [float(values.mean()) for values in columns]
    if len(means) == 2 and means[1] == 0:
        return TailInterval(None, None, None)
    value = means[0] / means[1] if len(means) == 2 else means[0]
    low, high, n_eff, share = (float(x[0]) for x in log_ends(*columns, level=level))
    if not (np.isfinite(low) and high < 700):  # e^700 is past what a float holds
        return TailInterval(value, None, None)
    few = n_eff < few_limit(columns[0].shape[1])
    return TailInterval(value, float(np.exp(low)), float(np.exp(high)), n_eff, share, few)


def unseen_mean(values: Array, level: float = 0.95) -> Array:
    """How far the mean over clusters may lie above the sample's, beyond what light tails allow, relative to the latter.

    The upper end of the interval for heavy tails (`log_ends`, of what values have above the least of them) less that
    for an exponential law of the same variance, ``mean + sd (q / sqrt(N) + q^2 / 2 N)`` with Student's q: 0 or little
    where values scatter as sums of squares do.

    Args:
        values: At least zero, ``[..., P]``.
        level: Confidence level.

    Returns:
        ``[...]``, at least 0; 0 where all are alike or a value is not finite.

    >>> even, one = np.tile([1.0, 2.0], 20), np.append(np.arange(1.0, 40.0), 500.0)
    >>> unseen_mean(np.stack([even, one])).round(2).tolist()
    [0.0, 4.75]
    """
    rows = np.reshape(values, (-1, values.shape[-1]))
    n = rows.shape[-1]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        above = rows / rows.mean(axis=-1, keepdims=True)
        spread = above.std(axis=-1, ddof=1) if n > 1 else np.zeros(len(rows))
        above = above - above.min(axis=-1, keepdims=True)
        centre = above.mean(axis=-1, keepdims=True)
        known = np.isfinite(above).all(axis=-1) & (centre[:, 0] > 1e-12)  # rounding is no spread
        high = np.full(len(rows), np.nan)
        high[known] = np.exp(np.minimum(log_ends((above / centre)[known], level=level)[1], 50.0))
        q = stats.t.ppf(0.5 + level / 2, max(n - 1, 1))
        beyond = (high - 1) * centre[:, 0] - spread * (q / np.sqrt(n) + q**2 / (2 * n))
    return np.maximum(np.nan_to_num(beyond), 0.0).reshape(values.shape[:-1])


def log_ends(
    above: Float[np.ndarray, "samples clusters"],
    below: Float[np.ndarray, "samples clusters"] | None = None,
    *,
    level: float = 0.95,
) -> tuple[Array, Array, Array, Array]:
    """Ends of the interval on the log scale, n_eff and largest share, of many samples at once; NaN where unknown."""
    count, n = above.shape
    if n < 2:
        return np.full(count, np.nan), np.full(count, np.nan), np.full(count, np.nan), np.full(count, np.nan)
    with np.errstate(all="ignore"):
        value, without, centre, influence = _logs(above)
        if below is not None:
            value, without, centre, influence = (
                one - other for one, other in zip((value, without, centre, influence), _logs(below), strict=True)
            )
        changes = without - without.mean(axis=1, keepdims=True)
        alike = np.abs(changes).max(axis=1) <= 1e-13 * n  # rounding is no spread
        n_eff, share = effective_number(changes**2)
        low, high = _studentised(value, changes * (n - 1), n_eff, level)
        tail_low, tail_high = _studentised(centre, influence, effective_number(influence**2)[0], level)
    known = ~alike & np.isfinite(low) & np.isfinite(high)
    tail = known & np.isfinite(tail_low) & np.isfinite(tail_high)
    low, high = np.where(tail, np.minimum(low, tail_low), low), np.where(tail, np.maximum(high, tail_high), high)
    low, high, n_eff, share = (np.where(known, x, np.nan) for x in (low, high, n_eff, share))
    return low, high, n_eff, share


def _logs(values: Float[np.ndarray, "samples clusters"]) -> tuple[Array, Array, Array, Array]:
    """Of the log of the mean: its value, without each cluster, by the tail's fit, and the influences on that."""
    mean, influence = tail_mean(values)
    # the others are summed, not subtracted: one value may hold all digits of the sum
    without = np.log(_sums_without(values)) - np.log(values.shape[1] - 1)
    return np.log(values.mean(axis=1)), without, np.log(mean), influence / mean[:, None]


def _sums_without(values: Float[np.ndarray, "samples clusters"]) -> Float[np.ndarray, "samples clusters"]:
    """Sum of all others, for each."""
    zero = np.zeros((len(values), 1))
    before = np.cumsum(np.concatenate([zero, values[:, :-1]], axis=1), axis=1)
    after = np.cumsum(np.concatenate([zero, values[:, :0:-1]], axis=1), axis=1)[:, ::-1]
    return before + after


def _studentised(value: Array, influence: Array, n_eff: Array, level: float) -> tuple[Array, Array]:
    """``value +- t sqrt(sum psi^2 / N (N - 1))`` with the degrees of freedom that the kurtosis N / n_eff leaves."""
    n = influence.shape[1]
    freedom = np.clip(2 * n / np.maximum(n / n_eff - 1, 1e-9), 1, n - 1)
    half = stats.t.ppf(0.5 + level / 2, freedom) * np.sqrt((influence**2).sum(axis=1) / (n * (n - 1)))
    return value - half, value + half


def tail_mean(values: Float[np.ndarray, "samples clusters"]) -> tuple[Array, Array]:
    """Mean with a log-normal tail above a cut, and each cluster's influence on it; NaN where no fit will do.

    Args:
        values: At least zero, ``[R, N]``.

    Returns:
        ``[R]``, ``[R, N]``.
    """
    mean, influence = np.full(len(values), np.nan), np.full(values.shape, np.nan)
    for cut in CUTS:
        open_ = np.flatnonzero(np.isnan(mean))
        if len(open_):
            mean[open_], influence[open_] = _tail_mean(values[open_], cut)
    return mean, influence


def _tail_mean(values: Float[np.ndarray, "samples clusters"], cut: float) -> tuple[Array, Array]:
    n = values.shape[1]
    positive = values > 0
    present = positive.sum(axis=1)
    with np.errstate(all="ignore"):
        logs = np.log(values)
        place = (n - present) + np.floor(cut * present).astype(int) - 1
        limit = np.take_along_axis(np.sort(logs, axis=1), np.clip(place, 0, n - 1)[:, None], axis=1)[:, 0]
        seen = logs > limit[:, None]
        n_seen = seen.sum(axis=1).astype(np.float64)
        kept = np.where(seen, logs, 0.0)
        centre = kept.sum(axis=1) / n_seen
        unit = np.sqrt(np.where(seen, (logs - centre[:, None]) ** 2, 0.0).sum(axis=1) / n_seen)
        # in units of the values above the cut: mu = centre + unit * shift / rate, sigma = unit / rate
        x = np.where(seen, (logs - centre[:, None]) / unit[:, None], 0.0)
        c, n_below = (limit - centre) / unit, present - n_seen
        shift, rate, curvature = _censored_normal((x**2).sum(axis=1), n_seen, c, n_below)
        mills = _mills(rate * c - shift)
        sigma, mu = unit / rate, centre + unit * shift / rate

        # influence on (shift, rate): the inverse curvature times each cluster's score
        rest = np.where(seen, rate[:, None] * x - shift[:, None], 0.0)
        censored = positive & ~seen
        of_shift = rest - censored * mills[:, None]
        of_rate = np.where(seen, 1 / rate[:, None] - rest * x, 0.0) + censored * (mills * c)[:, None]
        dd, dr, rr = (entry[:, None] for entry in curvature)
        to_shift, to_rate = ((n * entry / (dd * rr - dr**2)) for entry in (rr * of_shift - dr * of_rate,
                                                                          dd * of_rate - dr * of_shift))  # fmt: skip
        to_sigma = -(unit / rate**2)[:, None] * to_rate
        to_mu = unit[:, None] * (to_shift / rate[:, None] - (shift / rate**2)[:, None] * to_rate)

        # E[V; V above the cut] = exp(mu + sigma^2 / 2) Phi((mu - limit) / sigma + sigma)
        argument = (mu - limit) / sigma + sigma
        whole = np.exp(mu + sigma**2 / 2)
        upper, slope = whole * ndtr(argument), whole * np.exp(-(argument**2) / 2) / np.sqrt(2 * np.pi)
        below = np.where(seen, 0.0, values)
        share = present / n
        mean = below.mean(axis=1) + share * upper
        by_mu, by_sigma = upper + slope / sigma, upper * sigma + slope * (1 - (mu - limit) / sigma**2)
        influence = (
            (below - below.mean(axis=1, keepdims=True))
            + (positive - share[:, None]) * upper[:, None]
            + share[:, None] * (by_mu[:, None] * to_mu + by_sigma[:, None] * to_sigma)
        )
        largest = (logs.max(axis=1) - mu) / sigma
        fits = (n_seen >= _LEAST_ABOVE) & (unit > 1e-9) & (present * log_ndtr(largest) >= np.log(_LARGEST_SEEN))
        fits &= np.isfinite(mean) & np.isfinite(influence).all(axis=1)
    return np.where(fits, mean, np.nan), np.where(fits[:, None], influence, np.nan)


def _mills(z: Array) -> Array:
    """phi(z) / Phi(z)."""
    return np.exp(-(z**2) / 2 - 0.5 * np.log(2 * np.pi) - log_ndtr(z))


def _censored_normal(squares: Array, n_seen: Array, c: Array, n_below: Array) -> tuple[Array, Array, list[Array]]:
    """Maximum likelihood of a normal sample whose values below c were only counted; those seen have mean zero.

    In delta = mu / sigma and theta = 1 / sigma the log-likelihood

        n log theta - sum (theta x_i - delta)^2 / 2 + m log Phi(theta c - delta)

    is concave (Olsen 1978), so that Newton's method finds its maximum.

    Args:
        squares: ``sum x_i^2``.
        n_seen: Number of values seen.
        c: Where they were cut.
        n_below: Number of values below.

    Returns:
        delta, theta, and the curvature's entries (delta delta, delta theta, theta theta); NaN without a maximum.
    """
    delta, theta = np.full(len(c), -1.0), np.full(len(c), 0.7)
    step = np.full((2, len(c)), np.inf)
    curvature: list[Array] = []
    for _ in range(_STEPS):
        z = theta * c - delta
        mills = _mills(z)
        bend = n_below * mills * (mills + z)
        slopes = (-n_seen * delta - n_below * mills, n_seen / theta - theta * squares + n_below * mills * c)
        curvature = [n_seen + bend, -bend * c, n_seen / theta**2 + squares + bend * c**2]
        dd, dr, rr = curvature
        step = np.stack([rr * slopes[0] - dr * slopes[1], dd * slopes[1] - dr * slopes[0]]) / (dd * rr - dr**2)
        step *= np.minimum(1.0, 0.5 * theta / np.abs(step[1]))  # theta stays positive
        if not (np.abs(step) > 1e-10).any():
            break
        delta, theta = delta + step[0], theta + step[1]
    lost = ~(np.abs(step).max(axis=0) < 1e-6)
    return np.where(lost, np.nan, delta), np.where(lost, np.nan, theta), curvature


def geometric_ratio(
    above: Values, below: Values, responses: tuple[Values, Values], *, level: float = 0.95
) -> tuple[TailInterval, int]:
    r"""Ratio of the geometric means of per-question variances, above / below: how a typical question changes.

    No question rules a mean of logs. The log of a variance from k responses lies low on average: by
    psi((k - 1) / 2) - log((k - 1) / 2) (-0.27 with five) where responses are normal, which is taken off, and by about
    another kappa / 2k where they have excess kurtosis kappa. With as many responses above as below either cancels where
    both have the same shape.

    Args:
        above: A variance for each question.
        below: Of the same questions.
        responses: Behind each of them, ``(above, below)``; at least two.
        level: Confidence level.

    Returns:
        The ratio with its paired Student interval on the log scale, and how many questions had to be left out because
        all their responses were alike on either side: their log is not finite.

    Source:
        Bartlett and Kendall (1946), The statistical analysis of variance-heterogeneity and the logarithmic
        transformation.
    """
    kept = (above > 0) & (below > 0)
    left_out = int(len(kept) - kept.sum())
    if not kept.any():
        return TailInterval(None, None, None), left_out
    half = [(np.asarray(count, dtype=np.float64)[kept] - 1) / 2 for count in responses]
    logs = [np.log(values[kept]) - digamma(k) + np.log(k) for values, k in zip((above, below), half, strict=True)]
    differences = logs[0] - logs[1]
    found = jackknife_interval(differences[:, None], lambda x: x[..., 0], level=level)
    value, low, high = (None if end is None else float(np.exp(end)) for end in (found.value, found.low, found.high))
    if low is None or not np.ptp(differences) > 1e-12 * np.abs(differences).max():
        return TailInterval(value, None, None), left_out
    n_eff, share = (float(x) for x in effective_number((differences - differences.mean()) ** 2))
    return TailInterval(value, low, high, n_eff, share, n_eff < few_limit(len(differences))), left_out


def top_share(values: Values, part: float = 0.05) -> float | None:
    """Share of a sum that its largest values hold, the ``part`` of them rounded up; None where all are zero.

    >>> top_share(np.array([1.0, 1.0, 2.0, 16.0]))
    0.8
    """
    total = float(np.sum(values))
    count = int(np.ceil(part * len(values)))
    return float(np.sort(values)[-count:].sum()) / total if total > 0 and count else None


def even_top_share(responses: float, part: float = 0.05) -> float:
    """What `top_share` tends to where all questions have one variance, estimated from so many normal responses each.

    The estimates are chi^2 with k - 1 degrees of freedom, and E[chi^2_f; chi^2_f > q] = f P(chi^2_{f+2} > q).

    >>> round(even_top_share(5), 3), round(even_top_share(1000), 3)
    (0.148, 0.055)
    """
    freedom = responses - 1
    return float(stats.chi2.sf(stats.chi2.ppf(1 - part, freedom), freedom + 2))
