"""Responses that were generated elsewhere, put on record as if they had been drawn here."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.model.templates import PromptError, Template
from bvpo_stats.progress import progress
from bvpo_stats.records import (
    MODES,
    UNKNOWN,
    Completion,
    Field,
    Mode,
    Vocabulary,
    draw_key,
    from_dict,
    is_end,
    read_finish_reason,
    read_text,
    record_fields,
    to_dict,
)
from bvpo_stats.sampling.engines.base import SetAside, total_logp
from bvpo_stats.sampling.prompts import PROMPT_FIELDS, prompt_from_row, prompt_identifier
from bvpo_stats.sampling.sample import SAMPLES_FILE, SET_ASIDE_FILE, SamplingTally
from bvpo_stats.store.jsonl import append_jsonl, mend, read_jsonl
from bvpo_stats.store.tables import read_rows

_REASONING = ("reasoning_content", "reasoning", "thinking")
_SAMPLER_LOGPS = ("cumulative_logprob", "sampling_per_token_logps", "rollout_log_probs")
"""What vLLM, TRL and verl call a sampler's log-probabilities, of the response or of each of its tokens."""
_MASKS = {
    "prompt_ids": ("prompt_attention_mask", "prompt_mask"),
    "completion_ids": ("completion_attention_mask", "completion_mask", "attention_mask"),
}


@dataclass(frozen=True)
class Unusable:
    """A response that is put on record as set aside.

    Attributes:
        where: Its place.
        prompt_id: As in :class:`~bvpo_stats.records.Completion`.
        mode: Likewise.
        sample_index: Likewise.
        outcome: Why.
    """

    where: str
    prompt_id: str
    mode: Mode
    sample_index: int
    outcome: SetAside

    def as_row(self) -> dict[str, Any]:
        """As it is put on record, its place in front of the detail."""
        told = SetAside(self.outcome.reason, f"{self.where}: {self.outcome.detail}")
        return told.as_row(self.prompt_id, self.mode, self.sample_index)

    @property
    def key(self) -> str:
        """As in :attr:`~bvpo_stats.records.Completion.key`."""
        return draw_key(self.prompt_id, self.mode, self.sample_index)


class _SetAsideError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome = SetAside(reason, detail)


def adopt_completions(path: Path, template: Template | None) -> Iterator[Completion | Unusable]:
    """Streams the completions of a JSONL or Parquet file, filling in what a foreign writer left out.

    Needed in each row: ``prompt_id``, ``mode`` (thinking or nothinking), and ``prompt_ids`` + ``completion_ids``, or
    a prompt (in any layout of :func:`~bvpo_stats.sampling.prompts.prompt_from_row`) + ``text``, which are then
    tokenised here; and ``finish_reason``, in any spelling, unless the ids end in an end of sequence. ``sample_index``
    is counted where missing, the trace/answer boundary is found through the template, a trace in a field of its own is
    joined. Temperature, model and the like stay unknown where no line gives them.

    Where the template is known, everything is checked against it: ids are the model's, prompt ids are what it renders,
    padding is cut off where that is certain.

    Args:
        path: The file.
        template: The model's template; may be None where every line is a full record.

    Yields:
        The responses; those that neither stopped by themselves nor were cut at a limit, and those to prompts that
        cannot be put to the model, as `Unusable`.

    Raises:
        UserError: A line lacks something that cannot be filled in, is wrong or ambiguous, or a draw occurs twice; file,
            line and field are named.
    """
    counts: dict[int, int] = {}
    seen: set[int] = set()
    for where, row in read_rows(path, Completion, name="samples_from"):
        known = {name: value for name, value in row.items() if value is not None}  # tables fill up with nulls
        response = adopt_row(known, where, template, counts)
        key = _digest(response.key)
        if key in seen:
            raise UserError(f"{where}: the response {response.key} occurs twice. Remove one of them.")
        seen.add(key)
        yield response


