"""Confidence intervals for ratios and sums of U-statistics: one jackknife, one set for every ratio, refusals.

The bootstrap is absent on purpose: resampled duplicates put the products ``a_i . b_i`` back that U leaves out, so its
intervals cover too little. The jackknife leaves prompts out and keeps U unbiased.

**Ratios** (`ratio_sets`). For every a, B - a A is tested against 0 as Fieller (1954) does, without linearisation; with

- influences summed per prompt (a prompt with eight pairs is one draw, not eight);
- the statistic freed of its dependence on its own standard error (see `bvpo_stats.statistics.calibration`);
- the hull with the set corrected for the skewness of the influences (Hall 1992);
- the hull with what the sets would be if prompts larger than those seen had been among them (below).

**Sizes.** Where few prompts have most of the size ``w_i = norm(t_i - e_i)^2``, a sample's mean of w lies below the
population's more often than normal theory says, and where the prompts' values ``y_i`` of ``B - a A`` follow w, that
moves the estimate. How far the mean of w may lie above the sample's is read off a log-normal tail (`unseen_mean`) and
taken `UNSEEN` times; how y follows w is read off two regressions (`size_slopes`). Their product is a change of (B, A),
and the set holds every a that some part of such a change makes acceptable. So a set is wider on the side to which
larger prompts than those seen would move the estimate, and hardly anywhere else.

**When no interval is given.** Fewer than `FEWEST` effective prompts: then the sample says as little about the spread of
the estimate as one prompt would. The set is the whole line then: "not identified", whatever the estimate.

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

Sources: Fieller (1954) for the set; MacKinnon and White (1985) for standard errors of slopes; Shao and Wu (1989) for
the delete-a-group jackknife; Liang and Zeger (1986) for clusters of unequal size; Helmers (1991) and Hall (1992) for
the corrections; Kish (1965) for n_eff.
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
from bvpo_stats.statistics.tails import effective_number, unseen_mean

FEWEST = 2.0
"""Effective prompts below which no interval is given."""
UNSEEN = 2.0
"""How many times what the tail of the sizes adds to their mean (`unseen_mean`) the sets allow for."""
SLOPE_REACH, SLOPE_NOISE = 2.0, 0.5
"""Standard errors to either side of the slope in w; share of the variance by which the slope beside sqrt(w) shrinks."""

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
    """How many prompts a ratio rests on, and what larger ones than those seen would change.

    Attributes:
        n_eff: Effective prompts, ``(sum psi^2)^2 / sum psi^4`` (`effective_number`), but no more than their numbers of
            pairs allow: an estimate that one prompt's pairs rule lies so near to them that psi does not show it.
        largest: The largest prompt's share of ``sum psi^2``, but no less than its pairs make it.
        moves: ``[..., 3, 2]``, changes of (B, A) that larger prompts may make (`size_slopes`); none, ``[..., 0, 2]``,
            where sizes are not known.
    """

    n_eff: Array
    largest: Array
    moves: Array

    @classmethod
    def of(cls, ratio: LinearRatio, level: float = 0.95) -> Tails:
        """Of the influences of single prompts on ``B - (B / A) A``, groups standing in where prompts are not known."""
        check_level(level)
        alone = ratio if ratio.alone is None else ratio.alone
        sizes = alone.group_sizes
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            estimate = ratio.numerator[..., 0] / ratio.denominator[..., 0]
            values = np.stack(np.broadcast_arrays(alone.numerator, alone.denominator), axis=-2)
            influences = jackknife_influences(values, sizes)
        share = sizes / sizes.sum(axis=-1, keepdims=True)
        found = cls.of_influences(influences, estimate, share, ratio.norms, level)
        n_eff, largest = effective_number(sizes**2)
        return replace(found, n_eff=np.minimum(found.n_eff, n_eff), largest=np.maximum(found.largest, largest))

    @classmethod
    def of_influences(
        cls, influences: Array, estimate: Array, share: Array, norms: Array | None = None, level: float = 0.95
    ) -> Tails:
        """Of the influences on B and A.

        Args:
            influences: ``[..., 2, P]``.
            estimate: B / A, ``[...]``.
            share: Of each prompt in the means, ``[..., P]``: its influence over it is the value of the prompt.
            norms: Sizes of the prompts' gradients, ``[..., P]``.
            level: Confidence level.
        """
        b, a = np.moveaxis(influences, -2, 0)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            psi = b - estimate[..., None] * a
            scale = np.abs(b).max(axis=-1, keepdims=True) + np.abs(estimate[..., None] * a).max(axis=-1, keepdims=True)
            psi = np.where(np.abs(psi) <= 1e-12 * scale, 0.0, psi)  # B and A in a fixed ratio leave rounding
            moves = np.zeros((*np.shape(estimate), 0, 2))
            if norms is not None:
                relative = norms / norms.mean(axis=-1, keepdims=True)
                slopes = size_slopes(influences / share[..., None, :], relative, estimate)
                moves = UNSEEN * unseen_mean(norms, level)[..., None, None] * slopes
        return cls(*effective_number(psi**2), moves)

    def enough(self, growth: Array | float = 1.0) -> Mask:
        """Whether an interval may be given, for so many times the prompts."""
        return self.n_eff * growth >= FEWEST


def size_slopes(values: Array, sizes: Array, estimate: Array) -> Array:
    """How the values of prompts on (B, A) follow their sizes w, in three ways, weights ``1 / w``.

    The part of a value that is quadratic in a gradient goes with w and the linear part with its root; both have noise
    that grows with w. So: the slope in ``(1, w)``, with `SLOPE_REACH` standard errors of that of ``B - a A`` on either
    side, a the estimate; and the slope in w of ``(1, sqrt(w), w)``, which is what counts in the tail but is uncertain
    where sizes scatter little, shrunk by `SLOPE_NOISE` of its variance as James and Stein do. Where sizes are all alike
    there is no slope: 0.

    Args:
        values: ``[..., 2, P]``.
        sizes: w over its mean, ``[..., P]``.
        estimate: a, ``[...]``.

    Returns:
        ``[..., 3, 2]``.

    >>> w = np.array([1.0, 2.0, 4.0, 9.0]) / 4
    >>> size_slopes(np.stack([3 * w + 1, 5 - w]), w, np.array(0.5)).round(6).tolist()
    [[3.0, -1.0], [3.0, -1.0], [3.0, -1.0]]
    """
    values, sizes = np.nan_to_num(values), np.nan_to_num(sizes)
    root = np.sqrt(np.maximum(sizes, 1e-6))
    slopes, covariances = [], []
    for columns in ([1 / root, sizes / root], [1 / root, np.sqrt(sizes) / root, sizes / root]):
        x = np.stack(columns, axis=-1)
        unit = np.sqrt((x**2).sum(axis=-2, keepdims=True))
        x = x / np.where(unit > 0, unit, 1.0)
        inverse = np.linalg.pinv(np.einsum("...pk,...pl->...kl", x, x), rcond=1e-10, hermitian=True)
        rows = np.matmul(x, inverse)
        fitted = np.einsum("...pk,...cp->...ck", rows, values / root[..., None, :])
        left = values / root[..., None, :] - np.einsum("...pk,...ck->...cp", x, fitted)
        # MacKinnon and White's (1985) HC3: residuals as of a fit without the prompt
        left = left * (rows[..., -1] / np.maximum(1 - (x * rows).sum(axis=-1), 0.05))[..., None, :]
        scale = np.where(unit > 0, unit, np.inf)[..., 0, -1]
        slopes.append(fitted[..., -1] / scale[..., None])
        covariances.append(np.einsum("...cp,...dp->...cd", left, left) / (scale**2)[..., None, None])
    direction = np.stack([np.ones_like(estimate), -np.nan_to_num(estimate)], axis=-1)
    reach, spread = (np.einsum("...cd,...d->...c", x, direction) for x in covariances)
    variances = [np.maximum((x * direction).sum(axis=-1), 0.0) for x in (reach, spread)]
    with np.errstate(invalid="ignore", divide="ignore"):
        side = np.nan_to_num(SLOPE_REACH * reach / np.sqrt(variances[0])[..., None])
        along = (slopes[1] * direction).sum(axis=-1)
        kept = np.where(along**2 > SLOPE_NOISE * variances[1], 1 - SLOPE_NOISE * variances[1] / along**2, 0.0)
    return np.stack(np.broadcast_arrays(slopes[0] - side, slopes[0] + side, kept[..., None] * slopes[1]), axis=-2)


@dataclass(frozen=True)
class RatioTest:
    """Which candidates a the data leave standing; see `ratio_sets`.

    Attributes:
        estimate: (B, A), ``[..., 2]``.
        influences: Of both, ``[..., 2, G]``, scaled to the covariance.
        calibration: k12 and the second order, where the interactions of enough groups are known.
        q: Quantile of the studentised difference.
        moves: Changes of (B, A) that larger prompts may make, ``[..., F, 2]``.
    """

    estimate: Array
    influences: Array
    calibration: tuple[DifferenceSkew, DifferenceSecondOrder] | None
    q: float
    moves: Array

    @classmethod
    def of(cls, ratio: LinearRatio, q: float, moves: Array) -> RatioTest:
        """The test of a ratio."""
        values = np.stack(np.broadcast_arrays(ratio.numerator, ratio.denominator), axis=-2)
        sizes, calibration = ratio.group_sizes, None
        influences = jackknife_influences(values, sizes)
        if ratio.interactions is not None and sizes.shape[-1] >= MIN_GROUPS:
            matrices = pair_matrix(np.stack(np.broadcast_arrays(*ratio.interactions), axis=-2), sizes.shape[-1])
            share = (sizes / sizes.sum(axis=-1, keepdims=True))[..., None, :]
            each = influences / share * np.sqrt(1 - (share**2).sum(axis=-1, keepdims=True))
            calibration = DifferenceSkew.of(each, matrices), DifferenceSecondOrder.of(each, matrices, sizes)
        return cls(values[..., 0], influences, calibration, q, moves)

    def studentised(self, candidate: Array) -> tuple[Array, Array, Array, Array]:
        """T(a) freed of the interactions, its bound, l of Hall's h, and the standard error of ``B - a A``.

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
            return T, bound, np.nan_to_num(polynomial(cubes, candidate) / variance**1.5), np.sqrt(variance)

    def holds(self, candidate: Array) -> Mask:
        """Whether T(a) or h(T(a)), with some part of what larger prompts may add, lies within the bound."""
        T, bound, slant, error = self.studentised(candidate)
        low, high = T, T
        for k in range(self.moves.shape[-2]):
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                moved = T + np.nan_to_num((self.moves[..., k, 0] - candidate * self.moves[..., k, 1]) / error)
            low, high = np.minimum(low, moved), np.maximum(high, moved)
        plain = (low <= bound) & (high >= -bound)
        return plain | ((hall_transform(low, slant) <= bound) & (hall_transform(high, slant) >= -bound))


def ratio_sets(ratio: LinearRatio, level: float = 0.95, growth: Array | float = 1.0) -> RatioSets:
    """Confidence sets of a ratio of U-statistics: the one interval of every mixing weight, and of every other ratio.

    The part that holds the estimate of ``{a : |T(a) + s d(a)| <= q or |h(T(a) + s d(a))| <= q, some s in [0, 1]}`` with
    ``T(a) = (B - a A) / se(B - a A)`` freed of the interactions, h Hall's transformation, q Student's quantile of
    second order and ``d(a) = (dB - a dA) / se(B - a A)`` for any (dB, dA) of `Tails.moves`; the whole line where that
    part has no end, where A is not positive, or where `Tails.enough` says that no interval may be given. Where
    gradients were seen through a random projection, both arms are lengthened by Student's quantile of its rows times
    what its draw adds to the standard error, squares added.

    Args:
        ratio: B, A and what is known of their groups and prompts, with leading axes.
        level: Confidence level.
        growth: Count effective prompts as for so many times the prompts (`bvpo_stats.statistics.alpha.prompts_needed`).
    """
    tails = Tails.of(ratio, level)
    test = RatioTest.of(ratio, t_quantile(level, ratio.group_sizes.shape[-1]), tails.moves)
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
