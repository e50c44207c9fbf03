"""Half-split agreement: alpha with mu from either half of the traces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bvpo_stats.statistics.estimates import estimates, noise_scale
from bvpo_stats.statistics.intervals import jackknife_covariance, t_quantile
from bvpo_stats.statistics.summary import MomentSummary


@dataclass(frozen=True)
class HalfSplit:
    """alpha from two disjoint halves of the traces behind mu.

    Attributes:
        first: Unclipped alpha with mu from the first half.
        second: Likewise from the second.
        difference: ``first - second``.
        standard_error: Jackknife standard error of the difference.
        agrees: Whether the difference lies within its interval around zero.
    """

    first: float
    second: float
    difference: float
    standard_error: float
    agrees: bool


def half_split(
    summary: MomentSummary,
    *,
    first: str = "m1",
    second: str = "m2",
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> HalfSplit:
    """Compare alpha with mu from each half of the traces (members ``m1`` and ``m2`` of the summary).

    Two halves of K/2 traces have the same bias, so agreement does not prove its absence; disagreement proves that the
    halves differ by more than the prompts explain, as collapsed weights do.
    """
    tau = noise_scale(batch_size, eta_l)
    halves = [estimates(summary, marginal=name) for name in (first, second)]
    a, b = (half.numerator(tau) / half.denominator(tau) for half in halves)
    error = float(np.sqrt(jackknife_covariance((a - b)[None], summary.group_sizes)[0, 0]))
    difference = float(a[0] - b[0])
    agrees = abs(difference) <= t_quantile(level, summary.n_groups) * error
    return HalfSplit(float(a[0]), float(b[0]), difference, error, bool(agrees))