def adopt_row(
    row: dict[str, Any], where: str, template: Template | None, counts: dict[int, int]
) -> Completion | Unusable:
    """One line of :func:`adopt_completions`; ``counts`` remembers how many responses each prompt had in each mode."""
    mode = row.get("mode")
    if mode not in MODES:
        raise UserError(f"{where}: field `mode` must be `thinking` or `nothinking`, not {mode!r}.")
    prompt_id = prompt_identifier({"prompt_id": row.get("prompt_id")}, where)
    if prompt_id is None:
        raise UserError(f"{where}: no field `prompt_id`; it says which responses answer the same question.")
    place = _digest(f"{prompt_id}/{mode}")
    row = {"sample_index": counts.get(place, 0)} | row | {"prompt_id": prompt_id}
    counts[place] = counts.get(place, 0) + 1
    fields = record_fields(Completion)
    index = fields["sample_index"].read(row["sample_index"], where)
    for name in ("prompt_ids", "completion_ids"):
        if name in row:
            row[name] = fields[name].read(row[name], where)
    logps, given = _sampler_logps(row, where), len(row.get("completion_ids", ()))
    try:
        _read_prompt(row, where)
        if template is None:
            _check_whole(row, where)
        else:
            _fit(row, where, template, mode)
    except _SetAsideError as error:
        return Unusable(where, prompt_id, mode, index, error.outcome)
    if "sampler_logp" not in row and logps is not None:
        tokens = len(row["completion_ids"])
        if isinstance(logps, tuple):
            row["sampler_logp"] = total_logp(logps[:tokens], tokens)
        elif tokens <= given:
            row["sampler_logp"] = min(0.0, logps)
    return from_dict(
        Completion, {"engine": "file", "text": ""} | row, where, None if template is None else template.vocabulary
    )


def _sampler_logps(row: dict[str, Any], where: str) -> tuple[float, ...] | float | None:
    """Log-probabilities of a response's tokens under its sampler, or their sum, from fields of other programs.

    These do not say whether they are those of the draw or the model's own, which are the same at temperature 1 without
    a nucleus: elsewhere they are not known to be what they are taken for, and left alone (None).

    Raises:
        UserError: The field holds no log-probabilities, or not one for each token.
    """
    name = next((name for name in _SAMPLER_LOGPS if name in row), None)
    if name is None:
        return None
    many, ids = isinstance(row[name], list | tuple), row.get("completion_ids")
    found = Field(name, float, many, (), False, True).read(row[name], where)
    if (max(found, default=0.0) if many else found) > _ROUNDING:
        raise UserError(f"{where}: field `{name}` must hold log-probabilities, which are at most 0.")
    if many and ids is not None and len(found) != len(ids):
        raise UserError(f"{where}: field `{name}` has {len(found)} numbers for {len(ids)} `completion_ids`.")
    plain = row.get("temperature") == 1 and row.get("top_p") == 1 and row.get("top_k") in (0, -1)
    return None if ids is None or not plain else found


def _read_prompt(row: dict[str, Any], where: str) -> None:
    """Puts the question into `prompt` and `messages`, from whatever layout it has."""
    layout = {name: value for name, value in row.items() if name not in ("answer", "solution", "id", "uid")}
    if "messages" in row and "prompt" in row:
        layout.pop("prompt")  # our own records have the last turn there
    if not any(name in layout for name in PROMPT_FIELDS):
        row.setdefault("prompt", "")
    elif row.get("prompt") != "":
        found = prompt_from_row(layout, where)
        row |= {"prompt": found.prompt, "messages": found.messages}
        if "gold" in row:
            row["gold"] = found.gold


def _check_whole(row: dict[str, Any], where: str) -> None:
    """Without a template, a line must hold everything."""
    if "prompt_ids" not in row or "completion_ids" not in row:
        raise UserError(f"{where}: no token ids, and no model to tokenise with. Give `model`.")
    if not row["completion_ids"]:
        raise UserError(f"{where}: the completion is empty.")
    reason = read_finish_reason(row.get("finish_reason"))
    if reason not in ("stop", "length"):
        raise _not_finished(reason)
    row["finish_reason"] = reason
    if "answer_start" not in row and not ("trace" in row and row.get("answer") is None):
        raise UserError(f"{where}: no `answer_start`, and no model to find it with. Give `model`.")
    row |= {name: row.get(name) for name in ("answer_start", "trace", "answer")}


