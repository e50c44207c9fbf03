"""alpha as a function of batch size and step size, its two limits, and alpha_J for steps below 1 / L."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.statistics.alpha import AlphaInterval, alpha_interval, minimiser
from bvpo_stats.statistics.estimates import LinearRatio, estimates, noise_scale
from bvpo_stats.statistics.intervals import Method, SimpleInterval, jackknife_normal, ratio_sets
from bvpo_stats.statistics.summary import Array, MomentSummary


@dataclass(frozen=True)
class AlphaCurve:
    """alpha* at several batch sizes with a pointwise confidence band; every array is ``[batch sizes]``."""

    batch_size: Array
    eta_l: float
    level: float
    alpha: Array
    unclipped: Array
    low: Array
    high: Array
    identified: NDArray[np.bool_]


def alpha_curve(
    summary: MomentSummary,
    batch_sizes: Sequence[float] | Array,
    *,
    eta_l: float = 1.0,
    level: float = 0.95,
    method: Method = "fieller",
) -> AlphaCurve:
    """``alpha(tau) = (P0 + tau P1) / (Q0 + tau Q1)`` at ``tau = eta L / B`` for each batch size B.

    The curve is monotone in B: a weighted average of the bias-only limit (weight ``Q0``) and the variance-only limit
    (weight ``tau Q1``) of `alpha_limits`.
    """
    taus = np.array([noise_scale(B, eta_l) for B in batch_sizes])[:, None]
    found = LinearRatio.of(summary, lambda p: (p.P0 + taus * p.P1, p.Q0 + taus * p.Q1))
    numerator, denominator = found.numerator, found.denominator
    sets = ratio_sets(numerator, denominator, summary.group_sizes, level, method, found.interactions)
    low, high, identified = sets.clipped()
    return AlphaCurve(
        batch_size=np.asarray(batch_sizes, dtype=np.float64),
        eta_l=eta_l,
        level=level,
        alpha=minimiser(numerator[:, 0], denominator[:, 0]),
        unclipped=sets.ratio,
        low=low,
        high=high,
        identified=identified,
    )


@dataclass(frozen=True)
class AlphaLimits:
    """The two ends of the curve.

    Attributes:
        bias_only: ``P0 / Q0``, the limit of large batches (only biases matter).
        variance_only: ``P1 / Q1 = tr(Sigma_e - Sigma_te) / tr(Sigma_t + Sigma_e - 2 Sigma_te)``, the limit of small
            batches; it needs no marginal gradient and is what remains, as ``alpha_var``, where mu cannot be had.
    """

    bias_only: AlphaInterval
    variance_only: AlphaInterval


def alpha_limits(summary: MomentSummary, *, level: float = 0.95, method: Method = "fieller") -> AlphaLimits:
    """Bias-only and variance-only limits of alpha with their intervals."""
    bias, variance = (LinearRatio.of(summary, pick) for pick in (lambda p: (p.P0, p.Q0), lambda p: (p.P1, p.Q1)))
    return AlphaLimits(
        bias_only=alpha_interval(bias, summary, level, method),
        variance_only=alpha_interval(variance, summary, level, method),
    )


def alpha_j(
    summary: MomentSummary,
    rho: float,
    *,
    batch_size: float = 1.0,
    level: float = 0.95,
    method: Method = "fieller",
) -> AlphaInterval:
    """Minimiser of the descent bound for ``rho = eta L < 1`` with no term dropped (`Estimates.alpha_j_parts`).

    Raises:
        UserError: rho outside (0, 1].
    """
    ratio = LinearRatio.of(summary, lambda parts: parts.alpha_j_parts(rho, batch_size))
    return alpha_interval(ratio, summary, level, method)


def error_curve(
    summary: MomentSummary, alphas: Sequence[float] | Array, *, tau: float = 1.0, level: float = 0.95
) -> SimpleInterval:
    """The parabola ``norm(bias)^2 + tau Var`` of the mix over alpha with a pointwise band; arrays ``[alphas]``."""
    values = estimates(summary).error(np.asarray(alphas, dtype=np.float64)[:, None], tau)
    return jackknife_normal(values, summary.group_sizes, level, floor=0.0)
