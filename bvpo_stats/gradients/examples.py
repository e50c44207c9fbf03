"""Examples: D_t, D_e and the trace bank joined by prompt, the one join that everything downstream starts from.

An example is one pair of D_t with one pair of D_e of the same prompt. A prompt may have several: its i-th D_t pair goes
with its i-th D_e pair, and all of them are one cluster of the statistics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from bvpo_stats.errors import UserError, check_choice, check_kind, rows_of
from bvpo_stats.model.policy import Policy
from bvpo_stats.records import MODES, MOST_LOST, Mode, PreferencePair, Side, TraceRecord, content_of

Unmatched = Literal["error", "drop"]
SETS: dict[Mode, str] = {"thinking": "D_t", "nothinking": "D_e"}


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
    """One pair of D_t with one of D_e of the same prompt.

    Attributes:
        prompt_id: The prompt: the cluster of every statistic.
        trace_pair: Its pair of D_t; None where D_t is not needed (training with alpha = 0).
        empty_pair: Its pair of D_e; None where D_e is not needed (alpha = 1).
        number: Which of the prompt's examples this is.
        traces: The bank's traces for either answer of the D_t pair.
    """

    prompt_id: str
    trace_pair: PreferencePair | None
    empty_pair: PreferencePair | None
    number: int = 0
    traces: tuple[TraceRecord, ...] = ()

    @property
    def key(self) -> str:
        """Unique name: the prompt's id, with a number behind it from the second example on."""
        return f"{self.prompt_id}#{self.number}" if self.number else self.prompt_id

    @property
    def pairs(self) -> tuple[PreferencePair, ...]:
        """The pairs there are, D_t's first."""
        return tuple(pair for pair in (self.trace_pair, self.empty_pair) if pair is not None)

    @property
    def records(self) -> tuple[PreferencePair | TraceRecord, ...]:
        """Pairs and traces."""
        return (*self.pairs, *self.traces)

    @property
    def both(self) -> tuple[PreferencePair, PreferencePair]:
        """The D_t pair and the D_e pair.

        Raises:
            UserError: The example was joined without one of them.
        """
        if self.trace_pair is None or self.empty_pair is None:
            raise UserError(f"Prompt {self.prompt_id} was joined without its D_t or its D_e pair; both are needed.")
        return self.trace_pair, self.empty_pair

    @functools.cached_property
    def chosen(self) -> SideBank:
        """Traces for the chosen answer of D_t."""
        return _side_bank(self.both[0], "chosen", self.traces)

    @functools.cached_property
    def rejected(self) -> SideBank:
        """Traces for the rejected answer of D_t."""
        return _side_bank(self.both[0], "rejected", self.traces)

    @property
    def sides(self) -> tuple[tuple[Side, SideBank], tuple[Side, SideBank]]:
        """Both sides with their names."""
        return ("chosen", self.chosen), ("rejected", self.rejected)

    @property
    def sampled_plainly(self) -> bool:
        """Whether the traces of the D_t pair are draws of pi_ref: temperature 1, no top-p, no top-k, nothing cut."""
        return self.not_plain is None

    @property
    def not_plain(self) -> str | None:
        """Why the traces of the D_t pair do not count as draws of pi_ref; None where they do."""
        pair = self.both[0]
        unknown = {
            "the temperature of D_t": pair.temperature,
            "the top-p of D_t": pair.top_p,
            "the top-k of D_t (0 for none)": pair.top_k,
            "the model that sampled D_t": pair.model,
            "where the chosen answers of D_t begin": pair.chosen_answer_start,
            "where the rejected answers of D_t begin": pair.rejected_answer_start,
            "which share of the responses behind D_t was cut (`cut_share`)": pair.cut_share,
            "which share of the responses behind D_t never closed its trace (`unclosed_share`)": pair.unclosed_share,
        }
        missing = next((what for what, value in unknown.items() if value is None), None)
        if missing is not None:
            return f"{missing} is not recorded"
        if pair.temperature != 1.0 or (pair.top_p or 0) < 1.0:
            return f"pairs were sampled at temperature {pair.temperature:g} and top-p {pair.top_p:g}, not 1 and 1"
        if pair.top_k:
            return f"pairs were sampled with top-k {pair.top_k}, not without"
        cut, unclosed = pair.cut_share or 0.0, pair.unclosed_share or 0.0
        if cut + unclosed > MOST_LOST:
            return (
                f"{cut:.1%} of the responses behind D_t were cut and {unclosed:.1%} never closed their trace, which "
                f"selects by trace (up to {MOST_LOST:.0%} is taken for none)"
            )
        return None

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in self.pairs)


