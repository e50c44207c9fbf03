"""Exact moments of g_t, g_e and m for many copies at once: every vector as coefficients of scores.

The gradient of a pair is linear in the scores, so a mean is one vector of coefficients per copy and an inner product
needs only the Gram matrix of the scores. The sums are those of `bvpo_stats.lab.oracle.exact`, without a loop over
cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.ensemble import Copies
from bvpo_stats.lab.oracle.scored import ANSWER_TOKENS, PairWeights, Scored, pair_weights
from bvpo_stats.statistics.estimates import Estimates
from bvpo_stats.statistics.summary import Array


@dataclass(frozen=True)
class CopyMoments:
    """Exact means, losses and parts of alpha, one entry a copy.

    Attributes:
        mean_t: E g_t, ``[copies, parameters]``.
        mean_e: E g_e.
        mu: E m = grad L_m.
        loss_m: L_m, ``[copies]``.
        parts: Biases, variances and products, arrays ``[copies]``.
    """

    mean_t: Float[np.ndarray, "copies parameters"]
    mean_e: Float[np.ndarray, "copies parameters"]
    mu: Float[np.ndarray, "copies parameters"]
    loss_m: Float[np.ndarray, " copies"]
    parts: Estimates


def copy_moments(oracle: Oracle, copies: Copies, objective: Objective) -> CopyMoments:
    """Exact moments of every copy.

    Args:
        oracle: Reference and data laws.
        copies: Log-probabilities and scores.
        objective: The preference loss.
    """
    table = oracle.table
    posterior, n_prompts = table.sampling.posterior, len(oracle.pair_law)
    law_t = np.einsum("xab,xra,xsb->xrasb", oracle.pair_law, posterior, posterior) / n_prompts
    law_e = oracle.empty_pair_law / n_prompts
    lengths = (table.trace_tokens + float(ANSWER_TOKENS))[:, None]
    with_trace = _weights(objective, copies.joint, table.reference.joint, lengths)
    empty = _weights(objective, copies.joint[:, :, :1], table.reference.joint[:, :1], lengths[:1])
    marginal = _weights(objective, copies.marginal[:, :, None], table.reference.marginal[:, None], ANSWER_TOKENS)
    scores = copies.scores
    # Coefficients of every score, by prompt: a response is chosen in some pairs and rejected in others.
    c_t = _coefficients(law_t, with_trace)
    c_e = np.zeros_like(c_t)
    c_e[:, :, :1] = _coefficients(law_e[:, None, :, None], empty)
    law_m = oracle.pair_law[:, None, :, None] / n_prompts
    c_m = _coefficients(law_m, marginal) * np.exp(copies.joint - copies.marginal[:, :, None])
    t, e, m = (np.einsum("nxra,nxrad->nxd", c, scores) for c in (c_t, c_e, c_m))
    mean_t, mean_e, mu = (v.sum(axis=1) for v in (t, e, m))
    gram = _gram(scores)
    second_t = _second_moment(law_t, with_trace, gram)
    second_e = _second_moment(law_e[:, None, :, None], empty, gram[:, :, :1, :, :1])
    # Given the prompt, t and e are independent; t and e above carry the prompt's probability once each.
    product_te = n_prompts * np.sum(t * e, axis=(1, 2))
    loss_m = np.sum(law_m * marginal.loss, axis=(1, 2, 3, 4, 5))
    return CopyMoments(mean_t, mean_e, mu, loss_m, _parts(mean_t, mean_e, mu, (second_t, second_e, product_te)))


def curvature_root(
    oracle: Oracle, copies: Copies, objective: Objective
) -> Float[np.ndarray, "copies cells parameters"]:
    """W with ``W'W`` the Gauss-Newton Hessian of L_m, ``sum_c P(c) l_c'' D_c D_c'``, ``D = S(y+) - S(y-)``.

    Scores mapped by W (`in_metric`) have inner products ``x' H y``.

    Raises:
        UserError: A loss other than DPO.
    """
    if objective.name != "dpo":
        raise UserError("the Gauss-Newton curvature is written out for DPO only; choose the sigmoid loss.")
    x, a, b = np.nonzero(oracle.pair_law > 0)
    posterior = np.exp(copies.joint - copies.marginal[:, :, None])
    S = np.einsum("nxra,nxrad->nxad", posterior, copies.scores)
    ratio = copies.marginal - oracle.table.reference.marginal
    z = objective.beta * (ratio[:, x, a] - ratio[:, x, b])
    second = objective.beta**2 * expit(z) * expit(-z) * oracle.pair_law[x, a, b] / len(oracle.pair_law)
    return np.sqrt(second)[..., None] * (S[:, x, a] - S[:, x, b])


def in_metric(copies: Copies, root: Float[np.ndarray, "copies cells parameters"]) -> Copies:
    """The same copies with scores mapped by a root of a metric: `copy_moments` of them are moments in that metric."""
    return Copies(copies.joint, np.einsum("nxrad,ncd->nxrac", copies.scores, root))


def _weights(objective: Objective, log_prob: Array, log_ref: Array, tokens: Array | float) -> PairWeights:
    """All pairs of responses of a prompt: ``[copies, prompts, r, a, s, b]``, (r, a) chosen and (s, b) rejected."""
    shape = log_prob.shape
    ref, length = (np.broadcast_to(np.asarray(x, dtype=np.float64), shape) for x in (log_ref, tokens))
    nothing = np.zeros((1, 1))  # weights need no scores
    later, earlier = (Ellipsis, None, None), (slice(None), slice(None), None, None)
    chosen, rejected = (Scored(log_prob[k], ref[k], length[k], nothing) for k in (later, earlier))
    return pair_weights(objective, chosen, rejected)


def _coefficients(law: Array, weights: PairWeights) -> Array:
    return (law * weights.chosen).sum(axis=(4, 5)) + (law * weights.rejected).sum(axis=(2, 3))


def _gram(scores: Array) -> Array:
    """Inner products of the scores of one prompt, ``[copies, prompts, r, a, s, b]``."""
    flat = scores.reshape(*scores.shape[:2], -1, scores.shape[-1])
    sizes = scores.shape[2:4]
    return np.matmul(flat, np.swapaxes(flat, -1, -2)).reshape(*scores.shape[:2], *sizes, *sizes)


def _second_moment(law: Array, weights: PairWeights, gram: Array) -> Array:
    """E norm(u s_i + v s_j)^2 over pairs, ``[copies]``."""
    square = np.einsum("nxrara->nxra", gram)
    u, v = weights.chosen, weights.rejected
    terms = u**2 * square[..., None, None] + v**2 * square[:, :, None, None] + 2 * u * v * gram
    return np.asarray((law * terms).sum(axis=(1, 2, 3, 4, 5)))


def _parts(mean_t: Array, mean_e: Array, mu: Array, second: tuple[Array, Array, Array]) -> Estimates:
    def dot(x: Array, y: Array) -> Array:
        return np.asarray(np.einsum("nd,nd->n", x, y))

    b_t, b_e = mean_t - mu, mean_e - mu
    second_t, second_e, product_te = second
    return Estimates(
        bias_trace_sq=dot(b_t, b_t),
        bias_empty_sq=dot(b_e, b_e),
        bias_cross=dot(b_t, b_e),
        var_trace=second_t - dot(mean_t, mean_t),
        var_empty=second_e - dot(mean_e, mean_e),
        var_cross=product_te - dot(mean_t, mean_e),
        marginal_sq=dot(mu, mu),
        trace_dot_marginal=dot(mean_t, mu),
        empty_dot_marginal=dot(mean_e, mu),
        trace_sq=dot(mean_t, mean_t),
        empty_sq=dot(mean_e, mean_e),
        trace_dot_empty=dot(mean_t, mean_e),
    )
