"""The marginal log-probability and its gradient from K weighted traces of one answer.

    log pi(y | x) = log E_{r ~ q} w,   S(y) = grad log pi(y | x) = E_{r ~ pi(r | x, y)} s(r, y)      (Fisher's identity)

with ``w = pi(r, y | x) / q(r)``. Functions here take log-weights ``[K]`` and scores ``[K, d]`` and know no model.

Which estimator is unbiased:

* `snis`: bias ``-E_q[w^2 (s - S)] / (K (E_q w)^2)`` to leading order (Cardoso et al. 2022; Agapiou et al. 2017).
* `anchored_snis`: the same arithmetic where the first trace is an exact posterior draw and the rest come from q: no
  bias for any K (the invariance of the i-SIR kernel, Andrieu, Lee and Vihola 2018).
* `log_mean_weight`: ``log`` of an unbiased mean, bias ``-Var(w / E w) / (2 K)``. With ``w = exp(Delta)`` and traces of
  pi_ref's posterior it estimates ``log pi(y | x) / pi_ref(y | x)``.
* `multilevel`: antithetic multilevel Monte Carlo, no bias (Blanchet and Glynn 2015; Shi and Cornish 2021).
* `jackknife`: bias of order ``1 / K^2`` (JVI, Nowozin 2018); its implied weights can be negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.moments import Array

Functional = Callable[[Int[np.ndarray, " chosen"]], Array]
"""A statistic of a subset of the traces, given by their indices; `multilevel` and `jackknife` remove its bias."""


def normalised_weights(log_weights: Float[np.ndarray, "*batch traces"]) -> Float[np.ndarray, "*batch traces"]:
    """Weights that sum to one along the last axis, computed without overflow.

    Raises:
        UserError: All weights are zero, or a log-weight is NaN or +inf.
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    if np.isnan(log_weights).any() or np.isposinf(log_weights).any():
        raise UserError("a log-weight is NaN or infinite; check the log-probabilities of the traces.")
    total = logsumexp(log_weights, axis=-1, keepdims=True)
    if np.isneginf(total).any():
        raise UserError("all traces of an answer have weight zero, so its marginal cannot be estimated from them.")
    return np.exp(log_weights - total)


def log_mean_weight(log_weights: Float[np.ndarray, "*batch traces"]) -> Float[np.ndarray, "*batch"]:
    """``log((1 / K) sum_k w_k)``: log pi(y | x) from draws of q, its log-ratio to pi_ref from pi_ref's posterior."""
    log_weights = np.asarray(log_weights, dtype=np.float64)
    return logsumexp(log_weights, axis=-1) - np.log(log_weights.shape[-1])


def snis(
    log_weights: Float[np.ndarray, "*batch traces"], scores: Float[np.ndarray, "*batch traces parameters"]
) -> Float[np.ndarray, "*batch parameters"]:
    """Self-normalised importance sampling, ``sum_k w_k s_k / sum_k w_k``, from K draws of q.

    Its bias does not shrink with the number of prompts: it shifts alpha by ``E(g_t - g_e) . bias / A``.

    >>> snis(np.log([1.0, 3.0]), np.array([[0.0], [4.0]]))
    array([3.])
    """
    return np.einsum("...k,...kd->...d", normalised_weights(log_weights), np.asarray(scores, dtype=np.float64))


def anchored_snis(
    log_weights: Float[np.ndarray, "*batch traces"], scores: Float[np.ndarray, "*batch traces parameters"]
) -> Float[np.ndarray, "*batch parameters"]:
    """`snis` with the anchor first: trace 0 from the exact posterior pi(r | x, y), traces 1 .. K-1 from q.

    Exactly unbiased for S(y) at any K: with ``r_0 ~ w q / Z`` the joint density of the K traces is ``w_0 / Z`` times
    that of K draws of q, and averaging over which of them is called the anchor turns the ratio into a plain mean. At
    temperature 1 every generated (r, y) supplies its own anchor; K = 1 is that single trace.

    The value is symmetric in the traces; this name exists to say which of them the caller must supply.
    """
    return snis(log_weights, scores)


