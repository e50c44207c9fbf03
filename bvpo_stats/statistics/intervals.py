"""Confidence intervals for ratios and sums of U-statistics: the jackknife and Fieller's set.

The bootstrap is absent on purpose: resampled duplicates put the products ``a_i . b_i`` back that U leaves out, so its
intervals cover too little. The jackknife leaves examples out and keeps U unbiased.

Methods for ratios: ``fieller`` (default) and ``hall`` (its hull with the set corrected for skewness, the cautious
choice under heavy tails). Where the interactions of the groups are known, ``fieller`` takes account of the dependence
between a U-statistic and its own standard error (see `bvpo_stats.statistics.calibration`): without that it covers too
often at intermediate noise scales and too rarely at small ones.

**Squared norms of means**, such as norm(b_t)^2. The variance of ``U = norm(x-bar)^2`` (diagonal removed) has a part
that grows with the norm and one that does not:

    Var U = 4 x' Sigma x / N + 2 tr(Sigma^2) / (N (N - 1)),      x = E x_i.

A standard error from the sample puts the *estimated* mean into the first part. Near x = 0 estimate and standard error
then rise and fall together, and intervals miss the truth from below. Wilson's (1927) cure for proportions works here
too: let the variance belong to the value under test. With V the squared norm of the plain sample mean, of which the
jackknife variance ``v`` is the first part's estimate,

    { theta : (U - theta)^2 <= q^2 [ v theta / V + 2 E r^2 / (N (N - 1)) ] },

an interval in closed form. ``E r^2 = tr(Sigma^2)`` comes from the interactions.

Sources: Fieller (1954) for the set; Busing, Meijer and van der Leeden (1999) for the delete-a-group jackknife with
groups of unequal size; Shao and Wu (1989) for its validity; Helmers (1991) and Hall (1992) for the corrections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bvpo_stats.errors import UserError, check_number
from bvpo_stats.statistics.calibration import (
    MIN_GROUPS,
    DifferenceSecondOrder,
    DifferenceSkew,
    Mask,
    corrected_ends,
    interaction_variance,
    search_ends,
    shrunk,
    undo_interaction,
)
from bvpo_stats.statistics.moments import Array, MomentSummary

Method = Literal["fieller", "hall"]

BOUNDED, COMPLEMENT, WHOLE_LINE = 0, 1, 2
"""Shapes of Fieller's set: ``[low, high]``; ``(-inf, low] or [high, inf)``; every real number."""


def t_quantile(level: float, n_groups: int) -> float:
    """Two-sided Student quantile with ``n_groups - 1`` degrees of freedom (N - 1 where every prompt is a group)."""
    check_number("level", level)
    if not 0 < level < 1:
        raise UserError(f"the confidence level must lie between 0 and 1, got {level}; 0.95 is usual.")
    return float(stats.t.ppf(0.5 + level / 2, n_groups - 1))


def jackknife_covariance(values: Array, group_sizes: Array) -> Array:
    """Covariance matrix of k statistics by leaving groups out.

    With N examples, ``h_g = N / n_g`` and ``theta_g`` the statistic without group g, the pseudo-values are
    ``h_g theta - (h_g - 1) theta_g``, their centre ``G theta - sum_g (1 - n_g / N) theta_g``, and

        v = (1 / G) sum_g (pseudo_g - centre)^2 / (h_g - 1),

    which for equal groups is the familiar ``(G - 1) / G sum_g (theta_g - mean)^2`` and for a mean is exactly unbiased.

    Args:
        values: ``[..., k, 1 + G]``, whole sample first.
        group_sizes: ``[..., G]``.

    Returns:
        ``[..., k, k]``.
    """
    deviation, weight = _pseudo_deviations(values, group_sizes)
    return np.einsum("...kg,...lg,...g->...kl", deviation, deviation, weight)


def _pseudo_deviations(values: Array, group_sizes: Array) -> tuple[Array, Array]:
    total = group_sizes.sum(axis=-1, keepdims=True)
    h = (total / group_sizes)[..., None, :]
    whole, without = values[..., :1], values[..., 1:]
    n_groups = group_sizes.shape[-1]
    centre = n_groups * whole - ((1 - 1 / h) * without).sum(axis=-1, keepdims=True)
    return h * whole - (h - 1) * without - centre, 1 / (n_groups * (h[..., 0, :] - 1))


