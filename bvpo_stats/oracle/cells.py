"""Moments of the gradients given the prompt and the answers: sums over traces as matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from bvpo_stats.oracle.build import Oracle


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


def cell_moments(oracle: Oracle, beta: float = 0.1) -> CellMoments:
    """The conditional moments of every cell (x, y+, y-).

    Sums over trace pairs are matrix products over the two trace axes: no pair's gradient is ever formed.

    Args:
        oracle: The policy at theta, its reference and its data laws.
        beta: DPO's beta.
    """
    table, grammar = oracle.table, oracle.grammar
    cells = (grammar.n_prompts, grammar.n_answers, grammar.n_answers)
    n_parameters = table.scores.shape[-1]
    mean_t, marginal, empty = (np.zeros((*cells, n_parameters)) for _ in range(3))
    square_t, loss_t, loss_m, loss_e = (np.zeros(cells) for _ in range(4))
    posterior, delta = table.sampling.posterior, table.log_ratio
    marginal_delta, marginal_scores = table.marginal_log_ratio, table.marginal_scores
    for cell in np.argwhere(oracle.pair_law > 0):
        x, a, b = cell.tolist()
        sides = tuple(
            TraceSide(posterior[x, :, answer], delta[x, :, answer], table.scores[x, :, answer]) for answer in (a, b)
        )
        mean_t[x, a, b], square_t[x, a, b], loss_t[x, a, b] = trace_pair_moments(sides[0], sides[1], beta)
        margin = beta * (marginal_delta[x, a] - marginal_delta[x, b])
        marginal[x, a, b] = dpo_weight(margin, beta) * (marginal_scores[x, a] - marginal_scores[x, b])
        loss_m[x, a, b] = dpo_loss(margin)
    for cell in np.argwhere(oracle.empty_pair_law > 0):
        x, a, b = cell.tolist()
        margin = beta * (delta[x, 0, a] - delta[x, 0, b])
        empty[x, a, b] = dpo_weight(margin, beta) * (table.scores[x, 0, a] - table.scores[x, 0, b])
        loss_e[x, a, b] = dpo_loss(margin)
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
        delta: Delta(r, y), the log-ratio of policy to reference.
        scores: s(r, y).
    """

    law: Float[np.ndarray, " traces"]
    delta: Float[np.ndarray, " traces"]
    scores: Float[np.ndarray, "traces parameters"]


def trace_pair_moments(
    chosen: TraceSide, rejected: TraceSide, beta: float
) -> tuple[Float[np.ndarray, " parameters"], float, float]:
    r"""E g_t, E norm(g_t)^2 and E l_t over independent traces r+ and r-.

    With p_ij = q(i) q(j), w_ij = -beta sigmoid(-m_ij) and g_ij = w_ij (s_i - s_j),

        E g_t         = sum_i (sum_j p_ij w_ij) s_i - sum_j (sum_i p_ij w_ij) s_j
        E norm(g_t)^2 = sum_i (sum_j p_ij w_ij^2) norm(s_i)^2 + the same over j - 2 sum_ij p_ij w_ij^2 s_i . s_j.

    Args:
        chosen: The side of y+.
        rejected: The side of y-.
        beta: DPO's beta.
    """
    # Differences are shift-invariant: scores are centred first, so that the last sum cancels less.
    centre = chosen.law @ chosen.scores
    plus, minus = chosen.scores - centre, rejected.scores - centre
    margin = beta * (chosen.delta[:, None] - rejected.delta[None, :])
    weight = dpo_weight(margin, beta)
    square = weight**2
    # What remains for each trace of one side once the other side is averaged out.
    first = chosen.law * (weight @ rejected.law), rejected.law * (chosen.law @ weight)
    second = chosen.law * (square @ rejected.law), rejected.law * (chosen.law @ square)
    mixed = chosen.law @ np.sum(plus * (square @ (rejected.law[:, None] * minus)), axis=1)
    return (
        first[0] @ plus - first[1] @ minus,
        float(second[0] @ np.sum(plus**2, axis=1) + second[1] @ np.sum(minus**2, axis=1) - 2 * mixed),
        float(chosen.law @ dpo_loss(margin) @ rejected.law),
    )


def dpo_weight(margin: Float[np.ndarray, "*pairs"], beta: float) -> Float[np.ndarray, "*pairs"]:
    """The weight w = -beta sigmoid(-m) of g = w (s+ - s-), at margin m = beta (Delta+ - Delta-)."""
    return -beta * expit(-margin)


def dpo_loss(margin: Float[np.ndarray, "*pairs"]) -> Float[np.ndarray, "*pairs"]:
    """The DPO loss -log sigmoid(m)."""
    return np.logaddexp(0.0, -margin)
