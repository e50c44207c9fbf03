"""Confidence intervals for ratios and sums of U-statistics: one jackknife, one set for every ratio, refusals.

The bootstrap is absent on purpose: resampled duplicates put the products ``a_i . b_i`` back that U leaves out, so its
intervals cover too little. The jackknife leaves prompts out and keeps U unbiased.

**Ratios** (`ratio_sets`). For every a, B - a A is tested against 0 as Fieller (1954) does, without linearisation; with

- influences summed per prompt (a prompt with eight pairs is one draw, not eight);
- the statistic freed of its dependence on its own standard error (see `bvpo_stats.statistics.calibration`);
- the hull with the set corrected for the skewness of the influences (Hall 1992);
- a quantile that grows by `TAIL_WIDENING` (1 / n_eff - 3 / N), at most by `WIDEST`: n_eff is N / 3 where influences are
  normal, and what falls short of that are tails, of which a sample shows too little.

**When no interval is given.** Two signs say that the sample does not show what rules the ratio: fewer than `FEWEST`
effective prompts; or influences that go with the size of the prompts' gradients while sizes scatter widely
(`Tails.slope` above `STEEPEST`): then the estimate is a mean of a heavy-tailed size, of which the prompts that matter
most are likely not among the sample. The set is the whole line then: "not identified", whatever the estimate.

The constants were chosen on simulated populations and judged on others: ``benchmarks/tails_of_alpha.md``.

**Squared norms of means**, such as norm(b_t)^2. The variance of ``U = norm(x-bar)^2`` (diagonal removed) has a part
that grows with the norm and one that does not:

    Var U = 4 x' Sigma x / N + 2 tr(Sigma^2) / (N (N - 1)),      x = E x_i.

A standard error from the sample puts the *estimated* mean into the first part. Near x = 0 estimate and standard error
then rise and fall together, and intervals miss the truth from below. Wilson's (1927) cure for proportions works here
too: let the variance belong to the value under test. With V the squared norm of the plain sample mean, of which the
jackknife variance ``v`` is the first part's estimate,

    { theta : (U - theta)^2 <= q^2 [ v theta / V + 2 E r^2 / (N (N - 1)) ] },

an interval in closed form. ``E r^2 = tr(Sigma^2)`` comes from the interactions.

Sources: Fieller (1954) for the set; Shao and Wu (1989) for the delete-a-group jackknife; Liang and Zeger (1986) for
clusters of unequal size; Helmers (1991) and Hall (1992) for the corrections; Kish (1965) for n_eff.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bvpo_stats.errors import check_level
from bvpo_stats.statistics.calibration import (
    MIN_GROUPS,
    DifferenceSecondOrder,
    DifferenceSkew,
    Mask,
    hall_transform,
    interaction_variance,
    pair_matrix,
    polynomial,
    search_ends,
    shrunk,
    undo_interaction,
)
from bvpo_stats.statistics.estimates import LinearRatio
from bvpo_stats.statistics.moments import Array, MomentSummary

FEWEST = 4.0
"""Effective prompts below which no interval is given."""
STEEPEST = 0.35
"""`Tails.slope` above which none is given, up to 100 prompts; times sqrt(N / 100) beyond, as means of sizes settle."""
TAIL_WIDENING, WIDEST = 3.0, 0.35
"""How much wider sets are for tails: by the first times ``1 / n_eff - 3 / N``, at most by the second."""

BOUNDED, COMPLEMENT, WHOLE_LINE = 0, 1, 2
"""Shapes of Fieller's set: ``[low, high]``; ``(-inf, low] or [high, inf)``; every real number."""


def t_quantile(level: float, n_groups: int) -> float:
    """Two-sided Student quantile with ``n_groups - 1`` degrees of freedom (N - 1 where every prompt is a group)."""
    check_level(level)
    return float(stats.t.ppf(0.5 + level / 2, n_groups - 1))