def _fit(row: dict[str, Any], where: str, template: Template, mode: Mode) -> None:
    """Fills in and checks a line by the model's template: prompt, response, end, and where the answer begins."""
    vocabulary = template.vocabulary
    question = row.get("messages") or row["prompt"]
    try:
        prompt_text = template.prompt_text(question, mode) if question else ""
    except PromptError as error:
        raise _SetAsideError(error.reason, str(error)) from error
    prompt = template.encode(prompt_text) if question else None
    reason = read_finish_reason(row.get("finish_reason"), vocabulary.eos_ids)
    if reason == "stop" and not is_end(row.get("stop_reason", row.get("matched_stop")), vocabulary.eos_ids):
        reason = "stop-sequence"
    by_text = "completion_ids" not in row
    if by_text:
        row.pop("sampler_logp", None)  # of the sampler's tokens, which a text does not say
        ids = _tokenised(row, where, template, mode, prompt_text, reason)
    else:
        given = row["completion_ids"]
        ids = vocabulary.response(_unmasked(row, "completion_ids", where), where, "completion_ids")
        if ids != given:
            row.pop("sampler_logp", None)  # whether it counts what is cut off is not known
        if isinstance(row.get("logprobs"), (list, tuple)) and len(row["logprobs"]) == len(given):
            row["logprobs"] = row["logprobs"][: len(ids)]
        if _ends(given, vocabulary) > 1 and reason == "length":
            raise UserError(f"{where}: field `finish_reason` calls the response cut, but its ids end in several ends.")
    if not ids:
        raise UserError(f"{where}: the completion is empty.")
    if ids[-1] in vocabulary.eos_ids and reason in (UNKNOWN, "length"):
        reason = "stop"  # it was written, whatever else is on record
    if reason not in ("stop", "length"):
        raise _not_finished(reason)
    if reason == "stop" and ids[-1] not in vocabulary.eos_ids:
        if not vocabulary.eos_ids:
            raise UserError(f"{where}: the model names no end of sequence, so a response cannot end by itself.")
        ids = (*ids, vocabulary.eos_ids[0])  # samplers may keep the final token to themselves
        for name in ("logprobs", "sampler_logp"):
            row.pop(name, None)  # of one token less: scored again, or unknown
    if "prompt_ids" in row:
        given = _same_prompt(_unmasked(row, "prompt_ids", where), prompt, where, template)
        if mode == "nothinking" and prompt is not None and given != prompt:
            closing = template.empty_trace_ids(question)[1]
            if given + closing == prompt and ids[: len(closing)] == closing:  # in training form
                given, ids = prompt, ids[len(closing) :]
        if prompt is not None and given != prompt:
            raise UserError(
                f"{where}: field `prompt_ids` is not what template {template.name} renders for this prompt "
                f"({len(given)} tokens, not {len(prompt)}): {_difference(given, prompt, template)}. Leave it out, or "
                "give the model (and `template`, `empty_trace`) that the responses were sampled with."
            )
        prompt = given
    elif prompt is None:
        raise UserError(f"{where}: needs `prompt_ids` and `completion_ids`, or `prompt` and `text`.")
    tags = [template.control_tokens[tag] for tag in (template.protocol.open_tag, template.protocol.close_tag)]
    if mode == "thinking" and prompt[-1:] == ids[:1] == (tags[0],):
        raise UserError(
            f"{where}: field `completion_ids` begins with the opening tag that the prompt ends in already. Leave it "
            "out: the model saw it once."
        )
    if mode == "nothinking" and (set(tags) - {-1}).intersection(ids):
        raise _SetAsideError("think-tag-in-answer", "a think tag in the answer of a nothinking response")
    start, trace, answer = template.split(ids, mode)
    if row.get("answer_start") not in (None, start) and len(ids) == len(row["completion_ids"]):
        raise UserError(f"{where}: field `answer_start` is {row['answer_start']!r}, but the trace ends at {start}.")
    if not by_text and "prompt_ids" not in row:  # where they are given, they have shown whose ids they are
        _check_text(row, ids, where, template)
    row |= {"prompt_ids": prompt, "completion_ids": ids, "finish_reason": reason}
    row |= {"answer_start": start, "trace": trace, "answer": answer}
    if by_text or "text" not in row:
        row["text"] = template.completion_text(ids)
    row.setdefault("template", template.name)