@dataclass(frozen=True)
class Joined:
    """Examples, and what was left out.

    Attributes:
        examples: In the order of D_t, those of a prompt together.
        only_trace: D_t pairs without a partner in D_e.
        only_empty: D_e pairs without a partner in D_t.
        only_bank: Prompts with traces but without both pairs.
        too_long: Examples with a sequence beyond the longest allowed.
        repeated: Records of the bank that stand there more than once; each is counted once.
    """

    examples: tuple[Example, ...]
    only_trace: int = 0
    only_empty: int = 0
    only_bank: int = 0
    too_long: int = 0
    repeated: int = 0

    @property
    def prompts(self) -> int:
        """Number of prompts among the examples."""
        return len({example.prompt_id for example in self.examples})


def join(
    pairs: Iterable[PreferencePair],
    traces: Iterable[TraceRecord] = (),
    *,
    needs: Sequence[Mode] = MODES,
    unmatched: Unmatched = "error",
    limit: int | None = None,
    max_length: int | None = None,
) -> Joined:
    """Joins D_t, D_e and the trace bank by prompt.

    Args:
        pairs: D_t and D_e records, told apart by their mode.
        traces: The trace bank; only traces of joined prompts are kept.
        needs: The sets that an example has a pair of.
        unmatched: What to do about pairs without a partner: refuse, or leave them out.
        limit: Only the first so many prompts that have all needed pairs.
        max_length: Leave examples with a longer sequence out (they are never cut: a cut trace has no answer).

    Raises:
        UserError: A set is empty; no prompt has pairs in both; a pair without a partner (``unmatched="error"``); all
            examples are too long; a record without token ids; a pair whose two sides are the same; pairs of one
            example with different prompt ids (their text does not count); a trace whose prompt or answer is not a
            pair's; a bank of other prompts. The record is named.
    """
    sets: dict[Mode, dict[str, list[PreferencePair]]] = {mode: {} for mode in MODES if mode in needs}
    check_choice("unmatched", unmatched, get_args(Unmatched))
    for number, pair in enumerate(rows_of("pairs", pairs), start=1):
        check_kind(f"pairs, row {number}", pair, PreferencePair, "a PreferencePair")
        if pair.mode in sets:
            _check_pair(pair)
            sets[pair.mode].setdefault(pair.prompt_id, []).append(pair)
    first, *others = sets.values()
    for mode, found in sets.items():
        if not found:
            raise UserError(f"There are no {mode} pairs ({SETS[mode]})" + ("; both are needed." if others else "."))
    counts = {prompt: min(len(found.get(prompt, ())) for found in sets.values()) for prompt in first}
    common = [prompt for prompt, count in counts.items() if count]
    if not common:
        numbers = [f"{len(found)} prompts in {SETS[mode]}" for mode, found in sets.items()]
        starts = " and ".join(f"{SETS[mode]} begins with {next(iter(found))!r}" for mode, found in sets.items())
        raise UserError(
            f"D_t and D_e share no prompts ({starts}; {' and '.join(numbers)}). Make both from the same prompts: they "
            "are joined by prompt_id. If they were, ties have removed the others: prompts whose answers are the same "
            "or have the same reward give no pair, as report.md of `bvpo-stats pairs` counts. Draw more responses a "
            "prompt or more prompts, or take a finer reward."
        )
    alone = {mode: sum(len(p) - counts.get(prompt, 0) for prompt, p in found.items()) for mode, found in sets.items()}
    if unmatched == "error" and any(alone.values()):
        raise UserError(_unmatched_words(sets, counts, alone))
    kept = common
    if limit is not None:
        if limit < 1:
            raise UserError(f"`limit={limit}`: at least 1 prompt is needed.")
        kept = common[:limit]
    shared, kept_prompts = set(common), set(kept)
    bank: dict[str, list[TraceRecord]] = {prompt: [] for prompt in kept}
    stray: set[str] = set()
    seen: set[TraceRecord] = set()
    repeated, other = 0, None
    for number, trace in enumerate(rows_of("traces", traces), start=1):
        check_kind(f"traces, row {number}", trace, TraceRecord, "a TraceRecord")
        if trace in seen:  # a file put behind itself; equal draws of a chain have numbers of their own
            repeated += 1
        elif trace.prompt_id in kept_prompts:
            seen.add(trace)
            bank[trace.prompt_id].append(trace)
        else:
            other = trace.prompt_id
            if other not in shared:
                stray.add(other)
    if other is not None and not seen:
        raise UserError(
            f"The trace bank has no traces of these pairs' prompts, but of others, e.g. {other!r}. Give the bank that "
            "was made from these pairs."
        )
    thinking, empty = (sets.get(mode, {}) for mode in MODES)
    examples: list[Example] = []
    for prompt in kept:
        owned = _traces_by_pair(thinking.get(prompt, []), bank[prompt])
        for i in range(counts[prompt]):
            trace_pair = thinking[prompt][i] if thinking else None
            empty_pair = empty[prompt][i] if empty else None
            if trace_pair is not None and empty_pair is not None:
                _check_one_prompt(trace_pair, empty_pair)
            examples.append(Example(prompt, trace_pair, empty_pair, i, tuple(owned[i]) if thinking else ()))
    fitting = [example for example in examples if max_length is None or example.longest <= max_length]
    if not fitting:
        raise UserError(
            f"All {len(examples)} prompts have a sequence of more than {max_length} tokens; raise `max_length`."
        )
    return Joined(
        examples=tuple(fitting),
        only_trace=alone.get("thinking", 0),
        only_empty=alone.get("nothinking", 0),
        only_bank=len(stray),
        too_long=len(examples) - len(fitting),
        repeated=repeated,
    )


