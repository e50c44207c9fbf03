"""Acceptance of estimators and intervals against a known truth: coverage and bias over replicate samples.

A 95% interval is accepted if its observed coverage lies within a band that a true 95% method misses once in 500 cells;
at 2,000 replicates that is [93.5, 96.5]%. An estimator is accepted if its mean lies within 3.5 Monte Carlo standard
errors of the truth. Coverage of clipped weights, and coverage at samples so small or steps so
gentle that only conservative sets exist, is one-sided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.statistics.estimates import Estimates, LinearRatio, estimates
from bvpo_stats.statistics.intervals import BIAS_EMPTY, BIAS_TRACE, RatioSets, ratio_sets, squared_norm
from bvpo_stats.statistics.moments import Array, MomentSummary

BAND_Z = 3.078
"""Binomial standard errors to either side of the nominal coverage: a true 95% method passes 99.8% of the time."""
MAX_BIAS_Z = 3.5

APPROXIMATE_FLOOR = 0.92
NORMAL_SHARE = 0.2
"""n_eff is a third of all where influences are normal."""

Side = Literal["two", "lower"]
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One line of an acceptance table."""

    name: str
    value: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        """Whether the value lies within its bounds (NaN never does)."""
        return bool(self.low <= self.value <= self.high)


def coverage_band(level: float, replicates: int, side: Side = "two", floor: float | None = None) -> tuple[float, float]:
    """Bounds on observed coverage that a method of exactly this level meets 99.8% of the time.

    Args:
        level: Nominal coverage.
        replicates: Number of independent replicates.
        side: ``lower`` accepts any coverage above the lower bound.
        floor: A lower bound to use if it is less, such as 0.92 where only approximate coverage is promised.

    >>> low, high = coverage_band(0.95, 2000)
    >>> round(low, 3), round(high, 3)
    (0.935, 0.965)
    """
    half = BAND_Z * math.sqrt(level * (1 - level) / replicates)
    low = level - half if floor is None else min(level - half, floor)
    high = level + half if side == "two" else 1.0
    return low, high


def coverage_check(
    name: str, covered: NDArray[np.bool_], level: float, side: Side = "two", floor: float | None = None
) -> Check:
    """Check observed coverage, one boolean per replicate."""
    return Check(f"coverage {name}", float(np.mean(covered)), *coverage_band(level, covered.size, side, floor))


def bias_check(name: str, values: Array, truth: float) -> Check:
    """Check that the mean over replicates is the truth, in Monte Carlo standard errors."""
    error = float(np.std(values, ddof=1) / np.sqrt(values.size))
    gap = float(np.mean(values) - truth)
    # A quantity that is zero in every sample (b_t at the reference point) has no spread; rounding alone may differ.
    rounding = 1e-9 * max(1.0, abs(truth))
    z = gap / error if error > rounding / 1e3 else (0.0 if abs(gap) < rounding else float("inf"))
    return Check(f"bias {name} (standard errors)", z, -MAX_BIAS_Z, MAX_BIAS_Z)


UNBIASED = (
    "bias_trace_sq",
    "bias_empty_sq",
    "bias_cross",
    "var_trace",
    "var_empty",
    "var_cross",
    "marginal_sq",
    "trace_dot_marginal",
    "P0",
    "P1",
    "Q0",
    "Q1",
)
"""Estimates whose means `acceptance` compares with the truth."""


@dataclass(frozen=True)
class Replicates:
    """What acceptance keeps of R replicate samples.

    Attributes:
        size: Prompts per sample, N.
        influences: Prompts, or groups of them, whose influences give n_eff.
        taus: Noise scales examined.
        sets: Confidence sets of alpha_unc, one `RatioSets` of ``[R]`` per tau.
        parts: Estimates of every sample, arrays ``[R]``.
        bias_ends: ``norm(b_t)^2`` and ``norm(b_e)^2``: lower and upper ends ``[R]`` of their intervals.
    """

    size: int
    influences: int
    taus: tuple[float, ...]
    sets: tuple[RatioSets, ...]
    parts: Estimates
    bias_ends: dict[str, tuple[Array, Array]]


