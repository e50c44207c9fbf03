"""Responses that were generated elsewhere, put on record as if they had been drawn here."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.model.templates import Template
from bvpo_stats.progress import progress
from bvpo_stats.records import MODES, Completion, Mode, from_dict, to_dict
from bvpo_stats.sampling.sample import SAMPLES_FILE, SamplingTally
from bvpo_stats.store.jsonl import append_jsonl, mend, read_jsonl
from bvpo_stats.store.tables import read_rows

_LENGTH_REASONS = ("length", "max_tokens")


def adopt_completions(path: Path, template: Template | None, eos_id: int | None = None) -> Iterator[Completion]:
    """Streams the completions of a JSONL or Parquet file, filling in what a foreign writer left out.

    Needed in each row: ``prompt_id``, ``mode`` (thinking or nothinking), and ``prompt_ids`` + ``completion_ids``, or
    ``prompt`` + ``text``, which are then tokenised here. ``sample_index`` is counted where missing, ``finish_reason``
    defaults to ``stop``, the trace/answer boundary is found through the template. Temperature, model and the like stay
    unknown where no line gives them.

    Args:
        path: The file.
        template: The model's template; may be None where every line is a full record.
        eos_id: Token appended to re-tokenised texts that finished by themselves.

    Raises:
        UserError: A line lacks something that cannot be filled in, or a draw occurs twice; the line is named.
    """
    counts: dict[int, int] = {}
    seen: set[int] = set()
    for where, row in read_rows(path, Completion, name="samples_from"):
        known = {name: value for name, value in row.items() if value is not None}  # tables fill up with nulls
        completion = adopt_row(known, where, template, eos_id, counts)
        key = _digest(completion.key)
        if key in seen:
            raise UserError(f"{where}: the response {completion.key} occurs twice. Remove one of them.")
        seen.add(key)
        yield completion


def adopt_row(
    row: dict[str, Any],
    where: str,
    template: Template | None,
    eos_id: int | None,
    counts: dict[int, int],
) -> Completion:
    """One line of :func:`adopt_completions`; ``counts`` remembers how many responses each prompt had in each mode."""
    if row.get("mode") not in MODES:
        raise UserError(f"{where}: field `mode` must be `thinking` or `nothinking`, not {row.get('mode')!r}.")
    if "prompt_id" not in row:
        raise UserError(f"{where}: no field `prompt_id`; it says which responses answer the same question.")
    row = dict(row, prompt_id=str(row["prompt_id"]))
    place = _digest(f"{row['prompt_id']}/{row['mode']}")
    row.setdefault("sample_index", counts.get(place, 0))
    counts[place] = counts.get(place, 0) + 1
    row["finish_reason"] = "length" if row.get("finish_reason", "stop") in _LENGTH_REASONS else "stop"
    if "completion_ids" not in row or "prompt_ids" not in row:
        _tokenise(row, where, template, eos_id)
    if not row["completion_ids"]:
        raise UserError(f"{where}: the completion is empty.")
    if "answer_start" not in row and not ("trace" in row and row.get("answer") is None):
        if template is None:
            raise UserError(f"{where}: no `answer_start`, and no model to find it with. Give `model`.")
        row["answer_start"], row["trace"], row["answer"] = template.split(row["completion_ids"], row["mode"])
    defaults = {
        "prompt": "",
        "text": "",
        "answer_start": None,
        "trace": None,
        "answer": None,
        "template": template.name if template else None,
        "engine": "file",
    }
    return from_dict(Completion, defaults | row, where)


def _digest(key: str) -> int:
    """What is remembered of a key: 64 bits, a fraction of the memory of the text."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _tokenise(row: dict[str, Any], where: str, template: Template | None, eos_id: int | None) -> None:
    if template is None:
        raise UserError(f"{where}: no token ids, and no model to tokenise with. Give `model`.")
    if not isinstance(row.get("prompt"), str) or not isinstance(row.get("text"), str):
        raise UserError(f"{where}: needs `prompt_ids` and `completion_ids`, or `prompt` and `text`.")
    row.setdefault("prompt_ids", list(template.prompt_ids(row["prompt"], row["mode"])))
    if "completion_ids" not in row:
        ids = list(template.tokenizer.encode(row["text"], add_special_tokens=False))
        if row["finish_reason"] == "stop" and eos_id is not None and ids[-1:] != [eos_id]:
            ids.append(eos_id)
        row["completion_ids"] = ids


_ROWS = 1_000  # appended at a time


def adopt_into(
    folder: Path, source: Path, policy: ServedPolicy | None, *, modes: tuple[Mode, ...], limit: int | None = None
) -> SamplingTally:
    """Appends the responses of a file to the run's ``samples.jsonl``; constant memory but for 100 bytes a response.

    The file is read in order, so an interrupted call goes on after as many responses as it has on record.

    Args:
        folder: Folder of the run.
        source: JSONL file; see :func:`bvpo_stats.sampling.engines.file_engine.adopt_completions` for what a line needs.
        policy: Tokenizer and template, where lines lack token ids or the trace/answer boundary.
        modes: Modes to keep.
        limit: Keep only the first so many prompts.

    Raises:
        UserError: A line that cannot be used, a response that occurs twice, or responses of several models or
            templates; the line is named. What was adopted before it is kept.
    """
    target = folder / SAMPLES_FILE
    mend(target, ordered=True)
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
    if path.suffix != ".jsonl":
        return sum(1 for _ in read_rows(path, Completion))
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
