"""How many prompts would identify a ratio that a sample does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bvpo_stats.statistics.intervals import fieller_sets, jackknife_covariance, t_quantile
from bvpo_stats.statistics.summary import Array


@dataclass(frozen=True)
class PromptsNeeded:
    """How many prompts would identify a ratio, extrapolated from the jackknife variance.

    Attributes:
        prompts: The number; None if even a million times the sample would not do.
        at_least: True where the denominator itself was not significantly positive, so that only a lower bound exists.
    """

    prompts: int | None
    at_least: bool


def prompts_needed(
    numerator: Array, denominator: Array, group_sizes: Array, n_prompts: int, level: float = 0.95
) -> PromptsNeeded:
    """Prompts for which Fieller's set is expected to be bounded and to say something within [0, 1].

    Takes the estimates for the truth and shrinks their covariance by N / N'. U-statistics of small biases carry a part
    of order ``1 / N^2`` too, so the number errs on the safe side. Where the estimated denominator is below its standard
    error it is raised to that, which makes the number a lower bound.

    Args:
        numerator: ``[1 + G]``.
        denominator: ``[1 + G]``.
        group_sizes: ``[G]``.
        n_prompts: Prompts in the sample.
        level: Confidence level.
    """
    covariance = jackknife_covariance(np.stack([numerator, denominator]), group_sizes)
    standard_error = math.sqrt(max(covariance[1, 1], 0.0))
    weak = not denominator[0] > standard_error
    bottom = np.asarray(max(float(denominator[0]), standard_error))
    q = t_quantile(level, group_sizes.shape[-1])

    def identified(factor: float) -> bool:
        return bool(fieller_sets(numerator[0], bottom, covariance / factor, q).clipped()[2])

    low, high = 1.0, 2.0
    if identified(low):
        return PromptsNeeded(n_prompts, weak)
    while not identified(high):
        low, high = high, 2 * high
        if high > 1e6:
            return PromptsNeeded(None, True)
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if identified(middle) else (middle, high)
    return PromptsNeeded(math.ceil(n_prompts * high), weak)