def collect(
    samples: Iterable[tuple[MomentSummary, Sequence[LinearRatio]]], taus: Sequence[float], *, level: float = 0.95
) -> Replicates:
    """Estimates and intervals of every replicate.

    Args:
        samples: Chunks of summaries with a leading replicate axis, and alpha at each of the taus.
        taus: Noise scales.
        level: Confidence level.
    """
    sets: list[list[RatioSets]] = [[] for _ in taus]
    parts: list[Estimates] = []
    ends: dict[str, list[tuple[Array, Array]]] = {"bias_trace_sq": [], "bias_empty_sq": []}
    size, influences = 0, 0
    for summary, ratios in samples:
        size = summary.n_prompts
        influences = summary.n_groups if summary.prompts is None else size
        parts.append(estimates(summary).select(0))
        for found, ratio in zip(sets, ratios, strict=True):
            found.append(ratio_sets(ratio, level))
        for name, combination in (("bias_trace_sq", BIAS_TRACE), ("bias_empty_sq", BIAS_EMPTY)):
            interval = squared_norm(summary, combination, level)
            ends[name].append((interval.low, interval.high))
    return Replicates(
        size=size,
        influences=influences,
        taus=tuple(taus),
        sets=tuple(_join(RatioSets, chunk) for chunk in sets),
        parts=_join(Estimates, parts),
        bias_ends={
            name: (np.concatenate([p[0] for p in x]), np.concatenate([p[1] for p in x])) for name, x in ends.items()
        },
    )


def _join(kind: type[T], chunks: Sequence[T]) -> T:
    """Concatenate the array fields of equal dataclasses."""
    present = [name for name, value in vars(chunks[0]).items() if value is not None]
    return kind(**{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in present})


def acceptance(replicates: Replicates, truth: Estimates, *, level: float = 0.95) -> list[Check]:
    """All checks of one cell.

    Coverage of alpha_unc must lie in the two-sided band; where N < 50 or tau <= 0.01, and for squared biases, it must
    reach 92% (or the binomial bound of a true 95% method, where fewer replicates make that the lower). Where the median
    n_eff is below `NORMAL_SHARE` of all, sets are wider for tails by design, and the band has no upper end. Coverage of
    the clipped alpha* is one-sided. A sample without an interval counts as one that holds everything.

    Args:
        replicates: From `collect`.
        truth: Exact values (scalars), such as ``estimates(population.exact()).select(0)``.
        level: The level that `collect` used.
    """
    checks = [bias_check(name, getattr(replicates.parts, name), float(getattr(truth, name))) for name in UNBIASED]
    for tau, sets in zip(replicates.taus, replicates.sets, strict=True):
        alpha = float(truth.numerator(tau) / truth.denominator(tau))
        approximate = replicates.size < 50 or tau <= 0.01
        tails = sets.n_eff is not None and bool(np.median(sets.n_eff) < NORMAL_SHARE * replicates.influences)
        side: Side = "lower" if approximate or tails else "two"
        floor = APPROXIMATE_FLOOR if approximate else None
        checks.append(coverage_check(f"alpha_unc, tau = {tau:g}", sets.contains(alpha), level, side, floor))
        low, high, _ = sets.clipped()
        clipped = np.clip(alpha, 0.0, 1.0)
        covered = (low <= clipped) & (clipped <= high)
        checks.append(coverage_check(f"alpha*, tau = {tau:g}", covered, level, "lower", floor))
    for name, (low, high) in replicates.bias_ends.items():
        value = float(getattr(truth, name))
        # A squared bias that is zero but for rounding counts as covered by an interval that ends at zero.
        covered = (low <= value + 1e-12) & (value - 1e-12 <= high)
        checks.append(coverage_check(name, covered, level, "lower", APPROXIMATE_FLOOR))
    return checks