def jackknife_influences(values: Array, group_sizes: Array) -> Array:
    """``psi_g`` of k statistics by leaving groups out, scaled so that ``sum_g psi_g psi_g'`` is their covariance.

    With share ``f_g = n_g / N`` and ``theta_g`` the statistic without group g, ``psi_g = (1 - f_g) (theta - theta_g)``,
    which for a mean is ``f_g`` times the group's mean less the mean; centred, and over ``1 - sum f^2``. That is exactly
    unbiased for a mean of independent examples, and right where the examples of a group go together (a prompt with
    many pairs), where weights that suppose them independent are too small. For equal groups the covariance is the
    familiar ``(G - 1) / G sum_g (theta_g - mean)^2``.

    Args:
        values: ``[..., k, 1 + G]``, whole sample first.
        group_sizes: ``[..., G]``.

    Returns:
        ``[..., k, G]``.
    """
    share = (group_sizes / group_sizes.sum(axis=-1, keepdims=True))[..., None, :]
    with np.errstate(invalid="ignore"):
        psi = (1 - share) * (values[..., :1] - values[..., 1:])
    psi = psi - share * psi.sum(axis=-1, keepdims=True)
    return psi / np.sqrt(1 - (share**2).sum(axis=-1, keepdims=True))


def jackknife_covariance(values: Array, group_sizes: Array) -> Array:
    """Covariance matrix ``[..., k, k]`` of k statistics by leaving groups out (`jackknife_influences`)."""
    psi = jackknife_influences(values, group_sizes)
    return np.einsum("...kg,...lg->...kl", psi, psi)


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
        n_eff: Effective prompts behind the ratio (`effective_number`); NaN where they are not known.
        largest: The largest prompt's share of its variance, likewise.
    """

    ratio: Array
    low: Array
    high: Array
    shape: NDArray[np.int64]
    n_eff: Array
    largest: Array

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


def fieller_sets(numerator: Array, denominator: Array, covariance: Array, q: Array | float) -> RatioSets:
    """Fieller's set ``{a : (B - a A)^2 <= q^2 (v_BB - 2 a v_AB + a^2 v_AA)}`` for the ratio B / A, ``E A >= 0``.

    It inverts a test of ``E B = a E A``, which needs no linearisation. Where A is not significantly above zero the set
    is unbounded, and rightly so: then the data do not say what the ratio is. (E A is an expected squared norm here; an
    A significantly *below* zero contradicts the model, and the whole line is returned.)

    Args:
        numerator: B, ``[...]``.
        denominator: A, ``[...]``.
        covariance: ``[..., 2, 2]`` of (B, A).
        q: Quantile of the studentised difference, ``[...]`` or one for all.
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
    unknown = np.full(np.shape(ratio), np.nan)
    return RatioSets(ratio, low, high, shape, unknown, unknown)