def jackknife_corrected(values: Array, group_sizes: Array) -> tuple[Array, Array]:
    """Estimate freed of its bias of order 1/N, and its standard error; ``[..., 1 + G] -> [...], [...]``."""
    share = group_sizes / group_sizes.sum(axis=-1, keepdims=True)
    corrected = values.shape[-1] * values[..., 0] - values[..., 0] - ((1 - share) * values[..., 1:]).sum(axis=-1)
    variance = jackknife_covariance(values[..., None, :], group_sizes)[..., 0, 0]
    return corrected, np.sqrt(variance)


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


@dataclass(frozen=True)
class SimpleInterval:
    """An estimate with its standard error and interval (arrays where the input had leading axes)."""

    value: Array
    standard_error: Array
    low: Array
    high: Array
    level: float


def jackknife_normal(
    values: Array, group_sizes: Array, level: float = 0.95, floor: float | None = None
) -> SimpleInterval:
    """``theta +- t_{G-1} se`` with the jackknife standard error, for sums such as ``norm(b)^2`` or a variance.

    Args:
        values: ``[..., 1 + G]``, whole sample first.
        group_sizes: ``[..., G]``.
        level: Confidence level.
        floor: Lower end of the possible values (0 for a squared norm). It clips the *endpoints*; the estimate stays as
            it is, negative if need be, since clipping it would bias it.
    """
    variance = jackknife_covariance(values[..., None, :], group_sizes)[..., 0, 0]
    error, q = np.sqrt(variance), t_quantile(level, group_sizes.shape[-1])
    low, high = values[..., 0] - q * error, values[..., 0] + q * error
    if floor is not None:
        low, high = np.maximum(low, floor), np.maximum(high, floor)
    return SimpleInterval(values[..., 0], error, low, high, level)


@dataclass(frozen=True)
class RatioSets:
    """Confidence sets of a ratio, vectorised over leading axes.

    Attributes:
        ratio: Estimate, numerator / denominator.
        low: Lower root; for the complement shape the set is ``(-inf, low] or [high, inf)``.
        high: Upper root.
        shape: `BOUNDED`, `COMPLEMENT` or `WHOLE_LINE`.
    """

    ratio: Array
    low: Array
    high: Array
    shape: NDArray[np.int64]

    def contains(self, value: float | Array) -> Mask:
        """Whether the sets hold a value."""
        inside = (self.low <= value) & (value <= self.high)
        outside = (value <= self.low) | (value >= self.high)
        return np.where(self.shape == BOUNDED, inside, np.where(self.shape == COMPLEMENT, outside, True))

    def clipped(self) -> tuple[Array, Array, Mask]:
        """Smallest interval in [0, 1] that holds the clipped set, and whether the sample identifies the clipped ratio.

        Clipping is monotone, so the clip of a set that holds ``alpha_unc`` holds ``alpha*``: coverage can only grow.
        Identified means that the set is bounded and its clip is not all of [0, 1].
        """
        bounded = self.shape == BOUNDED
        low = np.where(bounded, np.clip(self.low, 0, 1), 0.0)
        high = np.where(bounded, np.clip(self.high, 0, 1), 1.0)
        return low, high, bounded & ((low > 0) | (high < 1))


