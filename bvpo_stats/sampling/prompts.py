"""Where prompts come from: JSONL files, datasets and their usual column layouts, the embedded task."""

from __future__ import annotations

import hashlib
import heapq
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bvpo_stats.embedded.assets import EMBEDDED, embedded_prompts
from bvpo_stats.errors import UserError, rows_of, shown
from bvpo_stats.records import (
    Message,
    Prompt,
    Question,
    default_prompt_id,
    plain_question,
    question_turns,
    read_messages,
    read_text,
)
from bvpo_stats.store.tables import Source, source_rows

_TEXT_FIELDS = ("prompt", "question", "problem", "instruction")
_MESSAGE_FIELDS = ("messages", "conversations", "conversation")
PROMPT_FIELDS = (*_TEXT_FIELDS, *_MESSAGE_FIELDS)
"""Where rows have their prompt, best first."""
_BEHIND = ("input", "context")  # Alpaca's and Dolly's names for what an instruction is about
_SYSTEM_FIELDS = ("system", "system_prompt")
_GOLD_FIELDS = ("gold", "answer", "solution")
_LONGEST = 8  # prompts that a survey remembers


def load_prompts(
    source: Source, *, limit: int | None = None, split: str = "train", config_name: str | None = None
) -> Iterator[Prompt]:
    """Streams prompts from a source.

    Args:
        source: ``embedded``, a file, whatever ``datasets.load_dataset`` accepts; or an iterable of questions as text or
            messages, of :class:`~bvpo_stats.records.Prompt`, or of rows (see :func:`prompt_from_row`), e.g. a loaded
            dataset.
        limit: Stop after this many.
        split: Split of a dataset.
        config_name: Configuration of a dataset that has several.

    Yields:
        Prompts with unique ids; rows without an id get ``p`` + the first 16 hex digits of the text's SHA-256.

    Raises:
        UserError: Missing source, no prompts, a row without a prompt, or a prompt id met twice.
    """
    if limit is not None and limit < 1:
        raise UserError(f"`limit={limit}`: at least 1 prompt is needed.")
    prompts = _unique(_rows(source, split, config_name))
    found = False
    for prompt in islice(prompts, limit):
        found = True
        yield prompt
    if not found:
        name = source if isinstance(source, (str, os.PathLike)) else "`prompts`"
        raise UserError(f"{name} holds no prompts. Give a JSONL file with one object a line and a field `prompt`.")


def _rows(source: Source, split: str, config_name: str | None) -> Iterator[tuple[str, Prompt]]:
    if not isinstance(source, (str, os.PathLike)):
        for number, row in enumerate(rows_of("prompts", source), start=1):
            where = f"`prompts`, row {number}"
            if isinstance(row, Prompt):
                yield where, row
            elif isinstance(row, (str, list)):  # a text, or a conversation
                yield where, prompt_from_row({"prompt": row}, where)
            elif isinstance(row, Mapping):
                yield where, prompt_from_row(dict(row), where)
            else:
                raise UserError(
                    f"{where}: a {type(row).__name__}, neither a text, messages, a Prompt nor a row of columns."
                )
        return
    if source == EMBEDDED:
        for number, prompt in enumerate(embedded_prompts(), start=1):
            yield f"embedded:{number}", prompt
        return
    for where, row in source_rows(str(source), split, config_name=config_name):
        yield where, prompt_from_row(row, where)


def prompt_from_row(row: dict[str, Any], where: str) -> Prompt:
    """Recognises the usual layouts of a prompt.

    - A text under ``prompt`` (or ``question``, ``problem``, ``instruction``). Alpaca's ``input`` or Dolly's ``context``
      goes on a line of its own behind the ``instruction``, ``history`` of (question, answer) in front.
    - Messages under one of these or ``messages``, ``conversations`` (see :func:`~bvpo_stats.records.read_messages`):
      all turns up to the last user turn. UltraFeedback's ``prompt`` string with ``chosen`` and ``rejected`` messages is
      the first case.
    - ``system`` or ``system_prompt``: a system prompt in front of either.

    The gold answer, a text or number or a list of one, stands under ``gold``, ``answer`` or ``solution``; null, NaN and
    an empty text are none, and neither is an ``answer`` or ``solution`` of another type.

    Raises:
        UserError: No such field, an empty prompt, messages that do not end in a user turn before the answer, or content
            that is not text.
    """
    name = next((name for name in PROMPT_FIELDS if not _missing(row.get(name))), None)
    if name is None:
        nulls = [name for name in PROMPT_FIELDS if name in row]
        what = f"field `{nulls[0]}` is null" if nulls else "no field `prompt` with a text or messages"
        raise UserError(f"{where}: {what} (fields: {', '.join(map(str, row)) or 'none'}).")
    value = row[name].tolist() if hasattr(row[name], "tolist") else row[name]
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(part, dict) and "type" in part and "role" not in part for part in value):
            value = [{"role": "user", "content": list(value)}]  # the content's parts alone
        turns = prompt_turns(value, f"{where}: field `{name}`")
    elif isinstance(value, str) and name in _MESSAGE_FIELDS:
        raise UserError(f"{where}: field `{name}` must be a list of messages, not a text ({shown(value[:60])}).")
    elif isinstance(value, str):
        text = read_text(value, where, name)
        for more in _BEHIND if name == "instruction" else ():
            if not _missing(row.get(more)) and read_text(row[more], where, more).strip():
                text = f"{text}\n{row[more]}"  # as LLaMA-Factory puts Alpaca's rows into a chat
        context = row.get("context") if name == "question" else None
        if not _missing(context) and str(context).strip() not in ("", "[]", "{}"):
            raise UserError(
                f"{where}: beside the field `question` there is a `context`, and where it belongs is not known. Put "
                "both into `prompt`, or leave `context` out."
            )
        turns = (*(_history(row.get("history"), where) if name == "instruction" else ()), Message("user", text))
    else:
        raise UserError(f"{where}: field `{name}` must be a text or messages, not {value!r}.")
    turns = (*_system(row, turns, where), *turns)
    if not turns[-1].content.strip():
        raise UserError(f"{where}: the prompt is empty.")
    question = plain_question(turns)
    return Prompt(
        prompt_id=prompt_identifier(row, where) or default_prompt_id(question),
        prompt=turns[-1].content,
        gold=_gold(row, where),
        messages=None if isinstance(question, str) else question,
    )


