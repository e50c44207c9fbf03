"""Responses by what an objective needs of them (log-probabilities, lengths, scores), and pairs of them as gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.lab.oracle.enumeration import SequenceTable

DPO = Objective()
"""The default objective."""

ANSWER_TOKENS = 2
"""Tokens of an answer, end of sequence included: the length of y where an objective averages log pi(y | x)."""


@dataclass(frozen=True)
class Scored:
    """Any number of responses, in any shape; indexing selects responses.

    Attributes:
        log_prob: Log-probability under pi_theta.
        log_ref: Log-probability under pi_ref.
        tokens: Length in tokens.
        scores: Gradient of ``log_prob``.
    """

    log_prob: Float[np.ndarray, "*responses"]
    log_ref: Float[np.ndarray, "*responses"]
    tokens: Float[np.ndarray, "*responses"]
    scores: Float[np.ndarray, "*responses parameters"]

    def __getitem__(self, index: object) -> Scored:
        fields = (self.log_prob, self.log_ref, self.tokens, self.scores)
        return Scored(*(np.asarray(field[index]) for field in fields))  # type: ignore[call-overload]


@dataclass(frozen=True)
class PairWeights:
    """An objective on pairs: grad loss = chosen * s(chosen) + rejected * s(rejected).

    Attributes:
        loss: Loss of each pair.
        chosen: Weight of the chosen response's score.
        rejected: Weight of the rejected response's score.
    """

    loss: Float[np.ndarray, "*pairs"]
    chosen: Float[np.ndarray, "*pairs"]
    rejected: Float[np.ndarray, "*pairs"]


def trace_responses(table: SequenceTable) -> Scored:
    """All (r, y) as [prompts, traces, answers]; trace 0 is the empty one, as in D_e."""
    log_prob = table.policy.joint
    tokens = np.broadcast_to(table.trace_tokens[None, :, None] + float(ANSWER_TOKENS), log_prob.shape)
    return Scored(log_prob, table.reference.joint, tokens, table.scores)


def marginal_responses(table: SequenceTable) -> Scored:
    """All y with their traces summed out, as [prompts, answers]; a length is that of the answer."""
    log_prob = table.policy.marginal
    tokens = np.full(log_prob.shape, float(ANSWER_TOKENS))
    return Scored(log_prob, table.reference.marginal, tokens, table.marginal_scores)


def pair_weights(objective: Objective, chosen: Scored, rejected: Scored) -> PairWeights:
    """The package's objective on pairs of responses whose shapes broadcast.

    Args:
        objective: The loss.
        chosen: Chosen responses.
        rejected: Rejected responses.
    """
    sides = [[side.log_prob, side.log_ref, side.tokens] for side in (chosen, rejected)]
    shape = np.broadcast_shapes(chosen.log_prob.shape, rejected.log_prob.shape)
    flat = [[torch.tensor(np.broadcast_to(part, shape).ravel()) for part in side] for side in sides]
    (log_plus, ref_plus, n_plus), (log_minus, ref_minus, n_minus) = flat
    terms = objective(PairLogps(log_plus, log_minus, n_plus, n_minus, ref_plus, ref_minus))
    values = (terms.loss, terms.chosen_weight, terms.rejected_weight)
    return PairWeights(*(value.numpy().reshape(shape) for value in values))


def pair_gradients(
    objective: Objective, chosen: Scored, rejected: Scored
) -> tuple[Float[np.ndarray, "*pairs parameters"], Float[np.ndarray, "*pairs"]]:
    """Gradient and loss of each pair, pairs matched one to one.

    Args:
        objective: The loss.
        chosen: Chosen responses.
        rejected: Rejected responses, in the same shape.
    """
    weights = pair_weights(objective, chosen, rejected)
    gradient = weights.chosen[..., None] * chosen.scores + weights.rejected[..., None] * rejected.scores
    return gradient, weights.loss