def antithetic_difference(functional: Functional, indices: Int[np.ndarray, " traces"]) -> Array:
    """``f(all) - (f(first half) + f(second half)) / 2``, the correction of one level."""
    half = len(indices) // 2
    if half * 2 != len(indices):
        raise UserError(f"the antithetic difference needs an even number of traces, got {len(indices)}.")
    return functional(indices) - (functional(indices[:half]) + functional(indices[half:])) / 2


def level_probabilities(levels: int) -> Float[np.ndarray, " levels"]:
    """``p_l ~ 2^(-3 l / 2)`` for l = 1 .. levels, between the cost (2^l) and the variance (2^(-2 l)) of a level.

    >>> level_probabilities(2).round(3)
    array([0.739, 0.261])
    """
    weights = 2.0 ** (-1.5 * np.arange(1, levels + 1))
    return weights / weights.sum()


def multilevel(functional: Functional, traces: int, level: int, *, base: int = 1, levels: int | None = None) -> Array:
    """Single-term antithetic multilevel estimate, ``mean f(blocks of base traces) + Delta_level / p_level``.

    Draw ``level`` from `level_probabilities` and provide ``base * 2^level`` independent, identically drawn traces (no
    anchor among them: the halves must look alike). The expectation telescopes to that of f on ``base * 2^levels``
    traces, ``E f_0 + sum_l E Delta_l``: with the number of levels capped, what bias remains is that of f at the cap.

    Args:
        functional: Statistic of a subset of the traces, such as `snis` of them, or the whole of
            ``-beta sigmoid(-M) (S(y+) - S(y-))``, whose second nonlinearity is corrected as well.
        traces: Traces at hand, ``base * 2^level``.
        level: The level drawn, 1 .. levels.
        base: Traces at level 0.
        levels: Number of levels that ``level`` was drawn from.

    Raises:
        UserError: The number of traces does not fit the level.
    """
    top = level if levels is None else levels
    if not 1 <= level <= top or traces != base * 2**level:
        raise UserError(f"level {level} of {top} needs {base * 2**level} traces, got {traces}; draw that many.")
    indices = np.arange(traces)
    ground = np.mean([functional(block) for block in indices.reshape(-1, base)], axis=0)
    return ground + antithetic_difference(functional, indices) / level_probabilities(top)[level - 1]


def jackknife(functional: Functional, traces: int) -> Array:
    """``K f(all) - (K - 1) mean_k f(all but k)``: removes the bias of order 1/K (JVI for ``log_mean_weight``)."""
    if traces < 2:
        raise UserError("the jackknife over traces needs at least two of them; raise the number of traces per answer.")
    indices = np.arange(traces)
    without = np.mean([functional(np.delete(indices, k)) for k in indices], axis=0)
    return traces * functional(indices) - (traces - 1) * without


@dataclass(frozen=True)
class SnisBias:
    """Exact quantities of a finite trace space and the leading-order biases they predict at K traces.

    Attributes:
        score: ``-E_q[w^2 (s - S)] / (K (E_q w)^2)``, bias of `snis`, ``[d]``.
        log_marginal: ``-Var_q(w / E_q w) / (2 K)``, bias of `log_mean_weight`.
    """

    score: Array
    log_marginal: float


def predicted_snis_bias(
    proposal: Float[np.ndarray, " space"],
    log_weights: Float[np.ndarray, " space"],
    scores: Float[np.ndarray, "space parameters"],
    traces: int,
) -> SnisBias:
    """Leading-order bias of `snis` and `log_mean_weight` with K traces, from the whole trace space.

    Args:
        proposal: q of every trace.
        log_weights: log w of every trace.
        scores: Score of every trace.
        traces: K.
    """
    q = np.asarray(proposal, dtype=np.float64)
    w = np.exp(np.asarray(log_weights) - logsumexp(log_weights, b=q))
    centred = np.asarray(scores) - (q * w) @ scores
    return SnisBias(-(q * w**2) @ centred / traces, float(-(q @ (w - 1) ** 2) / (2 * traces)))