def prompt_turns(messages: Any, where: str) -> tuple[Message, ...]:
    """The turns in front of the answer: all messages up to the last user turn.

    Raises:
        UserError: No messages, no user turn, or more than one turn behind the last.
    """
    given = read_messages(messages, where)
    turns = tuple(turn for turn in given if turn.role != "system" or turn.content.strip())  # often there, and empty
    if turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1].role != "user":
        roles = ", ".join(turn.role for turn in given)
        raise UserError(f"{where}: the turns are {roles}; a user turn must stand last, or before the answer.")
    return turns


def _missing(value: Any) -> bool:
    """Whether a cell is empty: null, or the NaN that tables write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _system(row: dict[str, Any], turns: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The system prompt in a column of its own, where it is not among the turns already."""
    for name in _SYSTEM_FIELDS:
        if _missing(row.get(name)) or not read_text(row[name], where, name).strip():
            continue
        found = Message("system", row[name])
        if turns[0].role != "system":
            return (found,)
        if turns[0].content.strip() != found.content.strip():
            raise UserError(f"{where}: field `{name}` and the messages hold two different system prompts; keep one.")
    return ()


def _history(value: Any, where: str) -> tuple[Message, ...]:
    """Earlier turns of Alpaca's layout: a list of [question, answer]."""
    if _missing(value):
        return ()
    turns = []
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise UserError(f"{where}: field `history` must be a list of [question, answer], not {value!r}.")
        turns += [Message("user", read_text(entry[0], where, "history"))]
        turns += [Message("assistant", read_text(entry[1], where, "history"))]
    return tuple(turns)


def _gold(row: dict[str, Any], where: str) -> str | None:
    for name in _GOLD_FIELDS:
        value: Any = row.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's numbers and arrays
        if isinstance(value, (list, tuple)) and len(value) == 1:
            (value,) = value
        value = value.strip() and value if isinstance(value, str) else value
        if _missing(value) or (isinstance(value, (str, list, tuple, dict)) and not value):
            continue
        if isinstance(value, str):
            return read_text(value, where, name)
        if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            whole = isinstance(value, float) and value.is_integer()  # tables write 3 as 3.0 in a column with gaps
            return str(int(value) if whole else value)
        if name == "gold":  # the other names may stand for something else
            raise UserError(f"{where}: field `gold` must be a text or a number, not {shown(value)}.")
    return None


def prompt_identifier(row: dict[str, Any], where: str) -> str | None:
    """The id of a row under `prompt_id`, `id` or `uid`, as text; None where it has none."""
    name = next((name for name in ("prompt_id", "id", "uid") if not _missing(row.get(name))), None)
    if name is None:
        return None
    value = row[name].item() if hasattr(row[name], "item") else row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
        raise UserError(f"{where}: field `{name}` must be a text or a number, not {value!r}.")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return read_text(str(value), where, name)


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
        golds: A short hash of the gold answers, in order.
        longest: The few questions with the most characters, longest first.
    """

    count: int
    fingerprint: str
    golds: str
    longest: tuple[Question, ...]

    @property
    def identity(self) -> dict[str, str]:
        """What a run's folder knows of its prompts."""
        return {"prompts": self.fingerprint, "gold answers": self.golds}


def begin_with(prompts: Iterable[Prompt], identity: Mapping[str, Any]) -> bool:
    """Whether the first of some prompts are those of a run on record (`PromptSurvey.identity`), all unchanged."""
    count = str(identity["prompts"]).partition(":")[0]
    if not count.isdigit():
        return False
    found = survey_prompts(islice(prompts, int(count))).identity
    return all(identity[name] == value for name, value in found.items())


def survey_prompts(prompts: Iterable[Prompt]) -> PromptSurvey:
    """Goes through the prompts once.

    Args:
        prompts: The prompts; streamed.
    """
    digest, golds = hashlib.sha256(), hashlib.sha256()
    longest: list[tuple[int, int, Question]] = []
    count = 0
    for prompt in prompts:
        turns = "" if prompt.messages is None else default_prompt_id(prompt.messages)
        digest.update(f"{prompt.prompt_id}\x1f{prompt.prompt}{turns}\x1e".encode())
        golds.update(b"\x1e" if prompt.gold is None else f"{prompt.gold}\x1f\x1e".encode())
        entry = (sum(len(turn.content) for turn in question_turns(prompt.question)), -count, prompt.question)
        count += 1
        if len(longest) < _LONGEST:
            heapq.heappush(longest, entry)
        elif entry > longest[0]:
            heapq.heapreplace(longest, entry)
    questions = tuple(question for _, _, question in sorted(longest, key=lambda entry: entry[:2], reverse=True))
    return PromptSurvey(count, f"{count}:{digest.hexdigest()[:16]}", golds.hexdigest()[:16], questions)
