"""Sides of pairs as targets of trace sampling: the answer y, its own trace, and what the prompt's samples offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bvpo_stats.errors import UserError
from bvpo_stats.records import Completion, PreferencePair

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
Trace = tuple[int, ...]
"""Token ids of a trace, closing tag included."""


@dataclass(frozen=True)
class PairSide:
    """One answer of a D_t pair, and what is known about traces that lead to it.

    Attributes:
        prompt_id: The prompt.
        side: Which answer of the pair.
        question: The prompt's text.
        prompt_ids: Token ids of the prompt.
        anchor: The pair's own trace.
        answer_ids: Token ids of the answer y, end-of-sequence included.
        max_trace: Longest trace, in tokens, that leaves room for y under the sampler's cut-off: the law of traces is
            everywhere restricted to these, as the sampler's was.
        same_answer: Traces of the prompt's other samples that ended in the very same answer ids. Given all answers,
            choosing a pair depends on answers and indices alone, so these are independent exact draws of the sampler's
            q(r | x, y).
        others: All closed traces of the prompt's other samples. Their answers lost (or did not win) against y, so they
            are draws of q(r | x) only up to that selection.
    """

    prompt_id: str
    side: Side
    question: str
    prompt_ids: tuple[int, ...]
    anchor: Trace
    answer_ids: tuple[int, ...]
    max_trace: int
    same_answer: tuple[Trace, ...]
    others: tuple[Trace, ...]

    @property
    def name(self) -> str:
        """How errors and random numbers name it."""
        return f"{self.prompt_id}/{self.side}"

    def completion(self, trace: Trace) -> tuple[int, ...]:
        """Token ids of (r, y)."""
        return trace + self.answer_ids


def sampling_temperature(pair: PreferencePair) -> float:
    """The temperature that a pair's responses were sampled at.

    Raises:
        UserError: It or the nucleus is not recorded, or the nucleus is below 1: the proposal's probabilities would
            be unknown or wrong.
    """
    if pair.temperature is None or pair.top_p is None:
        raise UserError(
            f"The temperature and top-p that pair {pair.prompt_id} was sampled at are not recorded; without them its "
            "traces have no weights. Make pairs with `bvpo-stats sample` and `pairs`, or give both fields."
        )
    if pair.top_p < 1:
        raise UserError(
            f"Pair {pair.prompt_id} was sampled with top-p {pair.top_p:g}: cut-off traces have no proposal "
            "probability, so no weights. Sample with `top_p=1`."
        )
    return pair.temperature


def pair_sides(pair: PreferencePair, samples: Sequence[Completion], max_positions: int | None) -> list[PairSide]:
    """Both sides of a D_t pair.

    Args:
        pair: The pair.
        samples: The prompt's ``thinking`` responses.
        max_positions: Longest sequence the model has positions for; None for no limit.

    Raises:
        UserError: The pair is not of D_t, is not among the samples, or see :func:`sampling_temperature`.
    """
    if pair.mode != "thinking":
        raise UserError(
            f"Pair {pair.prompt_id} is a {pair.mode} pair, which has no traces. Give a folder with thinking.jsonl."
        )
    sampling_temperature(pair)
    found = []
    for side in SIDES:
        index = pair.chosen_index if side == "chosen" else pair.rejected_index
        ids = pair.chosen_ids if side == "chosen" else pair.rejected_ids
        own = next(
            (
                sample
                for sample in samples
                if (index is None or sample.sample_index == index)
                and (sample.prompt_ids, sample.completion_ids) == (pair.prompt_ids, ids)
            ),
            None,
        )
        if own is None:
            number = "" if index is None else f" (sample {index})"
            raise UserError(
                f"The {side} response of pair {pair.prompt_id}{number} is not in `samples`. Give the "
                "samples that the pairs were made from."
            )
        found.append(_side(pair, side, own, samples, max_positions))
    return found


def _side(
    pair: PreferencePair, side: Side, own: Completion, samples: Sequence[Completion], max_positions: int | None
) -> PairSide:
    assert own.answer_start is not None  # pairs hold complete responses only
    anchor, answer = own.completion_ids[: own.answer_start], own.completion_ids[own.answer_start :]
    room = None if max_positions is None else max_positions - len(own.prompt_ids)
    cut_off = own.max_new_tokens or room or max(len(sample.completion_ids) for sample in samples)
    longest = cut_off if room is None else min(cut_off, room)
    max_trace = max(longest - len(answer), len(anchor))
    same_answer, others = [], []
    for sample in samples:
        if sample.sample_index == own.sample_index or sample.answer_start is None:
            continue
        trace = sample.completion_ids[: sample.answer_start]
        if len(trace) > max_trace:
            continue
        others.append(trace)
        if sample.complete and sample.completion_ids[sample.answer_start :] == answer:
            same_answer.append(trace)
    return PairSide(
        pair.prompt_id,
        side,
        own.prompt,
        pair.prompt_ids,
        anchor,
        answer,
        max_trace,
        tuple(same_answer),
        tuple(others),
    )
