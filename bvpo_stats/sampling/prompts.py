"""Where prompts come from: JSONL files, datasets and their usual column layouts, the embedded task."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bvpo_stats.embedded.assets import EMBEDDED, embedded_prompts
from bvpo_stats.errors import UserError, rows_of
from bvpo_stats.records import Prompt, default_prompt_id
from bvpo_stats.store.tables import Source, source_rows

_TEXT_FIELDS = ("prompt", "question", "problem", "instruction")
_GOLD_FIELDS = ("gold", "answer", "solution")
_LONGEST = 8  # prompts that a survey remembers


def load_prompts(source: Source, *, limit: int | None = None, split: str = "train") -> Iterator[Prompt]:
    """Streams prompts from a source.

    Args:
        source: ``embedded``, a file, whatever ``datasets.load_dataset`` accepts; or an iterable of questions as text,
            of :class:`~bvpo_stats.records.Prompt`, or of rows (see :func:`prompt_from_row`), e.g. a loaded dataset.
        limit: Stop after this many.
        split: Split of a dataset.

    Yields:
        Prompts with unique ids; rows without an id get ``p`` + the first 16 hex digits of the text's SHA-256.

    Raises:
        UserError: Missing source, no prompts, a row without a prompt, or a prompt id met twice.
    """
    if limit is not None and limit < 1:
        raise UserError(f"`limit={limit}`: at least 1 prompt is needed.")
    prompts = _unique(_rows(source, split))
    found = False
    for prompt in islice(prompts, limit):
        found = True
        yield prompt
    if not found:
        name = source if isinstance(source, (str, os.PathLike)) else "`prompts`"
        raise UserError(f"{name} holds no prompts. Give a JSONL file with one object a line and a field `prompt`.")


def _rows(source: Source, split: str) -> Iterator[tuple[str, Prompt]]:
    if not isinstance(source, (str, os.PathLike)):
        for number, row in enumerate(rows_of("prompts", source), start=1):
            where = f"`prompts`, row {number}"
            if isinstance(row, Prompt):
                yield where, row
            elif isinstance(row, (str, Mapping)):
                yield where, prompt_from_row({"prompt": row} if isinstance(row, str) else dict(row), where)
            else:
                raise UserError(f"{where}: a {type(row).__name__}, neither a text, a Prompt nor a row of columns.")
        return
    if source == EMBEDDED:
        for number, prompt in enumerate(embedded_prompts(), start=1):
            yield f"embedded:{number}", prompt
        return
    for where, row in source_rows(str(source), split):
        yield where, prompt_from_row(row, where)


def prompt_from_row(row: dict[str, Any], where: str) -> Prompt:
    """Recognises the usual layouts of a prompt.

    A text stands under ``prompt`` (or ``question``, ``problem``, ``instruction``). Messages (under ``prompt`` or
    ``messages``) give their last user turn before any assistant turn; UltraFeedback's ``prompt`` string with
    ``chosen``/``rejected`` message lists is the first case.

    Raises:
        UserError: No such field, an empty prompt, or several user turns (only single-turn prompts are defined here).
    """
    text = next((row[name] for name in _TEXT_FIELDS if row.get(name) is not None), row.get("messages"))
    if isinstance(text, list):
        text = single_user_turn(text, where)
    if not isinstance(text, str):
        raise UserError(f"{where}: no field `prompt` with a text or messages (fields: {', '.join(row) or 'none'}).")
    if not text.strip():
        raise UserError(f"{where}: the prompt is empty.")
    gold = next((row[name] for name in _GOLD_FIELDS if isinstance(row.get(name), (str, int, float))), None)
    identifier = next((row[name] for name in ("prompt_id", "id", "uid") if row.get(name) is not None), None)
    if identifier is None:
        identifier = default_prompt_id(text)
    return Prompt(prompt_id=str(identifier), prompt=text, gold=None if gold is None else str(gold))


def single_user_turn(messages: list[Any], where: str) -> str:
    """The text of the one user turn in front of any assistant turn.

    Raises:
        UserError: There is none, there are several, or another role (a system prompt) is among them.
    """
    turns: list[str] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role == "assistant":
            break
        if role == "user":
            turns.append(str(message.get("content", "")))
        else:
            raise UserError(f"{where}: a message with role {role!r}; only single user turns are supported.")
    if len(turns) != 1:
        raise UserError(f"{where}: {len(turns)} user turns before the answer; exactly one is supported.")
    return turns[0]


def _unique(rows: Iterable[tuple[str, Prompt]]) -> Iterator[Prompt]:
    seen: dict[bytes, str] = {}
    for where, prompt in rows:
        key = hashlib.sha256(prompt.prompt_id.encode()).digest()[:12]
        if key in seen:
            raise UserError(
                f"{where}: prompt id {prompt.prompt_id!r} occurs twice (first at {seen[key]}). "
                "Make ids unique; repeated questions would count as independent clusters."
            )
        seen[key] = where
        yield prompt


@dataclass(frozen=True)
class PromptSurvey:
    """What a run has to know about its prompts before it starts, in constant memory.

    Attributes:
        count: Number of prompts.
        fingerprint: The count and a short hash of ids and texts, in order.
        longest: The few prompts with the most characters, longest first.
    """

    count: int
    fingerprint: str
    longest: tuple[str, ...]


def survey_prompts(prompts: Iterable[Prompt]) -> PromptSurvey:
    """Goes through the prompts once.

    Args:
        prompts: The prompts; streamed.
    """
    digest = hashlib.sha256()
    longest: list[tuple[int, int, str]] = []
    count = 0
    for prompt in prompts:
        digest.update(f"{prompt.prompt_id}\x1f{prompt.prompt}\x1e".encode())
        entry = (len(prompt.prompt), -count, prompt.prompt)
        count += 1
        if len(longest) < _LONGEST:
            heapq.heappush(longest, entry)
        elif entry > longest[0]:
            heapq.heapreplace(longest, entry)
    texts = tuple(text for _, _, text in sorted(longest, reverse=True))
    return PromptSurvey(count, f"{count}:{digest.hexdigest()[:16]}", texts)
