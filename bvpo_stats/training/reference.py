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
from bvpo_stats.model.head import sequence_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import completion_logprobs, log_probabilities
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

    def __init__(self, pairs: Sequence[PreferencePair], values: dict[int, tuple[float, float]]) -> None:
        """From the values of every pair, by its place among ``pairs``; a prompt may have several."""
        self._pairs = tuple(pairs)  # kept alive: pairs are looked up by identity
        self._values = {id(pair): values[place] for place, pair in enumerate(self._pairs)}

    def __call__(self, batches: Sequence[NamedBatch]) -> list[Tensor]:
        """Log pi_ref of the rows of some batches, chosen and rejected in turn."""
        return [
            torch.tensor(
                [value for pair in pairs for value in self._values[id(pair)]],
                dtype=torch.float64,
                device=batch.input_ids.device,
            )
            for batch, pairs, _ in batches
        ]


def precompute_reference(
    policy: Policy, pairs: Sequence[PreferencePair], *, max_tokens: int, share: tuple[int, int] = (0, 1)
) -> dict[int, tuple[float, float]]:
    """Log pi_ref of pairs: stored values of the records, the rest by forward passes.

    Args:
        policy: The policy before its first step: its reference is the disabled adapter, or the model itself.
        pairs: The pairs.
        max_tokens: Padded tokens per forward.
        share: (rank, processes): which part of the forward passes is this process's.

    Returns:
        Place of the pair to log pi_ref of its chosen and rejected response; those of the share.

    Raises:
        UserError: A stored value is not the reference's, or a log-probability is not finite; the record is named.
    """
    stored = [value for pair in pairs for value in stored_pair_values(pair)]
    check_stored_values(policy, stored, _CHECKED)
    mine = range(share[0], len(pairs), share[1])
    known: dict[int, tuple[float, float]] = {}
    for place in mine:
        chosen, rejected = pairs[place].ref_chosen_logps, pairs[place].ref_rejected_logps
        if chosen is not None and rejected is not None:
            known[place] = (chosen, rejected)
    missing = [place for place in mine if place not in known]
    if missing:
        sequences, names = pair_sequences([pairs[place] for place in missing])
        with policy.reference():
            logps: list[Float[Any, "temperatures tokens"]] = completion_logprobs(
                policy, sequences, names, max_tokens=max_tokens
            )
        totals = [float(tokens.sum()) for tokens in logps]
        for number, place in enumerate(missing):
            known[place] = (totals[2 * number], totals[2 * number + 1])
    return known
