"""Is theta = theta_ref, and do stored reference log-probabilities fit the policy's reference?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Example
from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import completion_logprobs
from bvpo_stats.records import PreferencePair

# Difference of stored and recomputed log-probabilities that rounding explains, in nats per token. A wrong model,
# adapter or temperature is off by tenths.
RECORD_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class StoredLogProb:
    """One stored log-probability under the reference.

    Attributes:
        name: How errors call it.
        sequence: What it is of.
        tokens: Number of leading completion tokens that it sums over.
        temperature: At which temperature.
        value: In nats.
    """

    name: str
    sequence: TokenSequence
    tokens: int
    temperature: float
    value: float


def stored_log_probs(examples: Sequence[Example]) -> Iterator[StoredLogProb]:
    """All stored reference log-probabilities of pairs and traces that are known."""
    for example in examples:
        for pair in example.both:
            yield from stored_pair_values(pair)
        for side, bank in example.sides:
            for trace in (bank.own, *bank.same_answer, *bank.chain, *bank.prior):
                sequence = TokenSequence(trace.prompt_ids, trace.completion_ids)
                name = f"of the {trace.source} trace {trace.index} of prompt {trace.prompt_id} ({side})"
                for field, tokens, temperature, value in (
                    ("joint_logp", len(trace.completion_ids), 1.0, trace.joint_logp),
                    ("trace_logp", trace.answer_start, trace.temperature, trace.trace_logp),
                ):
                    if not math.isnan(value) and temperature is not None:
                        yield StoredLogProb(f"{field} {name}", sequence, tokens, temperature, value)


def stored_pair_values(pair: PreferencePair) -> Iterator[StoredLogProb]:
    """The stored reference log-probabilities of one pair."""
    for side, ids, value in (
        ("chosen", pair.chosen_ids, pair.ref_chosen_logps),
        ("rejected", pair.rejected_ids, pair.ref_rejected_logps),
    ):
        if value is not None:
            name = f"ref_{side}_logps of the {pair.mode} pair of prompt {pair.prompt_id}"
            yield StoredLogProb(name, TokenSequence(pair.prompt_ids, ids), len(ids), 1.0, value)


def check_stored_log_probs(
    policy: Policy, examples: Sequence[Example], checked: int, *, tolerance: float | None = None
) -> int:
    """Compares a sample of stored reference log-probabilities with the policy's own reference.

    Args:
        policy: The policy; its reference is the model with the adapter disabled.
        examples: The records.
        checked: How many values, spread evenly; 0 for none.
        tolerance: Nats per token; None for :data:`RECORD_TOLERANCES` of the model's dtype.

    Returns:
        Number of values compared.

    Raises:
        UserError: Names the first record that does not match, with both values.
    """
    return check_stored_values(policy, list(stored_log_probs(examples)), checked, tolerance=tolerance)


def check_stored_values(
    policy: Policy, stored: Sequence[StoredLogProb], checked: int, *, tolerance: float | None = None
) -> int:
    """`check_stored_log_probs` for given values."""
    if checked < 1 or not stored:
        return 0
    step = max(1, len(stored) // checked)
    sample = stored[::step][:checked]
    if tolerance is None:
        tolerance = max(RECORD_TOLERANCES.get(p.dtype, 0.0) for p in policy.model.parameters())
    temperatures = tuple(sorted({item.temperature for item in sample}))
    with policy.reference():
        found = completion_logprobs(
            policy, [item.sequence for item in sample], [item.name for item in sample], temperatures=temperatures
        )
    for item, values in zip(sample, found, strict=True):
        recomputed = float(values[temperatures.index(item.temperature), : item.tokens].sum())
        if not abs(recomputed - item.value) <= tolerance * item.tokens:
            raise UserError(
                f"{item.name} is {item.value:.6g}, but the reference gives {recomputed:.6g}. The record comes from "
                "another model, adapter, dtype or engine: score it again with this model, or take the reference from "
                "the disabled adapter."
            )
    return len(sample)
