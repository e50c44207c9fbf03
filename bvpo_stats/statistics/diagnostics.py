"""Can these weights be trusted? Effective size, largest weight, anchor gap, Pareto k-hat, half-split agreement."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bvpo_stats.statistics.marginal import normalised_weights, snis


@dataclass(frozen=True)
class WeightDiagnostics:
    """Diagnostics of the K weights of one answer.

    Attributes:
        traces: K.
        effective_size: ``1 / sum_k wbar_k^2`` of the normalised weights, between 1 and K.
        largest: Largest normalised weight.
        anchor_gap: ``J = E_posterior[log w] - E_q[log w]``, the Jeffreys divergence between posterior and proposal; it
            needs no normaliser. None without draws of both kinds.
        log_traces: ``log K``; ``J <= log K`` certifies, ``J >> log K`` is a red flag.
        k_hat: Pareto tail index of the weights; None where K is too small for a fit or arviz-stats is missing.
        k_threshold: ``min(1 - 1 / log10 K, 0.7)``: below it the estimate is as good as its effective size says
            (Vehtari et al. 2024). Under K = 25 a certificate is out of reach.
        certified: Whether the weights pass: ``J <= log K`` (where J is known) and ``k_hat < k_threshold`` (where
            known), with at least one of the two known.
    """

    traces: int
    effective_size: float
    largest: float
    anchor_gap: float | None
    log_traces: float
    k_hat: float | None
    k_threshold: float
    certified: bool


def effective_sample_size(log_weights: Float[np.ndarray, "*batch traces"]) -> Float[np.ndarray, "*batch"]:
    """``1 / sum_k wbar_k^2``.

    >>> round(float(effective_sample_size(np.zeros(8))), 9)
    8.0
    """
    return 1 / (normalised_weights(log_weights) ** 2).sum(axis=-1)


def anchor_gap(posterior: Float[np.ndarray, " anchors"], proposal: Float[np.ndarray, " draws"]) -> float:
    """``J = E_posterior[log w] - E_q[log w] = KL(posterior | q) + KL(q | posterior)``.

    Args:
        posterior: Log-weights of exact posterior draws (anchors).
        proposal: Log-weights of draws of q. One of weight zero makes the gap infinite, as it should.
    """
    return float(np.mean(posterior) - np.mean(proposal))


def k_hat_threshold(traces: int) -> float:
    """``min(1 - 1 / log10 K, 0.7)``, from Vehtari et al. (2024), and minus infinity where K <= 1.

    >>> [round(k_hat_threshold(K), 2) for K in (10, 25, 100, 10000)]
    [0.0, 0.28, 0.5, 0.7]
    """
    return min(1 - 1 / math.log10(traces), 0.7) if traces > 1 else -math.inf


def pareto_k_hat(log_weights: Float[np.ndarray, " traces"]) -> float | None:
    """Shape k of a generalised Pareto fit to the largest weights; k > 0: moments of order 1/k and above are infinite.

    The fit is that of arviz-stats (Zhang and Stephens 2009, with the weak prior of Vehtari et al.). Its ``psislw``
    expects log-*likelihoods* and negates them, so log-weights go in with a minus sign; passed as they are, the fit
    would describe the smallest weights instead.

    Returns:
        k-hat; None if the tail would hold fewer than 5 weights (K < 25), if all its weights are equal, or if
        arviz-stats is not installed.
    """
    values = np.asarray(log_weights, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 25 or np.ptp(values) == 0:
        return None
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _, k_hat = array_stats.psislw(-values)
        except ValueError:  # all tail values equal
            return None
    return float(k_hat)


def diagnose(
    log_weights: Float[np.ndarray, " traces"], anchors: Float[np.ndarray, " anchors"] | None = None
) -> WeightDiagnostics:
    """All diagnostics of the weights of one answer.

    Args:
        log_weights: Log-weights of the K draws of q.
        anchors: Log-weights of exact posterior draws, where there are any.
    """
    weights = normalised_weights(log_weights)
    traces = len(weights)
    gap = None if anchors is None or len(anchors) == 0 else anchor_gap(anchors, log_weights)
    k_hat, threshold = pareto_k_hat(log_weights), k_hat_threshold(traces)
    tests = [] if gap is None else [gap <= math.log(traces)]
    tests += [] if k_hat is None else [k_hat < threshold]
    return WeightDiagnostics(
        traces=traces,
        effective_size=float(1 / (weights**2).sum()),
        largest=float(weights.max()),
        anchor_gap=gap,
        log_traces=math.log(traces),
        k_hat=k_hat,
        k_threshold=threshold,
        certified=bool(tests) and all(tests),
    )


def half_split_cosine(
    log_weights: Float[np.ndarray, " traces"], scores: Float[np.ndarray, "traces parameters"]
) -> float:
    """Cosine between the marginal scores from the even and from the odd traces; near 1 when the traces agree."""
    log_weights, scores = np.asarray(log_weights), np.asarray(scores)
    first, second = (snis(log_weights[k::2], scores[k::2]) for k in (0, 1))
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / scale if scale > 0 else math.nan