def _not_finished(reason: str) -> _SetAsideError:
    detail = "its finish reason is not recorded: give `finish_reason`, stop or length"
    if reason == "stop-sequence":
        detail = "it was stopped at a text or token that is no end of sequence"
    elif reason != UNKNOWN:
        detail = f"it ended for the reason {reason!r}, neither by itself nor at a limit"
    return _SetAsideError(f"finish-{reason}", detail)


def _tokenised(
    row: dict[str, Any], where: str, template: Template, mode: Mode, prompt: str, reason: str
) -> tuple[int, ...]:
    """The ids of a response that is given as text."""
    name = next((name for name in _REASONING if row.get(name) not in (None, "")), None)
    text = row.get("text", "" if name else None)
    if not isinstance(text, str) or not row["prompt"]:
        raise UserError(f"{where}: needs `prompt_ids` and `completion_ids`, or `prompt` and `text`.")
    text = read_text(text, where, "text")
    if name is not None:
        reasoning = read_text(row[name], where, name)
        if mode == "nothinking":
            raise UserError(f"{where}: field `{name}` holds a trace, but the response is a nothinking one.")
        if template.protocol.close_tag in reasoning or template.protocol.close_tag in text:
            if reasoning.strip() not in text:
                raise UserError(f"{where}: both `text` and `{name}` hold a trace; leave one of them out.")
        else:  # a parser that met no closing tag calls all of it reasoning
            text = template.joined(reasoning, text or None)
    text = template.own_part(text, prompt, mode)
    opening = template.protocol.open_tag
    if mode == "thinking" and prompt.rstrip().endswith(opening) and text.lstrip().startswith(opening):
        raise UserError(f"{where}: field `text` opens its trace twice; keep one opening tag.")
    return template.vocabulary.response(template.encode(text), where, "text")


def _unmasked(row: dict[str, Any], name: str, where: str) -> tuple[int, ...]:
    """The ids where the attention mask is 1, where there is one."""
    ids: tuple[int, ...] = row[name]
    mask_name = next((mask for mask in _MASKS[name] if mask in row), None)
    if mask_name is None:
        return ids
    mask = Field(mask_name, int, True, (), False, True).read(row[mask_name], where)
    kept = [place for place, flag in enumerate(mask) if flag]
    if len(mask) != len(ids) or not set(mask) <= {0, 1} or kept != list(range(kept[0], kept[-1] + 1) if kept else ()):
        raise UserError(f"{where}: field `{mask_name}` must be a run of ones, with a number for each of `{name}`.")
    return tuple(ids[place] for place in kept)


def _ends(ids: tuple[int, ...], vocabulary: Vocabulary) -> int:
    """How many ends of sequence a response ends in."""
    return next((n for n, token in enumerate(reversed(ids)) if token not in vocabulary.eos_ids), len(ids))


def _same_prompt(
    given: tuple[int, ...], prompt: tuple[int, ...] | None, where: str, template: Template
) -> tuple[int, ...]:
    """The prompt's ids without padding: where it is another token's id, the rendered prompt says what is padding."""
    if prompt is not None and len(given) > len(prompt) and given[-len(prompt) :] == prompt:
        front = set(given[: -len(prompt)])
        if front == {template.tokenizer.pad_token_id}:
            return prompt
    return template.vocabulary.prompt(given, where)


def _difference(given: tuple[int, ...], prompt: tuple[int, ...], template: Template) -> str:
    same = (i for i, (a, b) in enumerate(zip(given, prompt, strict=False)) if a != b)
    place = next(same, min(len(given), len(prompt)))
    shown = [repr(template.tokenizer.decode(list(ids[place : place + 4]))) for ids in (given, prompt)]
    return f"from token {place} on, {shown[0]} where {shown[1]} belongs"