@dataclass(frozen=True)
class Tails:
    """How many prompts a ratio rests on.

    Attributes:
        n_eff: Effective prompts, ``(sum psi^2)^2 / sum psi^4`` (`effective_number`), but no more than their numbers of
            pairs allow: an estimate that one prompt's pairs rule lies so near to them that psi does not show it.
        largest: The largest prompt's share of ``sum psi^2``, but no less than its pairs make it.
        slope: |rank correlation of the influences with the prompts' sizes| times the spread of the logarithm of the
            sizes in the upper half (the standard deviation, were it normal); 0 where sizes are not known.
        n_prompts: Prompts (or groups, where only those are known).
    """

    n_eff: Array
    largest: Array
    slope: Array
    n_prompts: int

    @classmethod
    def of(cls, ratio: LinearRatio) -> Tails:
        """Of the influences of single prompts on ``B - (B / A) A``, groups standing in where prompts are not known."""
        alone = ratio if ratio.alone is None else ratio.alone
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            estimate = ratio.numerator[..., 0] / ratio.denominator[..., 0]
            values = np.stack(np.broadcast_arrays(alone.numerator, alone.denominator), axis=-2)
            b, a = np.moveaxis(jackknife_influences(values, alone.group_sizes), -2, 0)
        found = cls.of_influences(b, a, estimate, b.shape[-1], ratio.norms)
        n_eff, largest = effective_number(alone.group_sizes**2)
        return replace(found, n_eff=np.minimum(found.n_eff, n_eff), largest=np.maximum(found.largest, largest))

    @classmethod
    def of_influences(cls, b: Array, a: Array, estimate: Array, count: int, norms: Array | None = None) -> Tails:
        """Of the influences ``[..., P]`` on B and A.

        Args:
            b: On B.
            a: On A.
            estimate: B / A, ``[...]``.
            count: Prompts (steps, groups), in effect: P, or fewer where some are meant to weigh less.
            norms: Sizes of the prompts' gradients.
        """
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            psi = b - estimate[..., None] * a
            scale = np.abs(b).max(axis=-1, keepdims=True) + np.abs(estimate[..., None] * a).max(axis=-1, keepdims=True)
            psi = np.where(np.abs(psi) <= 1e-12 * scale, 0.0, psi)  # B and A in a fixed ratio leave rounding
        n_eff, largest = effective_number(psi**2)
        slope = np.zeros(np.shape(n_eff)) if norms is None else size_slope(psi, norms)
        return cls(n_eff, largest, slope, count)

    def widening(self, growth: Array | float = 1.0) -> Array:
        """Factor of the quantile, for so many times the prompts."""
        short = 1 / (self.n_eff * growth) - 3 / (self.n_prompts * np.asarray(growth))
        return 1 + np.clip(TAIL_WIDENING * short, 0, WIDEST)

    def enough(self, growth: Array | float = 1.0) -> Mask:
        """Whether an interval may be given, for so many times the prompts."""
        steepest = STEEPEST * np.sqrt(np.maximum(self.n_prompts * np.asarray(growth) / 100, 1))
        return (self.n_eff * growth >= FEWEST) & (self.slope <= steepest)


def size_slope(influences: Array, norms: Array) -> Array:
    """|Spearman's correlation| of influences with sizes, times the upper spread of the logarithm of sizes.

    >>> w = np.exp(np.linspace(-1, 1, 9))
    >>> round(float(size_slope(w - w.mean(), w)), 3), float(size_slope(w, np.ones(9)))
    (0.645, 0.0)
    """
    influences, norms = np.broadcast_arrays(influences, norms)
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(np.maximum(norms, 1e-300))
        above = np.maximum(logs - np.median(logs, axis=-1, keepdims=True), 0)
        spread = np.sqrt(2 * (above**2).mean(axis=-1))
        ranks = [stats.rankdata(x, axis=-1) for x in (influences, norms)]
        x, y = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
        correlation = (x * y).sum(axis=-1) / np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.where(spread > 1e-9, np.abs(np.nan_to_num(correlation)) * spread, 0.0)


