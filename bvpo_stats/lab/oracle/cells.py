"""Moments of the gradients given the prompt and the answers: sums over traces as matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.scored import DPO, Scored, marginal_responses, pair_gradients, pair_weights, trace_responses


@dataclass(frozen=True)
class CellMoments:
    """Moments given the prompt x and the answers (y+, y-): the level at which Theorem 1 conditions.

    Indices [x, a, b] stand for prompt x, y+ = a, y- = b. Cells of probability 0 hold zeros.

    Attributes:
        pair_law: P(y+ = a, y- = b | x) in D_t.
        mean_t: E[g_t | x, y+, y-] over the traces r+, r-.
        square_t: E[norm(g_t)^2 | x, y+, y-].
        marginal: m, the gradient of the marginal loss of the pair.
        empty_pair_law: P(y'+ = a, y'- = b | x) in D_e.
        empty: g_e, which no trace enters.
        loss_t: E[l_t | x, y+, y-].
        loss_m: Marginal loss of the pair.
        loss_e: Empty-trace loss of the pair.
    """

    pair_law: Float[np.ndarray, "prompts answers answers"]
    mean_t: Float[np.ndarray, "prompts answers answers parameters"]
    square_t: Float[np.ndarray, "prompts answers answers"]
    marginal: Float[np.ndarray, "prompts answers answers parameters"]
    empty_pair_law: Float[np.ndarray, "prompts answers answers"]
    empty: Float[np.ndarray, "prompts answers answers parameters"]
    loss_t: Float[np.ndarray, "prompts answers answers"]
    loss_m: Float[np.ndarray, "prompts answers answers"]
    loss_e: Float[np.ndarray, "prompts answers answers"]


def cell_moments(oracle: Oracle, objective: Objective = DPO) -> CellMoments:
    """The conditional moments of every cell (x, y+, y-).

    Sums over trace pairs are matrix products over the two trace axes: no pair's gradient is ever formed.

    Args:
        oracle: The policy at theta, its reference and its data laws.
        objective: The preference loss; its marginal form has log pi(y | x) for the log-probability of a response.
    """
    responses, marginals = trace_responses(oracle.table), marginal_responses(oracle.table)
    cells, n_parameters = oracle.pair_law.shape, responses.scores.shape[-1]
    mean_t, marginal, empty = (np.zeros((*cells, n_parameters)) for _ in range(3))
    square_t, loss_t, loss_m, loss_e = (np.zeros(cells) for _ in range(4))
    posterior = oracle.table.sampling.posterior
    for cell in np.argwhere(oracle.pair_law > 0):
        x, a, b = cell.tolist()
        plus, minus = (TraceSide(posterior[x, :, y], responses[x, :, y]) for y in (a, b))
        mean_t[x, a, b], square_t[x, a, b], loss_t[x, a, b] = trace_pair_moments(plus, minus, objective)
    x, a, b = where = np.nonzero(oracle.pair_law > 0)
    marginal[where], loss_m[where] = pair_gradients(objective, marginals[x, a], marginals[x, b])
    x, a, b = where = np.nonzero(oracle.empty_pair_law > 0)
    empty[where], loss_e[where] = pair_gradients(objective, responses[x, 0, a], responses[x, 0, b])
    return CellMoments(
        pair_law=oracle.pair_law,
        mean_t=mean_t,
        square_t=square_t,
        marginal=marginal,
        empty_pair_law=oracle.empty_pair_law,
        empty=empty,
        loss_t=loss_t,
        loss_m=loss_m,
        loss_e=loss_e,
    )


@dataclass(frozen=True)
class TraceSide:
    """One side (x, y) of a pair, over its traces.

    Attributes:
        law: q(r | x, y), the law of the trace in the data.
        responses: (r, y) for every trace r.
    """

    law: Float[np.ndarray, " traces"]
    responses: Scored


def trace_pair_moments(
    chosen: TraceSide, rejected: TraceSide, objective: Objective
) -> tuple[Float[np.ndarray, " parameters"], float, float]:
    r"""E g_t, E norm(g_t)^2 and E l_t over independent traces r+ and r-.

    With p_ij = q(i) q(j), score weights u_ij and v_ij, and g_ij = u_ij s_i + v_ij s_j,

        E g_t         = sum_i (sum_j p_ij u_ij) s_i + sum_j (sum_i p_ij v_ij) s_j
        E norm(g_t)^2 = sum_i (sum_j p_ij u_ij^2) norm(s_i)^2 + sum_j (sum_i p_ij v_ij^2) norm(s_j)^2
                        + 2 sum_ij p_ij u_ij v_ij s_i . s_j.

    Args:
        chosen: The side of y+.
        rejected: The side of y-.
        objective: The preference loss.
    """
    p, q = chosen.law, rejected.law
    plus, minus = chosen.responses.scores, rejected.responses.scores
    weights = pair_weights(objective, chosen.responses[:, None], rejected.responses[None, :])
    u, v = weights.chosen, weights.rejected
    mean = (p * (u @ q)) @ plus + (q * (p @ v)) @ minus
    squares = (p * (u**2 @ q)) @ np.sum(plus**2, axis=1) + (q * (p @ v**2)) @ np.sum(minus**2, axis=1)
    mixed = p @ np.sum(plus * ((u * v) @ (q[:, None] * minus)), axis=1)
    return mean, float(squares + 2 * mixed), float(p @ weights.loss @ q)