def _check_text(row: dict[str, Any], ids: tuple[int, ...], where: str, template: Template) -> None:
    """Refuses ids that spell another text than the one beside them: they are another tokenizer's."""
    text = row.get("text")
    if text is None:
        return
    spelled, wanted = (_bare(each) for each in (template.completion_text(ids), read_text(text, where, "text")))
    if wanted not in spelled and spelled not in wanted:
        raise UserError(
            f"{where}: field `completion_ids` spells {template.completion_text(ids)[:_SHOWN]!r}, not the `text` beside "
            "it. Is it the model that these ids are for?"
        )


def _bare(text: str) -> str:
    """A text without what differs between samplers: white space and tags."""
    return "".join(re.sub(r"<[^<>]*>", "", text).split())


_SHOWN = 60
_ROUNDING = 1e-4  # nats


def _digest(key: str) -> int:
    """What is remembered of a key: 64 bits, a fraction of the memory of the text."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


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
    files = {kind: folder / name for kind, name in ((Completion, SAMPLES_FILE), (Unusable, SET_ASIDE_FILE))}
    for file in files.values():
        mend(file, ordered=True)
    done = {kind: sum(1 for _ in read_jsonl(file)) if file.exists() else 0 for kind, file in files.items()}
    left = dict(done)
    adopted = _one_source(adopt_completions(source, policy.template if policy else None), source)
    kept = _first_prompts((response for response in adopted if response.mode in modes), limit)
    responses = tokens = put_aside = 0
    first: Unusable | None = None
    started = time.monotonic()
    with progress("Reading", _count_lines(source), "responses", done=sum(done.values())) as advance:
        while rows := list(islice(kept, _ROWS)):
            first = first or next((row for row in rows if isinstance(row, Unusable)), None)
            fresh: list[Completion | Unusable] = []
            for row in rows:  # what an interrupted call has on record comes first, in either file
                if left[type(row)]:
                    left[type(row)] -= 1
                else:
                    fresh.append(row)
            whole = [row for row in fresh if isinstance(row, Completion)]
            aside = [row for row in fresh if isinstance(row, Unusable)]
            append_jsonl(files[Completion], map(to_dict, whole))
            append_jsonl(files[Unusable], (row.as_row() for row in aside))
            responses += len(whole)
            put_aside += len(aside)
            tokens += sum(len(row.completion_ids) for row in whole)
            advance(len(fresh))
    if not done[Completion] and not responses:
        if first is not None:
            number = put_aside + done[Unusable]
            raise UserError(
                f"{source}: none of the {number} responses can be used. {first.where}: {first.outcome.detail}."
            )
        raise UserError(f"{source} holds no responses in mode {' or '.join(modes)}.")
    return SamplingTally(responses, tokens, put_aside, time.monotonic() - started)


def _count_lines(path: Path) -> int:
    if path.suffix != ".jsonl":
        return sum(1 for _ in read_rows(path, Completion, name="samples_from"))
    with path.open("rb") as handle:
        return sum(block.count(b"\n") for block in iter(lambda: handle.read(1 << 16), b""))


Adopted = Completion | Unusable


def _one_source(completions: Iterator[Adopted], source: Path) -> Iterator[Adopted]:
    first: Completion | None = None
    for completion in completions:
        if isinstance(completion, Unusable):
            yield completion
            continue
        first = first or completion
        for field in ("model", "template"):
            name, other = getattr(first, field), getattr(completion, field)
            if name != other:
                raise UserError(
                    f"{source}: response {completion.key} is of {field} {other!r}, those before it of {name!r}. "
                    "Give each a file and an `output` folder of its own."
                )
        yield completion


def _first_prompts(completions: Iterator[Adopted], limit: int | None) -> Iterator[Adopted]:
    seen: set[str] = set()
    for completion in completions:
        if limit is not None and completion.prompt_id not in seen:
            if len(seen) == limit:
                continue
            seen.add(completion.prompt_id)
        yield completion
