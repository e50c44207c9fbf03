"""Prompts to train on: their pairs of D_t and D_e, what is set aside, and which are held out for the probe set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bvpo_stats.errors import UserError
from bvpo_stats.records import PreferencePair, TraceRecord, from_dict

Unmatched = Literal["error", "drop"]


@dataclass(frozen=True)
class TrainingPrompt:
    """One prompt with the pairs that its part of the loss needs.

    Attributes:
        prompt_id: The prompt.
        trace: Its pair of D_t; None where the loss has no trace part (alpha = 0).
        empty: Its pair of D_e; None where the loss has no empty-trace part (alpha = 1).
    """

    prompt_id: str
    trace: PreferencePair | None
    empty: PreferencePair | None

    @property
    def pairs(self) -> tuple[PreferencePair, ...]:
        """The pairs there are."""
        return tuple(pair for pair in (self.trace, self.empty) if pair is not None)


@dataclass(frozen=True)
class PromptSelection:
    """Prompts of a run.

    Attributes:
        train: To train on, in the order of the records.
        probe: Held out, for the marginal gradient.
        too_long: Prompts set aside because a pair exceeds the longest sequence.
        unmatched: Prompts set aside because only one of the two sets has them.
    """

    train: tuple[TrainingPrompt, ...]
    probe: tuple[TrainingPrompt, ...]
    too_long: int
    unmatched: int


class PromptRows(Dataset[int]):
    """The numbers 0, 1, ... of the prompts: what samplers and loaders move around instead of token ids."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        return index


def collate_rows(rows: Sequence[int]) -> dict[str, Tensor]:
    """A batch: the numbers of its prompts."""
    return {"rows": torch.tensor(list(rows), dtype=torch.long)}


def as_pairs(rows: Iterable[PreferencePair | dict[str, Any]], name: str) -> list[PreferencePair]:
    """Records from records, or from the rows of a ``datasets.Dataset`` that `bvpo-stats pairs` wrote.

    Args:
        rows: The rows.
        name: How errors name them.

    Raises:
        UserError: A row lacks fields.
    """
    found = []
    for number, row in enumerate(rows):
        found.append(
            row if isinstance(row, PreferencePair) else from_dict(PreferencePair, row, f"{name}, row {number}")
        )
    return found


def join_prompts(
    pairs: Sequence[PreferencePair], *, trace: bool, empty: bool, unmatched: Unmatched = "error"
) -> tuple[list[TrainingPrompt], int]:
    """Prompts with the pairs that the loss needs, in the order of the records.

    Args:
        pairs: D_t and D_e records, told apart by their mode.
        trace: Whether the loss has a trace part.
        empty: Whether it has an empty-trace part.
        unmatched: What to do about prompts that only one set has: refuse, or leave them out.

    Returns:
        The prompts, and how many were left out.

    Raises:
        UserError: A set is missing or holds a prompt twice, or a prompt is in one set only. It is named.
    """
    wanted = [mode for mode, needed in (("thinking", trace), ("nothinking", empty)) if needed]
    sets: dict[str, dict[str, PreferencePair]] = {mode: {} for mode in wanted}
    for pair in pairs:
        if pair.mode not in sets:
            continue
        if pair.prompt_id in sets[pair.mode]:
            raise UserError(f"Prompt {pair.prompt_id} has two {pair.mode} pairs; keep one per prompt and mode.")
        sets[pair.mode][pair.prompt_id] = pair
    for mode, found in sets.items():
        if not found:
            raise UserError(f"There are no {mode} pairs ({_SETS[mode]}), which this loss trains on.")
    everywhere = [prompt for prompt in sets[wanted[0]] if all(prompt in found for found in sets.values())]
    alone = {mode: [p for p in found if any(p not in other for other in sets.values())] for mode, found in sets.items()}
    left_out = sum(len(prompts) for prompts in alone.values())
    if left_out and unmatched == "error":
        mode, prompts = next((mode, prompts) for mode, prompts in alone.items() if prompts)
        counts = " and ".join(f"{len(found)} in {_SETS[mode]} alone" for mode, found in alone.items())
        raise UserError(
            f"Prompt {prompts[0]} is in {_SETS[mode]} only ({counts}); each step needs both pairs of its prompts. Make "
            f"both sets from the same prompts, or train on the {len(everywhere)} shared ones with "
            "`unmatched_prompts='drop'`."
        )
    if not everywhere:
        raise UserError("D_t and D_e share no prompts; make both from the same samples.")
    trace_pairs, empty_pairs = (sets.get(mode, {}) for mode in ("thinking", "nothinking"))
    return [TrainingPrompt(p, trace_pairs.get(p), empty_pairs.get(p)) for p in everywhere], left_out


def select_prompts(
    joined: tuple[Sequence[TrainingPrompt], int],
    *,
    max_length: int | None,
    probe: int = 0,
    traces: Sequence[TraceRecord] = (),
    seed: int = 0,
) -> PromptSelection:
    """Sets long prompts aside and holds the probe set out.

    Which prompts are held out is decided by the seed and their ids alone. Where there is a trace bank, only prompts
    whose answers both have traces in it qualify.

    Args:
        joined: What `join_prompts` returned.
        max_length: Longest sequence; None for no limit.
        probe: Prompts to hold out.
        traces: The trace bank.
        seed: The run's.

    Raises:
        UserError: Every prompt is too long.
    """
    prompts, unmatched = joined
    kept = [prompt for prompt in prompts if max_length is None or _longest(prompt) <= max_length]
    if not kept:
        raise UserError(
            f"All {len(prompts)} prompts have a sequence of more than {max_length} tokens; raise `max_length`."
        )
    covered: dict[str, set[str]] = {}
    for trace in traces:
        covered.setdefault(trace.prompt_id, set()).add(trace.side)
    able = [p for p in kept if not traces or covered.get(p.prompt_id, set()) >= {"chosen", "rejected"}]
    held_out = {p.prompt_id for p in sorted(able, key=lambda p: _lot(seed, p.prompt_id))[:probe]}
    return PromptSelection(
        train=tuple(prompt for prompt in kept if prompt.prompt_id not in held_out),
        probe=tuple(prompt for prompt in kept if prompt.prompt_id in held_out),
        too_long=len(prompts) - len(kept),
        unmatched=unmatched,
    )


_SETS = {"thinking": "D_t", "nothinking": "D_e"}


def _longest(prompt: TrainingPrompt) -> int:
    return max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in prompt.pairs)


def _lot(seed: int, prompt_id: str) -> bytes:
    return hashlib.blake2b(f"probe/{seed}/{prompt_id}".encode(), digest_size=16).digest()
