"""Half-split agreement: does alpha depend on which half of the traces mu comes from?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bvpo_stats.statistics.estimates import estimates, noise_scale
from bvpo_stats.statistics.intervals import jackknife_covariance, t_quantile
from bvpo_stats.statistics.summary import MomentSummary


@dataclass(frozen=True)
class HalfSplit:
    """Unclipped alpha with mu from one half of the traces, against the other half.

    Attributes:
        difference: Of the two.
        low: Lower end of its interval.
        high: Upper end.
        agrees: Whether the interval holds zero.
    """

    difference: float
    low: float
    high: float
    agrees: bool


def half_split(
    summary: MomentSummary,
    halves: MomentSummary,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
) -> HalfSplit:
    """Compares alpha with mu from either half of the traces.

    mu enters alpha through ``h . mu`` alone, h = E t - E e, and linearly, so the two differ by

        alpha_1 - alpha_2 = h . E(m1 - m2) / A,

    a U-statistic of the members ``h`` (t - e) and ``d`` (m1 - m2) over A. The interval is the jackknife's for the
    numerator; whether it holds zero does not depend on A.

    Two halves of K/2 traces have the same bias, so agreement does not prove its absence; disagreement proves that the
    halves differ by more than the prompts explain, as collapsed weights do.

    Args:
        summary: Moments of ``t`` and ``e``, for A.
        halves: Moments of ``h`` and ``d`` over the same examples; fewer groups will do.
        batch_size: Examples per optimizer step.
        eta_l: Learning rate times smoothness.
        level: Confidence level.
    """
    h, d = halves.index("h"), halves.index("d")
    products = (halves.U + halves.shift)[..., h, d].sum(axis=-1)
    A = float(estimates(summary).denominator(noise_scale(batch_size, eta_l))[0])
    error = float(np.sqrt(jackknife_covariance(products[None], halves.group_sizes)[0, 0]))
    q = t_quantile(level, halves.n_groups)
    ends = sorted((float(products[0]) + side * q * error) / A for side in (-1, 1))
    return HalfSplit(float(products[0]) / A, ends[0], ends[1], ends[0] <= 0 <= ends[1])
