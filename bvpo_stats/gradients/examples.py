"""Examples: a prompt with its D_t pair, its D_e pair and the traces that the bank holds for either answer of D_t."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy
from bvpo_stats.records import PreferencePair, TraceRecord

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True)
class SideBank:
    """What is known about traces that lead to one answer of a D_t pair.

    Attributes:
        own: The pair's own trace. Its log-probabilities are NaN where neither bank nor pair has them.
        same_answer: Independent draws of the sampler's q(r | x, y).
        chain: States of a Metropolis-Hastings chain that targets pi_ref(r | x, y) at temperature 1.
        prior: Draws of q(r | x).
    """

    own: TraceRecord
    same_answer: tuple[TraceRecord, ...]
    chain: tuple[TraceRecord, ...]
    prior: tuple[TraceRecord, ...]

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer, end of sequence included."""
        return len(self.own.completion_ids) - self.own.answer_start


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        prompt_id: The prompt: the cluster of every statistic.
        trace_pair: Its pair of D_t.
        empty_pair: Its pair of D_e.
        chosen: Traces for the chosen answer of D_t.
        rejected: Traces for the rejected answer of D_t.
    """

    prompt_id: str
    trace_pair: PreferencePair
    empty_pair: PreferencePair
    chosen: SideBank
    rejected: SideBank

    @property
    def sides(self) -> tuple[tuple[Side, SideBank], tuple[Side, SideBank]]:
        """Both sides with their names."""
        return ("chosen", self.chosen), ("rejected", self.rejected)

    @property
    def sampled_plainly(self) -> bool:
        """Whether the D_t pair was sampled at temperature 1 without top-p: then its traces are draws of pi_ref."""
        return self.trace_pair.temperature == 1.0 and self.trace_pair.top_p >= 1.0


@dataclass(frozen=True)
class Joined:
    """Examples, and what found no partner.

    Attributes:
        examples: Prompts in both D_t and D_e, in the order of D_t.
        only_trace: Number of prompts in D_t alone; left out.
        only_empty: Number of prompts in D_e alone; left out.
        only_bank: Number of prompts with traces but without both pairs; their traces are left out.
    """

    examples: tuple[Example, ...]
    only_trace: int
    only_empty: int
    only_bank: int


def join_examples(pairs: Sequence[PreferencePair], traces: Iterable[TraceRecord] = ()) -> Joined:
    """Joins D_t, D_e and the trace bank by prompt.

    Args:
        pairs: D_t and D_e records, told apart by their mode.
        traces: The trace bank.

    Raises:
        UserError: No pairs of a mode, no prompt with both, two pairs of one prompt and mode, a record without token
            ids, or a trace whose prompt or answer tokens are not the pair's. The record is named.
    """
    thinking, empty = _by_prompt(pairs, "thinking"), _by_prompt(pairs, "nothinking")
    if not thinking or not empty:
        raise UserError(
            f"There are {len(thinking)} thinking pairs (D_t) and {len(empty)} nothinking pairs (D_e); both are needed."
        )
    common = [prompt_id for prompt_id in thinking if prompt_id in empty]
    if not common:
        raise UserError(
            f"D_t and D_e share no prompts (D_t begins with {next(iter(thinking))}, D_e with {next(iter(empty))}). "
            "Make both from the same prompts: they are joined by prompt_id."
        )
    bank: dict[tuple[str, str], list[TraceRecord]] = {}
    for trace in traces:
        bank.setdefault((trace.prompt_id, trace.side), []).append(trace)
    examples = tuple(_example(thinking[prompt_id], empty[prompt_id], bank) for prompt_id in common)
    stray = {prompt_id for prompt_id, _ in bank} - set(common)
    return Joined(examples, len(thinking) - len(common), len(empty) - len(common), len(stray))


def check_identity(policy: Policy, examples: Sequence[Example]) -> None:
    """Refuses records of another model or template.

    Pairs must come from the reference: the policy's base model, or the policy itself where it has no stored adapter.

    Raises:
        UserError: Names the first record that differs.
    """
    reference = policy.identity.partition("+")[0]
    for example in examples:
        records: list[PreferencePair | TraceRecord] = [example.trace_pair, example.empty_pair]
        for _, bank in example.sides:
            records += [bank.own, *bank.same_answer, *bank.chain, *bank.prior]
        for record in records:
            kind = f"The {record.mode} pair" if isinstance(record, PreferencePair) else f"A {record.source} trace"
            if record.model != reference:
                raise UserError(
                    f"{kind} of prompt {record.prompt_id} was sampled by {record.model}, but the reference is "
                    f"{reference}. Give the model the records come from, or allow the mismatch if you know why."
                )
            if record.template != policy.template.name:
                raise UserError(
                    f"{kind} of prompt {record.prompt_id} uses the template {record.template}, but the policy's is "
                    f"{policy.template.name}. Choose it with `template`, or allow the mismatch if you know why."
                )


def _by_prompt(pairs: Sequence[PreferencePair], mode: str) -> dict[str, PreferencePair]:
    found: dict[str, PreferencePair] = {}
    for pair in pairs:
        if pair.mode != mode:
            continue
        if pair.prompt_id in found:
            raise UserError(f"Prompt {pair.prompt_id} has two {mode} pairs; keep one per prompt and mode.")
        for name, ids in (("prompt_ids", pair.prompt_ids), ("chosen_ids", pair.chosen_ids)):
            _check_ids(f"The {mode} pair of prompt {pair.prompt_id}", name, ids)
        _check_ids(f"The {mode} pair of prompt {pair.prompt_id}", "rejected_ids", pair.rejected_ids)
        found[pair.prompt_id] = pair
    return found


def _check_ids(record: str, name: str, ids: Sequence[int]) -> None:
    if not ids:
        raise UserError(
            f"{record} has no token ids ({name} is empty). Text alone does not say what the sampler saw: make the "
            "record again with `bvpo-stats sample`, `pairs` or `traces`."
        )


def _example(
    thinking: PreferencePair, empty: PreferencePair, bank: dict[tuple[str, str], list[TraceRecord]]
) -> Example:
    sides = [_side(thinking, side, bank.get((thinking.prompt_id, side), [])) for side in SIDES]
    return Example(thinking.prompt_id, thinking, empty, *sides)


def _side(pair: PreferencePair, side: Side, traces: Sequence[TraceRecord]) -> SideBank:
    own = _own_trace(pair, side)
    kinds: dict[str, list[TraceRecord]] = {"anchor": [], "same-answer": [], "mh": [], "prior": []}
    for trace in sorted(traces, key=lambda record: record.index):
        name = f"The {trace.source} trace {trace.index} of prompt {trace.prompt_id} ({side})"
        _check_ids(name, "completion_ids", trace.completion_ids)
        answer = trace.completion_ids[trace.answer_start :]
        if trace.prompt_ids != pair.prompt_ids or answer != own.completion_ids[own.answer_start :]:
            raise UserError(
                f"{name} leads to another answer or prompt than the pair's. Make the bank from these pairs with "
                "`bvpo-stats traces`."
            )
        kinds[trace.source].append(trace)
    for anchor in kinds["anchor"]:
        if anchor.completion_ids != own.completion_ids:
            raise UserError(f"The anchor of prompt {pair.prompt_id} ({side}) is not the pair's own response.")
        own = anchor
    return SideBank(own, tuple(kinds["same-answer"]), tuple(kinds["mh"]), tuple(kinds["prior"]))


def _own_trace(pair: PreferencePair, side: Side) -> TraceRecord:
    chosen = side == "chosen"
    reference = pair.ref_chosen_logps if chosen else pair.ref_rejected_logps
    return TraceRecord(
        prompt_id=pair.prompt_id,
        side=side,
        source="anchor",
        index=0,
        prompt_ids=pair.prompt_ids,
        completion_ids=pair.chosen_ids if chosen else pair.rejected_ids,
        answer_start=pair.chosen_answer_start if chosen else pair.rejected_answer_start,
        trace_logp=math.nan,
        joint_logp=math.nan if reference is None else reference,
        temperature=pair.temperature,
        model=pair.model,
        template=pair.template,
    )
