"""log pi_ref, by one rule wherever it is needed: theta itself at theta_ref, a record's stored value, the base model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.distributed import World
from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Example
from bvpo_stats.gradients.objectives import PairLogps
from bvpo_stats.model.batching import Batch, TokenSequence, length_batches
from bvpo_stats.model.head import sequence_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import batch_of, completion_logprobs, log_probabilities
from bvpo_stats.progress import stages
from bvpo_stats.records import PreferencePair

_CHECKED_PAIRS = 8  # stored values that are compared with the model before training takes them all

# Difference of stored and recomputed log-probabilities that rounding explains, in nats per token. A wrong model,
# adapter or temperature is off by tenths.
RECORD_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class PairBatch:
    """Pairs that go through the model together.

    Attributes:
        members: Their numbers among the pairs that were planned.
        pairs: The pairs.
        batch: Their sequences, chosen and rejected in turn.
        names: How errors name the rows.
        reference: log pi_ref of the rows; None where the loss has no reference.
        spare: Whether it is run only to keep step with processes that have more of them, and counts for nothing.
    """

    members: list[int]
    pairs: list[PreferencePair]
    batch: Batch
    names: list[str]
    reference: Float[Tensor, " rows"] | None = None
    spare: bool = False

    def logps(self, policy: Float[Tensor, " rows"]) -> PairLogps[Tensor]:
        """The pairs' log-probabilities from log pi_theta of the rows."""
        tokens, reference = self.batch.completion_mask.sum(dim=1).to(policy.dtype), self.reference
        contrast = (None, None) if reference is None else (reference[0::2], reference[1::2])
        return PairLogps(policy[0::2], policy[1::2], tokens[0::2], tokens[1::2], *contrast)


