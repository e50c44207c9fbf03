"""alpha per parameter block, in Adam's metric, for directions without a scale, and with the true curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.alpha import AlphaInterval, alpha_interval
from bvpo_stats.statistics.estimates import LinearRatio, estimates, noise_scale
from bvpo_stats.statistics.intervals import (
    Method,
    SimpleInterval,
    jackknife_corrected,
    t_quantile,
)
from bvpo_stats.statistics.summary import Array, MomentSummary


@dataclass(frozen=True)
class LayerAlphas:
    """alpha of every parameter block and what is gained over one alpha for all.

    Attributes:
        alphas: Block name to weight with interval.
        weights: Block name to ``A_l``, the curvature of its error parabola (its say in the global alpha).
        gain: ``sum_l A_l (alpha_l - alpha)^2 = sum_l B_l^2 / A_l - B^2 / A``, the error saved by unclipped per-layer
            weights, freed of its bias of order 1/N by the jackknife; None where some A_l is not positive.
    """

    alphas: dict[str, AlphaInterval]
    weights: dict[str, float]
    gain: SimpleInterval | None


def layer_alphas(
    summary: MomentSummary,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
    method: Method = "fieller",
) -> LayerAlphas:
    """Per-layer weights: the error separates over parameter blocks, so each has its own ``alpha_l = B_l / A_l``."""
    tau = noise_scale(batch_size, eta_l)
    found = LinearRatio.of(summary, lambda parts: (parts.numerator(tau), parts.denominator(tau)), per_block=True)
    B, A = found.numerator, found.denominator
    alphas = {name: alpha_interval(found.block(k), summary, level, method) for k, name in enumerate(summary.blocks)}
    # A block that never gets a gradient (LoRA's A at its start) has A_l = B_l = 0 and no part in the gain.
    live = ~((A == 0) & (B == 0)).all(axis=0)
    gain = None
    if live.any() and (A[:, live] > 0).all():
        saved = (B[:, live] ** 2 / A[:, live]).sum(axis=1) - B.sum(axis=1) ** 2 / A.sum(axis=1)
        value, error = jackknife_corrected(saved, summary.group_sizes)
        half = t_quantile(level, summary.n_groups) * error
        gain = SimpleInterval(value, error, np.maximum(value - half, 0.0), np.maximum(value + half, 0.0), level)
    return LayerAlphas(alphas, {name: float(A[0, k]) for k, name in enumerate(summary.blocks)}, gain)


def adam_metric(second_moment: Float[np.ndarray, " parameters"], epsilon: float = 1e-8) -> Array:
    """Diagonal of Adam's metric, ``P = 1 / (sqrt(v) + epsilon)``, from its frozen second-moment estimate v."""
    v = np.asarray(second_moment, dtype=np.float64)
    if (v < 0).any() or not np.isfinite(v).all():
        raise UserError("Adam's second moments must be finite and not negative; check the optimizer state.")
    return 1 / (np.sqrt(v) + epsilon)


def in_metric(
    vectors: Mapping[str, Float[np.ndarray, "examples parameters"]], metric: Float[np.ndarray, " parameters"]
) -> dict[str, Array]:
    """Scale per-example gradients by ``sqrt(P)``, so that plain moments of the result are moments in the metric P.

    ``alpha_P = E <e - t, P (e - mu)> / E norm(e - t)_P^2`` is then the ordinary alpha of what is returned.
    """
    scale = np.sqrt(np.asarray(metric, dtype=np.float64))
    return {name: np.asarray(value, dtype=np.float64) * scale for name, value in vectors.items()}


def direction_alpha(
    summary: MomentSummary,
    *,
    batch_size: float = 1.0,
    eta_l: float = 1.0,
    level: float = 0.95,
    method: Method = "fieller",
) -> AlphaInterval:
    """Weight for optimizers that ignore the length of the gradient, as Adam does.

    The combination ``c_t g_t + c_e g_e`` nearest to mu, its length free, has ``c = M^-1 v`` with ``v_i = E g_i . mu``
    and ``M_ij = E g_i . E g_j + tau tr Sigma_ij``; only its direction matters, ``alpha = c_t / (c_t + c_e)``. The
    determinant of M cancels: ``c_t ~ v_t M_ee - v_e M_te`` and ``c_e ~ v_e M_tt - v_t M_te``. (Products of U-statistics
    have a bias of order 1/N, which numerator and denominator of the other weights do not.)
    """
    tau, p = noise_scale(batch_size, eta_l), estimates(summary)
    tt, ee = p.trace_sq + tau * p.var_trace, p.empty_sq + tau * p.var_empty
    te = p.trace_dot_empty + tau * p.var_cross
    top = p.trace_dot_marginal * ee - p.empty_dot_marginal * te
    other = p.empty_dot_marginal * tt - p.trace_dot_marginal * te
    return alpha_interval(LinearRatio(top, top + other, None), summary, level, method)


def curvature_alpha(
    summary: MomentSummary,
    eta: float,
    *,
    batch_size: float = 1.0,
    level: float = 0.95,
    method: Method = "fieller",
) -> AlphaInterval:
    """Minimiser of the expected loss after one step to second order, with the Hessian H of the loss in place of L.

    With ``h = E t - E e`` and covariances of single examples,

        alpha_H = [mu.h / eta - E e' H h - tr(H Cov(e, t - e)) / B] / [h' H h + tr(H Cov(t - e)) / B].

    ``H = L I`` gives alpha_J at ``rho = eta L``. Where H is so indefinite that the denominator is not positive there is
    no minimum, and the interval says "not identified".

    Args:
        summary: Moments of the members ``t, e, m, Ht, He``, the last two being ``H t_i`` and ``H e_i``.
        eta: Learning rate.
        batch_size: Examples per step.
        level: Confidence level.
        method: ``fieller``, ``hall`` or ``delta``.
    """
    if not eta > 0:
        raise UserError(f"the learning rate must be positive, got {eta}.")
    t, e, m, Ht, He = (summary.index(name) for name in ("t", "e", "m", "Ht", "He"))
    absolute = (summary.U + summary.shift).sum(axis=-3)
    mixed = absolute + noise_scale(batch_size) * summary.covariance.sum(axis=-3)
    marginal_dot_h = absolute[..., m, t] - absolute[..., m, e]
    numerator = marginal_dot_h / eta - (mixed[..., e, Ht] - mixed[..., e, He])
    denominator = mixed[..., t, Ht] - mixed[..., t, He] - mixed[..., e, Ht] + mixed[..., e, He]
    return alpha_interval(LinearRatio(numerator, denominator, None), summary, level, method)