def check_identity(policy: Policy, examples: Sequence[Example]) -> None:
    """Refuses records of another model or template.

    Pairs must come from the reference: the policy's base model, or the policy itself where it has no stored adapter.

    Raises:
        UserError: Names the first record that differs.
    """
    reference = policy.identity.partition("+")[0]
    for example in examples:
        for record in example.records:
            kind = f"The {record.mode} pair" if isinstance(record, PreferencePair) else f"A {record.source} trace"
            if record.model is not None and content_of(record.model) != content_of(reference):
                raise UserError(
                    f"{kind} of prompt {record.prompt_id} was sampled by {record.model}, but the reference is "
                    f"{reference}. Give the model the records come from, or allow the mismatch if you know why."
                )
            if record.template not in (None, policy.template.name):
                raise UserError(
                    f"{kind} of prompt {record.prompt_id} uses the template {record.template}, but the policy's is "
                    f"{policy.template.name}. Choose it with `template`, or allow the mismatch if you know why."
                )


def _unmatched_words(
    sets: Mapping[Mode, Mapping[str, Sequence[PreferencePair]]], counts: Mapping[str, int], alone: Mapping[Mode, int]
) -> str:
    mode, prompt = next(
        (mode, prompt)
        for mode, found in sets.items()
        for prompt, pairs in found.items()
        if len(pairs) > counts.get(prompt, 0)
    )
    where = "only" if not counts.get(prompt) else f"more often ({len(sets[mode][prompt])} times) than in the other set"
    numbers = " and ".join(f"{number} in {SETS[mode]} alone" for mode, number in alone.items())
    return (
        f"Prompt {prompt} is in {SETS[mode]} {where} ({numbers}); each example needs both pairs of its prompt. Make "
        f"both sets from the same prompts, or keep the {sum(counts.values())} shared ones with "
        "`unmatched_prompts='drop'`."
    )