def fieller_sets(numerator: Array, denominator: Array, covariance: Array, q: float) -> RatioSets:
    """Fieller's set ``{a : (B - a A)^2 <= q^2 (v_BB - 2 a v_AB + a^2 v_AA)}`` for the ratio B / A, ``E A >= 0``.

    It inverts a test of ``E B = a E A``, which needs no linearisation. Where A is not significantly above zero the set
    is unbounded, and rightly so: then the data do not say what the ratio is. (E A is an expected squared norm here; an
    A significantly *below* zero contradicts the model, and the whole line is returned.)

    Args:
        numerator: B, ``[...]``.
        denominator: A, ``[...]``.
        covariance: ``[..., 2, 2]`` of (B, A).
        q: Quantile of the studentised difference.
    """
    v_bb, v_ab, v_aa = (q**2 * covariance[..., i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
    c2 = denominator**2 - v_aa
    c1 = numerator * denominator - v_ab
    c0 = numerator**2 - v_bb
    discriminant = c1**2 - c2 * c0
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(np.maximum(discriminant, 0.0))
        # The root of larger modulus first; the other follows from the product of the roots without cancellation.
        bigger = c1 + np.where(c1 >= 0, root, -root)
        one, other = bigger / c2, np.where(bigger == 0, 0.0, c0 / np.where(bigger == 0, 1.0, bigger))
        low, high = np.minimum(one, other), np.maximum(one, other)
        ratio = numerator / denominator
    # B / A always lies in the set, so a bounded one has real roots up to rounding. Nothing is known where A and its
    # variance vanish (t = e), which the last branch catches along with everything undefined.
    unbounded = np.where((c2 < 0) & (discriminant > 0), COMPLEMENT, WHOLE_LINE)
    shape = np.where((c2 > 0) & (denominator > 0), BOUNDED, unbounded)
    low, high = (np.where(shape == WHOLE_LINE, end, x) for end, x in ((-np.inf, low), (np.inf, high)))
    return RatioSets(ratio, low, high, shape)


def hall_sets(values: Array, group_sizes: Array, q: float) -> RatioSets:
    """Hull of Fieller's set and of the same corrected for skewness (see `bvpo_stats.statistics.calibration`).

    Never narrower than Fieller's. The correction alone is not offered: it gains where one heavy tail dominates (mixture
    with a common scale of t and e, N = 50: .79 becomes .90) but loses where two heavy tails balance (.96 becomes .89),
    since a sample tells little about skewness. Where either set is unbounded the whole line is returned.

    Args:
        values: (B, A), ``[..., 2, 1 + G]``.
        group_sizes: ``[..., G]``.
        q: Quantile of the studentised difference.
    """
    numerator, denominator = values[..., 0, 0], values[..., 1, 0]
    deviations, weights = _pseudo_deviations(values, group_sizes)
    plain = fieller_sets(numerator, denominator, jackknife_covariance(values, group_sizes), q)
    low, high = corrected_ends(numerator, denominator, deviations, weights, q)
    bounded = (plain.shape == BOUNDED) & np.isfinite(low) & np.isfinite(high)
    low = np.where(bounded, np.minimum(low, plain.low), -np.inf)
    high = np.where(bounded, np.maximum(high, plain.high), np.inf)
    return RatioSets(plain.ratio, low, high, np.where(bounded, BOUNDED, WHOLE_LINE))


def _holds(
    estimate: Array,
    covariance: Array,
    calibration: tuple[DifferenceSkew, DifferenceSecondOrder],
    n_groups: int,
    q: float,
    candidate: Array,
) -> Mask:
    """Whether ``|h(T(a))| <= q(a)`` at candidates a; see `interaction_sets`."""
    v_bb, v_ab, v_aa = (covariance[..., i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
    standard_error = np.sqrt(np.maximum(v_bb - 2 * candidate * v_ab + candidate**2 * v_aa, 0.0))
    k12 = calibration[0].at(candidate)
    bound = calibration[1].quantile(candidate, standard_error**2, k12, n_groups, q)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        studentised = (estimate[..., 0] - candidate * estimate[..., 1]) / standard_error
        return np.abs(undo_interaction(studentised, shrunk(*k12)[0], n_groups)) <= bound


def interaction_sets(values: Array, interactions: Array, group_sizes: Array, q: float) -> RatioSets:
    """Fieller's set with the studentised difference freed of its dependence on its own standard error.

    ``{a : |h(T(a))| <= q(a)}`` with ``T(a) = (B - a A) / se(B - a A)``, h that of `undo_interaction` at the k12 of
    ``B - a A`` and q(a) the quantile of `DifferenceSecondOrder`: the part of it that holds the estimate, or the whole
    line where that has no end.

    Args:
        values: (B, A), ``[..., 2, 1 + G]``.
        interactions: Of (B, A), ``[..., 2, I]``.
        group_sizes: ``[..., G]``.
        q: Quantile of the studentised difference.
    """
    numerator, denominator, n_groups = values[..., 0, 0], values[..., 1, 0], group_sizes.shape[-1]
    deviations, weights = _pseudo_deviations(values, group_sizes)
    covariance = np.einsum("...kg,...lg,...g->...kl", deviations, deviations, weights)
    skew = DifferenceSkew.of(deviations, interactions)
    second = DifferenceSecondOrder.of(deviations, interactions, group_sizes)

    inside = partial(_holds, values[..., 0], covariance, (skew, second), n_groups, q)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = numerator / denominator
        b, a = deviations[..., 0, :], ratio[..., None] * deviations[..., 1, :]
        spread, whole = ((weights * x**2).sum(axis=-1) for x in (b - a, np.abs(b) + np.abs(a)))
        # B and A in a fixed ratio leave rounding, of which interactions and quantiles would be made.
        unit = np.where(spread <= 1e-24 * whole, 0.0, np.sqrt(spread) / np.abs(denominator))
    low, high = search_ends(ratio, unit, inside)
    # The estimate itself has T = 0; a correction so large that it throws the estimate out says nothing.
    bounded = (denominator > 0) & np.isfinite(low) & np.isfinite(high) & (inside(ratio) | (unit == 0))
    low, high = np.where(bounded, low, -np.inf), np.where(bounded, high, np.inf)
    return RatioSets(ratio, low, high, np.where(bounded, BOUNDED, WHOLE_LINE))


def ratio_sets(
    numerator: Array,
    denominator: Array,
    group_sizes: Array,
    level: float = 0.95,
    method: str = "fieller",
    interactions: tuple[Array, Array] | None = None,
    extra: Array | None = None,
) -> RatioSets:
    """Confidence sets of a ratio of U-statistics by the jackknife: the one interval of every mixing weight.

    Args:
        numerator: B, ``[..., 1 + G]``.
        denominator: A, ``[..., 1 + G]``.
        group_sizes: ``[..., G]``.
        level: Confidence level.
        method: ``fieller`` or ``hall``.
        interactions: Those of B and A, ``[..., I]`` each, where both are linear in U and M; ``fieller`` uses them.
        extra: ``[..., 2, 2]``, covariance that independent data add to (B, A), such as averages over training steps;
            for plain ``fieller``.

    Raises:
        UserError: No such method.
    """
    values = np.stack([numerator, denominator], axis=-2)
    q = t_quantile(level, group_sizes.shape[-1])
    if method == "hall":
        return hall_sets(values, group_sizes, q)
    if method != "fieller":
        raise UserError(f"unknown interval method {method!r}; choose fieller or hall.")
    if interactions is not None and extra is None and group_sizes.shape[-1] >= MIN_GROUPS:
        return interaction_sets(values, np.stack(interactions, axis=-2), group_sizes, q)
    covariance = jackknife_covariance(values, group_sizes)
    return fieller_sets(numerator[..., 0], denominator[..., 0], covariance if extra is None else covariance + extra, q)


BIAS_TRACE = {"t": 1.0, "m": -1.0}
BIAS_EMPTY = {"e": 1.0, "m": -1.0}
MARGINAL = {"m": 1.0}


def _form(weights: Array, products: Array) -> Array:
    """``sum_ab w_a w_b x_ab``, summed over blocks."""
    return np.einsum("...ab,a,b->...", products, weights, weights).sum(axis=-1)


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

    values = _form(weights, summary.U + (summary.shift if weights.sum() else 0))
    if summary.interactions is None:
        return jackknife_normal(values, summary.group_sizes, level, floor=0.0)
    sizes = summary.group_sizes
    n = sizes.sum(axis=-1)
    variance = jackknife_covariance(values[..., None, :], sizes)[..., 0, 0]
    plug_in = values[..., 0] + _form(weights, summary.covariance)[..., 0] / n
    second_order = 2 * interaction_variance(_form(weights, summary.interactions), sizes) / (n * (n - 1))
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
