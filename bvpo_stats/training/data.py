"""What to train on: the joined examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bvpo_stats.gradients.examples import Example, Joined, join
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.training.config import BVPOConfig


@dataclass(frozen=True)
class PromptSelection:
    """Prompts of a run.

    Attributes:
        train: To train on, in the order of the records.
        too_long: Prompts set aside because a pair exceeds the longest sequence.
        unmatched: Prompts set aside because only one of the two sets has them.
    """

    train: tuple[Example, ...]
    too_long: int
    unmatched: int


class PromptRows(Dataset[int]):
    """The numbers of successive examples: what samplers and loaders move around instead of token ids."""

    def __init__(self, size: int, start: int = 0) -> None:
        self._size, self._start = size, start

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        return self._start + index


def deal(tokens: Sequence[int], processes: int) -> list[list[int]]:
    """Deals the prompts of a batch to processes by their tokens: the longest first, each to whom has least so far.

    A step takes as long as its slowest process, and its gradient is a sum: any split is right.

    Args:
        tokens: Tokens of each prompt.
        processes: How many there are.

    Returns:
        Numbers of the prompts of each process, in their order; none where there are fewer prompts than processes.

    >>> deal([10, 900, 20, 30, 800], 2)
    [[1], [0, 2, 3, 4]]
    """
    hands: list[list[int]] = [[] for _ in range(processes)]
    held = [0] * processes
    for number in sorted(range(len(tokens)), key=lambda n: (-tokens[n], n)):
        least = held.index(min(held))
        hands[least].append(number)
        held[least] += tokens[number]
    return [sorted(hand) for hand in hands]


def collate_rows(rows: Sequence[int]) -> dict[str, Tensor]:
    """A batch: the numbers of its prompts."""
    return {"rows": torch.tensor(list(rows), dtype=torch.long)}


def join_for(
    args: BVPOConfig,
    pairs: Iterable[PreferencePair],
    traces: Iterable[TraceRecord] = (),
    limit: int | None = None,
) -> Joined:
    """The examples that the settings train on, joined once and for all.

    Args:
        args: The settings.
        pairs: D_t and D_e.
        traces: Trace bank, for ``alpha="adaptive"``.
        limit: Only the first so many shared prompts; others are then left out without complaint.

    Raises:
        UserError: As in `join`.
    """
    unmatched: Any = args.unmatched_prompts if limit is None else "drop"
    return join(
        pairs,
        traces if args.adaptive else (),
        needs=args.needed_sets,
        unmatched=unmatched,
        limit=limit,
        max_length=args.max_length,
    )


def select(joined: Joined) -> PromptSelection:
    """The examples to train on, and how many were set aside: nothing is held out."""
    return PromptSelection(joined.examples, joined.too_long, joined.only_trace + joined.only_empty)
