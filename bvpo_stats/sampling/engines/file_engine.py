"""Responses that were generated elsewhere, put on record as if they had been drawn here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.progress import progress
from bvpo_stats.records import Completion, Mode, to_dict
from bvpo_stats.sampling.adopt import adopt_completions
from bvpo_stats.sampling.sample import SAMPLES_FILE, SamplingTally
from bvpo_stats.store.jsonl import append_jsonl, read_jsonl

_ROWS = 1_000  # appended at a time


def adopt_into(
    folder: Path, source: Path, policy: ServedPolicy | None, *, modes: tuple[Mode, ...], limit: int | None = None
) -> SamplingTally:
    """Appends the responses of a file to the run's ``samples.jsonl``; constant memory but for 100 bytes a response.

    The file is read in order, so an interrupted call goes on after as many responses as it has on record.

    Args:
        folder: Folder of the run.
        source: JSONL file; see :func:`bvpo_stats.sampling.adopt.adopt_completions` for what a line needs.
        policy: Tokenizer and template, where lines lack token ids or the trace/answer boundary.
        modes: Modes to keep.
        limit: Keep only the first so many prompts.

    Raises:
        UserError: A line that cannot be used, a response that occurs twice, or responses of several models or
            templates; the line is named. What was adopted before it is kept.
    """
    target = folder / SAMPLES_FILE
    done = sum(1 for _ in read_jsonl(target)) if target.exists() else 0
    template, eos_id = (policy.template, policy.eos_ids[0]) if policy else (None, None)
    adopted = _one_source(adopt_completions(source, template, eos_id), source)
    kept = islice(_first_prompts((c for c in adopted if c.mode in modes), limit), done, None)
    responses = tokens = 0
    started = time.monotonic()
    with progress("Reading", _count_lines(source), "responses", done=done) as advance:
        while rows := list(islice(kept, _ROWS)):
            append_jsonl(target, map(to_dict, rows))
            responses += len(rows)
            tokens += sum(len(row.completion_ids) for row in rows)
            advance(len(rows))
    if not done and not responses:
        raise UserError(f"{source} holds no responses in mode {' or '.join(modes)}.")
    return SamplingTally(responses, tokens, 0, time.monotonic() - started)


def _count_lines(path: Path) -> int:
    with path.open("rb") as handle:
        return sum(block.count(b"\n") for block in iter(lambda: handle.read(1 << 16), b""))


def _one_source(completions: Iterator[Completion], source: Path) -> Iterator[Completion]:
    first: Completion | None = None
    for completion in completions:
        first = first or completion
        for field in ("model", "template"):
            name, other = getattr(first, field), getattr(completion, field)
            if name != other:
                raise UserError(
                    f"{source}: response {completion.key} is of {field} {other!r}, those before it of {name!r}. "
                    "Give each a file and an `output` folder of its own."
                )
        yield completion


def _first_prompts(completions: Iterator[Completion], limit: int | None) -> Iterator[Completion]:
    seen: set[str] = set()
    for completion in completions:
        if limit is not None and completion.prompt_id not in seen:
            if len(seen) == limit:
                continue
            seen.add(completion.prompt_id)
        yield completion