def pair_batches(
    policy: Policy,
    pairs: Sequence[PreferencePair],
    reference: Reference | None,
    *,
    max_tokens: int,
    max_padding: float = 0.25,
    world: World | None = None,
) -> list[PairBatch]:
    """Whole pairs as batches under a budget of padded tokens, longest first, with log pi_ref where it is needed.

    Args:
        policy: The policy.
        pairs: The pairs.
        reference: Where log pi_ref comes from.
        max_tokens: Padded tokens of a batch.
        max_padding: Largest share of padding.
        world: Processes that must all run equally many: who has fewer runs the last one again, as a spare.

    Raises:
        UserError: A sequence is empty or too long, or a log-probability is not finite; the pair is named.
    """
    if not pairs:
        return []
    sequences, names = pair_sequences(pairs)
    lengths = [len(sequence) for sequence in sequences]
    owners = [row // 2 for row in range(len(sequences))]
    found = []
    for part in length_batches(lengths, max_tokens=max_tokens, groups=owners, max_padding=max_padding):
        members = sorted({row // 2 for row in part})
        rows = [2 * member + side for member in members for side in (0, 1)]
        batch_names = [names[row] for row in rows]
        batch = batch_of(policy, [sequences[row] for row in rows], batch_names)
        found.append(PairBatch(members, [pairs[m] for m in members], batch, batch_names))
    found += [replace(found[-1], spare=True)] * ((world or World()).most(len(found)) - len(found))
    return found if reference is None else reference.added_to(found)


def pair_sequences(pairs: Sequence[PreferencePair]) -> tuple[list[TokenSequence], list[str]]:
    """Token sequences of pairs, chosen and rejected in turn, and how errors name them."""
    sequences, names = [], []
    for pair in pairs:
        for side, completion in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            sequences.append(TokenSequence(tuple(pair.prompt_ids), tuple(completion)))
            names.append(f"pair {pair.prompt_id} ({pair.mode}, {side})")
    return sequences, names


@dataclass(frozen=True)
class Reference:
    """Where log pi_ref comes from.

    At theta_ref it is log pi_theta itself. Elsewhere stored values are taken where they are allowed and there are any,
    and the rest comes from the model with its adapter disabled.

    Attributes:
        policy: The policy; its reference is the model with the adapter disabled.
        at_reference: Whether theta = theta_ref, so that no value is needed at all.
        stored: Whether stored values are taken.
        max_tokens: Budget of padded tokens per forward.
        max_padding: Largest share of padding per forward.
    """

    policy: Policy
    at_reference: bool = False
    stored: bool = True
    max_tokens: int = 16_384
    max_padding: float = 0.25

    def of_sequences(
        self, sequences: Sequence[TokenSequence], names: Sequence[str], stored: Float[np.ndarray, " sequences"]
    ) -> Float[np.ndarray, " sequences"] | None:
        """Log pi_ref of sequences; None at theta_ref.

        Args:
            sequences: The sequences.
            names: How errors name them.
            stored: Stored values, NaN where there is none.
        """
        if self.at_reference:
            return None
        values = stored.copy() if self.stored else np.full(len(stored), math.nan)
        missing = np.flatnonzero(np.isnan(values)).tolist()
        if missing:
            with self.policy.reference():
                values[missing] = self.forward([sequences[i] for i in missing], [names[i] for i in missing])
        return values

    def added_to(self, batches: Sequence[PairBatch]) -> list[PairBatch]:
        """Batches of pairs with log pi_ref of their rows, in one pass: switching an adapter off and on is not free.

        Pairs change hands through :func:`fill_reference` where their values are to be taken once and for all.
        """
        found: list[Tensor | None] = []
        for micro in batches:
            values = [value for pair in micro.pairs for value in (pair.ref_chosen_logps, pair.ref_rejected_logps)]
            known = self.stored and None not in values
            device = micro.batch.input_ids.device
            found.append(torch.tensor(values, dtype=torch.float64, device=device) if known else None)
        if any(values is None for values in found):
            with self.policy.reference() as model:
                found = [
                    sequence_logprobs(log_probabilities(model, micro.batch, names=micro.names))
                    if known is None
                    else known
                    for micro, known in zip(batches, found, strict=True)
                ]
        return [replace(micro, reference=logps) for micro, logps in zip(batches, found, strict=True)]

    def tempered(
        self, sequences: Sequence[TokenSequence], names: Sequence[str], temperature: Float[np.ndarray, " sequences"]
    ) -> Float[np.ndarray, " sequences"]:
        """Log q_T of sequences, pi_ref sampled token by token at temperature T; NaN where T is NaN."""
        values = np.full(len(sequences), math.nan)
        for each in np.unique(temperature[~np.isnan(temperature)]).tolist():
            rows = np.flatnonzero(temperature == each).tolist()
            with self.policy.reference():
                found = completion_logprobs(
                    self.policy,
                    [sequences[i] for i in rows],
                    [names[i] for i in rows],
                    temperatures=(each,),
                    max_tokens=self.max_tokens,
                )
            values[rows] = [float(tokens.sum()) for tokens in found]
        return values

    def forward(self, sequences: Sequence[TokenSequence], names: Sequence[str]) -> Float[np.ndarray, " sequences"]:
        """Log-probabilities under the policy as it stands, by passes of their own."""
        found = np.zeros(len(sequences))
        lengths = [len(sequence) for sequence in sequences]
        for part in stages(length_batches(lengths, max_tokens=self.max_tokens, max_padding=self.max_padding)):
            some = [names[i] for i in part]
            logps = log_probabilities(
                self.policy.model, batch_of(self.policy, [sequences[i] for i in part], some), names=some
            )
            found[part] = to_numpy(sequence_logprobs(logps))
        return found


def to_numpy(values: Tensor) -> Float[np.ndarray, " sequences"]:
    """Log-probabilities in float64 on the CPU."""
    return values.detach().double().cpu().numpy()


def fill_reference(
    policy: Policy,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    world: World | None = None,
    sharded: bool = False,
) -> list[Example]:
    """The examples with log pi_ref stored in all of their pairs: values of the records, the rest by forward passes.

    Args:
        policy: The policy before its first step: its reference is the disabled adapter, or the model itself.
        examples: The examples.
        max_tokens: Padded tokens per forward.
        world: The processes, which share the passes.
        sharded: Whether they hold shards of the weights, so that all must run equally many passes.

    Raises:
        UserError: A stored value is not the reference's, or a log-probability is not finite; the record is named.
    """
    world = world or World()
    pairs = [pair for example in examples for pair in example.pairs]
    check_stored(policy, [value for pair in pairs for value in stored_pair_values(pair)], _CHECKED_PAIRS)
    missing = [k for k, pair in enumerate(pairs) if None in (pair.ref_chosen_logps, pair.ref_rejected_logps)]
    mine = missing[world.rank :: world.size]
    if sharded and missing and not mine:
        mine = missing[:1]  # nothing of its own, but the others cannot run without it
    totals: list[float] = []
    if mine:
        sequences, names = pair_sequences([pairs[k] for k in mine])
        with policy.reference():
            found = completion_logprobs(
                policy, sequences, names, max_tokens=max_tokens, world=world if sharded else None
            )
        totals = [float(tokens.sum()) for tokens in found]
    every = world.broadcast(world.gather(dict(zip(mine, zip(totals[0::2], totals[1::2], strict=True), strict=True))))
    for part in every:
        for k, (chosen, rejected) in part.items():
            pairs[k] = replace(pairs[k], ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    filled = iter(pairs)
    return [
        replace(
            example,
            trace_pair=None if example.trace_pair is None else next(filled),
            empty_pair=None if example.empty_pair is None else next(filled),
        )
        for example in examples
    ]


def without_reference(example: Example) -> Example:
    """The example without the log pi_ref that its pairs were stored with."""
    trace, empty = (
        None if pair is None else replace(pair, ref_chosen_logps=None, ref_rejected_logps=None)
        for pair in (example.trace_pair, example.empty_pair)
    )
    return replace(example, trace_pair=trace, empty_pair=empty)


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
    return check_stored(policy, list(stored_log_probs(examples)), checked, tolerance=tolerance)


def check_stored(
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
