"""log pi_ref of pairs: by the disabled adapter in every step, or taken once before the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.gradients.pair_gradients import pair_sequences
from bvpo_stats.gradients.references import check_stored_values, stored_pair_values
from bvpo_stats.model.batching import Batch
from bvpo_stats.model.completion_logprobs import completion_logprobs
from bvpo_stats.model.head import sequence_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import log_probabilities
from bvpo_stats.records import PreferencePair

NamedBatch = tuple[Batch, Sequence[PreferencePair], Sequence[str]]
"""A batch of pairs, chosen and rejected in turn, the pairs, and how errors name the rows."""

_CHECKED = 8  # stored values that are compared with the model


class DisabledAdapter:
    """The reference is the model with its adapter disabled."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(self, batches: Sequence[NamedBatch]) -> list[Tensor]:
        """Log pi_ref of the rows of some batches."""
        with self._policy.reference() as model:  # switching an adapter off and on costs as much as a small forward
            return [sequence_logprobs(log_probabilities(model, batch, names=names)) for batch, _, names in batches]


class StoredReference:
    """The reference's log-probabilities, known beforehand."""

    def __init__(self, values: dict[tuple[str, str], tuple[float, float]]) -> None:
        self.values = values

    def __call__(self, batches: Sequence[NamedBatch]) -> list[Tensor]:
        """Log pi_ref of the rows of some batches, chosen and rejected in turn."""
        return [
            torch.tensor(
                [value for pair in pairs for value in self.values[pair.prompt_id, pair.mode]],
                dtype=torch.float64,
                device=batch.input_ids.device,
            )
            for batch, pairs, _ in batches
        ]


def precompute_reference(
    policy: Policy, pairs: Sequence[PreferencePair], *, max_tokens: int, share: tuple[int, int] = (0, 1)
) -> dict[tuple[str, str], tuple[float, float]]:
    """Log pi_ref of pairs: stored values of the records, the rest by forward passes.

    Args:
        policy: The policy before its first step: its reference is the disabled adapter, or the model itself.
        pairs: The pairs.
        max_tokens: Padded tokens per forward.
        share: (rank, processes): which part of the forward passes is this process's.

    Returns:
        (prompt, mode) to log pi_ref of the chosen and the rejected response; those of the share.

    Raises:
        UserError: A stored value is not the reference's, or a log-probability is not finite; the record is named.
    """
    stored = [value for pair in pairs for value in stored_pair_values(pair)]
    check_stored_values(policy, stored, _CHECKED)
    mine = list(pairs)[share[0] :: share[1]]
    known: dict[tuple[str, str], tuple[float, float]] = {
        (p.prompt_id, p.mode): (p.ref_chosen_logps, p.ref_rejected_logps)
        for p in mine
        if p.ref_chosen_logps is not None and p.ref_rejected_logps is not None
    }
    missing = [pair for pair in mine if (pair.prompt_id, pair.mode) not in known]
    if missing:
        sequences, names = pair_sequences(missing)
        with policy.reference():
            logps: list[Float[Any, "temperatures tokens"]] = completion_logprobs(
                policy, sequences, names, max_tokens=max_tokens
            )
        totals = [float(tokens.sum()) for tokens in logps]
        for number, pair in enumerate(missing):
            known[pair.prompt_id, pair.mode] = (totals[2 * number], totals[2 * number + 1])
    return known