@dataclass(frozen=True)
class RatioTest:
    """Which candidates a the data leave standing; see `ratio_sets`.

    Attributes:
        estimate: (B, A), ``[..., 2]``.
        influences: Of both, ``[..., 2, G]``, scaled to the covariance.
        calibration: k12 and the second order, where the interactions of enough groups are known.
        q: Quantile of the studentised difference.
        wider: Factor of it for tails, ``[...]``.
    """

    estimate: Array
    influences: Array
    calibration: tuple[DifferenceSkew, DifferenceSecondOrder] | None
    q: float
    wider: Array

    @classmethod
    def of(cls, ratio: LinearRatio, q: float, wider: Array) -> RatioTest:
        """The test of a ratio."""
        values = np.stack(np.broadcast_arrays(ratio.numerator, ratio.denominator), axis=-2)
        sizes, calibration = ratio.group_sizes, None
        influences = jackknife_influences(values, sizes)
        if ratio.interactions is not None and sizes.shape[-1] >= MIN_GROUPS:
            matrices = pair_matrix(np.stack(np.broadcast_arrays(*ratio.interactions), axis=-2), sizes.shape[-1])
            share = (sizes / sizes.sum(axis=-1, keepdims=True))[..., None, :]
            each = influences / share * np.sqrt(1 - (share**2).sum(axis=-1, keepdims=True))
            calibration = DifferenceSkew.of(each, matrices), DifferenceSecondOrder.of(each, matrices, sizes)
        return cls(values[..., 0], influences, calibration, q, wider)

    def studentised(self, candidate: Array) -> tuple[Array, Array, Array]:
        """T(a) freed of the interactions, Hall's h(T(a)), and the bound on both before it is widened.

        Args:
            candidate: a, ``[...]`` or ``[C, ...]``.
        """
        b, a = self.influences[..., 0, :], self.influences[..., 1, :]
        squares = [(b**2).sum(axis=-1), -2 * (b * a).sum(axis=-1), (a**2).sum(axis=-1)]
        cubes = [(b**3).sum(axis=-1), -3 * (b**2 * a).sum(axis=-1), 3 * (b * a**2).sum(axis=-1), -(a**3).sum(axis=-1)]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            variance = np.maximum(polynomial(squares, candidate), 0.0)
            T = (self.estimate[..., 0] - candidate * self.estimate[..., 1]) / np.sqrt(variance)
            bound = np.full(np.shape(T), self.q)
            if self.calibration is not None:
                skew, second = self.calibration
                k12 = skew.at(candidate)
                bound = second.quantile(candidate, variance, k12, b.shape[-1], self.q)
                T = undo_interaction(T, shrunk(*k12)[0], b.shape[-1])
            return T, hall_transform(T, np.nan_to_num(polynomial(cubes, candidate) / variance**1.5)), bound

    def holds(self, candidate: Array) -> Mask:
        """Whether |T(a)| or |h(T(a))| is at most the quantile."""
        T, corrected, bound = self.studentised(candidate)
        return np.minimum(np.abs(T), np.abs(corrected)) <= bound * self.wider


def ratio_sets(ratio: LinearRatio, level: float = 0.95, growth: Array | float = 1.0) -> RatioSets:
    """Confidence sets of a ratio of U-statistics: the one interval of every mixing weight, and of every other ratio.

    The part that holds the estimate of ``{a : |T(a)| <= q w or |h(T(a))| <= q w}`` with ``T(a) = (B - a A) / se(B - a
    A)`` freed of the interactions, h Hall's transformation, q Student's quantile of second order and w that of
    `Tails.widening`; the whole line where that part has no end, where A is not positive, or where `Tails.enough` says
    that no interval may be given. Where gradients were seen through a random projection, both arms are lengthened by
    Student's quantile of its rows times what its draw adds to the standard error, squares added.

    Args:
        ratio: B, A and what is known of their groups and prompts, with leading axes.
        level: Confidence level.
        growth: Judge tails as for so many times the prompts (`bvpo_stats.statistics.alpha.prompts_needed`).
    """
    tails = Tails.of(ratio)
    test = RatioTest.of(ratio, t_quantile(level, ratio.group_sizes.shape[-1]), tails.widening(growth))
    numerator, denominator = test.estimate[..., 0], test.estimate[..., 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = numerator / denominator
        b, a = test.influences[..., 0, :], estimate[..., None] * test.influences[..., 1, :]
        spread, whole = ((x**2).sum(axis=-1) for x in (b - a, np.abs(b) + np.abs(a)))
        # B and A in a fixed ratio leave rounding, of which interactions and quantiles would be made.
        unit = np.where(spread <= 1e-24 * whole, 0.0, np.sqrt(spread) / np.abs(denominator))
    low, high = search_ends(estimate, unit, test.holds)
    # The estimate itself has T = 0; a correction so large that it throws the estimate out says nothing.
    bounded = (denominator > 0) & np.isfinite(low) & np.isfinite(high) & (test.holds(estimate) | (unit == 0))
    bounded = bounded & tails.enough(growth)
    if ratio.projection is not None and (variance := ratio.projected) is not None:
        reach = t_quantile(level, ratio.projection.group_sizes.shape[-1]) ** 2 * variance
        low = estimate - np.sqrt((estimate - low) ** 2 + reach)
        high = estimate + np.sqrt((high - estimate) ** 2 + reach)
    low, high = np.where(bounded, low, -np.inf), np.where(bounded, high, np.inf)
    return RatioSets(estimate, low, high, np.where(bounded, BOUNDED, WHOLE_LINE), tails.n_eff, tails.largest)


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