def _check_pair(pair: PreferencePair) -> None:
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        _check_ids(f"The {pair.mode} pair of prompt {pair.prompt_id}", name, getattr(pair, name))
    if pair.chosen_ids == pair.rejected_ids:
        raise UserError(
            f"The {pair.mode} pair of prompt {pair.prompt_id} has the same tokens as chosen and as rejected, so it "
            "prefers nothing and its gradient is 0. Leave it out."
        )


def _check_one_prompt(trace: PreferencePair, empty: PreferencePair) -> None:
    """Refuses an example whose two gradients would be of different conditional laws: pi(. | x) of one x is meant.

    Token ids decide; the prompt's text is for people, and may have been rendered otherwise.
    """
    if trace.prompt_ids != empty.prompt_ids:
        first = next(
            (i for i, (a, b) in enumerate(zip(trace.prompt_ids, empty.prompt_ids, strict=False)) if a != b),
            min(len(trace.prompt_ids), len(empty.prompt_ids)),
        )
        there, here = (repr(pair.prompt[:_SHOWN]) for pair in (trace, empty))
        texts = f"D_t's is {there}, D_e's {here}" if there != here else "their texts begin alike"
        raise UserError(
            f"The D_t and the D_e pair of prompt {trace.prompt_id} have different prompts: `prompt_ids` of "
            f"{len(trace.prompt_ids)} and {len(empty.prompt_ids)} tokens, which differ from token {first + 1} on "
            f"({texts}). Give both the prompt of D_t: the tokens that close the empty trace belong to the completions "
            "of D_e. If these are two questions, give them two ids."
        )


_SHOWN = 60  # characters of a prompt


def _check_ids(record: str, name: str, ids: Sequence[int]) -> None:
    if not ids:
        raise UserError(
            f"{record} has no token ids ({name} is empty). Text alone does not say what the sampler saw: make the "
            "record again with `bvpo-stats sample`, `pairs` or `traces`."
        )


def _traces_by_pair(pairs: Sequence[PreferencePair], traces: Sequence[TraceRecord]) -> list[list[TraceRecord]]:
    """The traces of each of a prompt's D_t pairs: those that lead to its answers; pairs of equal answer share them."""
    owned: list[list[TraceRecord]] = [[] for _ in pairs]
    for trace in traces:
        name = f"The {trace.source} trace {trace.index} of prompt {trace.prompt_id} ({trace.side})"
        _check_ids(name, "completion_ids", trace.completion_ids)
        answer = trace.completion_ids[trace.answer_start :]
        owners = []
        for number, pair in enumerate(pairs):
            own = _own_trace(pair, trace.side)
            if trace.prompt_ids == pair.prompt_ids and answer == own.completion_ids[own.answer_start :]:
                owners.append((number, own))
        if pairs and not owners:
            raise UserError(
                f"{name} leads to another answer or prompt than the pair's. Make the bank from these pairs with "
                "`bvpo-stats traces`."
            )
        if trace.source == "anchor":
            owners = [(number, own) for number, own in owners if own.completion_ids == trace.completion_ids]
            if pairs and not owners:
                raise UserError(
                    f"The anchor of prompt {trace.prompt_id} ({trace.side}) is not the pair's own response."
                )
        for number, _ in owners:
            owned[number].append(trace)
    return owned


def _side_bank(pair: PreferencePair, side: Side, traces: Sequence[TraceRecord]) -> SideBank:
    kinds: dict[str, list[TraceRecord]] = {"anchor": [], "same-answer": [], "mh": [], "prior": []}
    for trace in sorted(traces, key=lambda record: record.index):
        if trace.side == side:
            kinds[trace.source].append(trace)
    own = kinds["anchor"][-1] if kinds["anchor"] else _own_trace(pair, side)
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
        # an unknown boundary rules out everything that would look at it
        answer_start=(pair.chosen_answer_start if chosen else pair.rejected_answer_start) or 0,
        trace_logp=math.nan,
        joint_logp=math.nan if reference is None else reference,
        # without model, nucleus and top-k, a temperature does not say of which law the trace is a draw
        temperature=None if None in (pair.model, pair.top_p, pair.top_k) else pair.temperature,
        model=pair.model,
        template=pair.template,
    )
