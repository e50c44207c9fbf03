"""What to train on: the joined examples, and which prompts are held out for the probe set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bvpo_stats.gradients.examples import Example, Joined, join
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.training.alpha import AdaptiveOptions
from bvpo_stats.training.config import BVPOConfig


@dataclass(frozen=True)
class PromptSelection:
    """Prompts of a run.

    Attributes:
        train: To train on, in the order of the records.
        probe: Held out, for the marginal gradient.
        too_long: Prompts set aside because a pair exceeds the longest sequence.
        unmatched: Prompts set aside because only one of the two sets has them.
    """

    train: tuple[Example, ...]
    probe: tuple[Example, ...]
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


def select(args: BVPOConfig, joined: Joined) -> PromptSelection:
    """The examples that the settings train on, and those they hold out."""
    if not args.adaptive:
        return hold_out(joined)
    prompts = joined.prompts + joined.too_long
    spare = prompts - args.prompts_per_step if args.dataloader_drop_last else prompts // 2
    selection = hold_out(joined, max(0, min(args.alpha_probe_prompts, spare)), args.seed)
    if len(selection.probe) < AdaptiveOptions().min_prompts:
        return hold_out(joined)  # of no use to the estimate: train on them
    return selection


def hold_out(joined: Joined, probe: int = 0, seed: int = 0) -> PromptSelection:
    """Holds prompts out for the probe set.

    Which ones is decided by the seed and their ids alone. Where there is a trace bank, only prompts whose answers all
    have traces in it qualify.

    Args:
        joined: The run's examples.
        probe: Prompts to hold out.
        seed: The run's.
    """
    examples = joined.examples
    lacking: set[str] = set()
    if any(example.traces for example in examples):
        lacking = {e.prompt_id for e in examples if {trace.side for trace in e.traces} != {"chosen", "rejected"}}
    able = {example.prompt_id for example in examples} - lacking
    held_out = set(sorted(able, key=lambda prompt: _lot(seed, prompt))[:probe])
    return PromptSelection(
        train=tuple(example for example in examples if example.prompt_id not in held_out),
        probe=tuple(example for example in examples if example.prompt_id in held_out),
        too_long=joined.too_long,
        unmatched=joined.only_trace + joined.only_empty,
    )


def _lot(seed: int, prompt_id: str) -> bytes:
    return hashlib.blake2b(f"probe/{seed}/{prompt_id}".encode(), digest_size=16).digest()
