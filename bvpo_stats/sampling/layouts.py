"""Preference data in TRL's layouts, made into pairs: text, messages, or token ids, with or without a prompt column.

A completion is never put through a chat template: those of reasoning models strip the trace from a finished turn, so
``<think>R</think>A`` and ``<think></think>A`` would become the same text. Only the prompt is rendered, once per mode,
and prompt and completion are tokenised together, as TRL does with text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bvpo_stats.errors import UserError, rows_of
from bvpo_stats.model.templates import PromptError, Template
from bvpo_stats.progress import say
from bvpo_stats.records import (
    MODES,
    Mode,
    PreferencePair,
    Question,
    default_prompt_id,
    from_dict,
    missing_fields,
    record_fields,
)
from bvpo_stats.sampling.pairs import training_text
from bvpo_stats.sampling.preferences import preference_rows
from bvpo_stats.sampling.prompts import prompt_from_row
from bvpo_stats.store.tables import Source, read_rows

_PROBE = "probe\x1f"
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_CARRIED = (
    *("chosen_reward", "rejected_reward", "chosen_index", "rejected_index"),
    *("temperature", "top_p", "top_k", "cut_share", "unclosed_share", "model", "template"),
)
_NEEDED = (
    "A pair needs `prompt`, `chosen` and `rejected` as text or messages (the prompt may stand inside both), or "
    "`prompt_ids`, `chosen_ids` and `rejected_ids`."
)

TemplateSource = Template | Callable[[], Template]
"""A template, or a function that loads one: called when there is a row."""


def read_pairs(
    source: Source, template: TemplateSource, mode: Mode | None = None, *, name: str = "pairs"
) -> list[PreferencePair]:
    """The pairs of any source of :func:`~bvpo_stats.store.tables.read_records`, in any layout of :func:`as_pairs`.

    Args:
        source: Where they are.
        template: The policy's template.
        mode: D_t (``thinking``) or D_e: which file of a folder, and what rows without a mode are.
        name: What errors call the source.

    Raises:
        UserError: As in ``read_records`` and ``as_pairs``.
    """
    return _pairs(read_rows(source, PreferencePair, mode=mode, name=name), template, mode)


def as_pairs(
    rows: Iterable[Any], template: TemplateSource, mode: Mode | None = None, *, name: str = "row"
) -> list[PreferencePair]:
    """Pairs from rows in any of these layouts.

    Of further columns, those with the names of a record's other fields (``temperature``, ``top_p``, ``model``,
    ``chosen_reward``, ...) are kept and all others ignored: what no column says is unknown.

    - Records (:class:`~bvpo_stats.records.PreferencePair`), or rows with all their fields, keep their own mode.
    - ``prompt_ids``, ``chosen_ids``, ``rejected_ids``: taken as they are.
    - ``prompt``, ``chosen``, ``rejected`` as text. A prompt with the template's generation prompt at its end is a
      rendered one and tokenised as it is; any other is the user's question (see
      :func:`~bvpo_stats.sampling.prompts.prompt_from_row`; a column ``system`` goes with it) and rendered by the
      template.
    - The same as messages: all turns up to a user turn, one assistant turn. ``reasoning_content`` is put in front of
      the content again, closing tag between them. The prompt may stand inside ``chosen`` and ``rejected``.

    - UltraFeedback's, HelpSteer's and open-r1's own columns, as
      :func:`~bvpo_stats.sampling.preferences.preference_rows` makes one of these of them; rows that prefer nothing are
      left out, which is said.

    End-of-sequence is put behind a text or message that does not end in it, as TRL does, and never behind ids.

    In ``nothinking`` mode the pair gets its training form (see :class:`~bvpo_stats.records.PreferencePair`): the prompt
    of D_t, with the tokens that close the empty trace at the head of both completions. Pairs of one question therefore
    share prompt ids and, where no column ``prompt_id`` gives one, the prompt id: a hash of the question.

    Args:
        rows: The rows: a list, a ``datasets.Dataset``, anything iterable.
        template: The policy's template.
        mode: What rows without a mode are: D_t (``thinking``) or D_e (``nothinking``).
        name: What errors call the rows.

    Raises:
        UserError: A row without the needed columns, of the wrong type, or with an ambiguous boundary between prompt,
            trace and answer: tokens that merge across it, special tokens or a second think tag inside, several
            assistant turns behind the prompt. The row is named.
    """
    rows = rows_of(name, rows.with_format(None) if hasattr(rows, "with_format") else rows)
    return _pairs(((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1)), template, mode)


def all_pairs(source: Source, empty_source: Source | None, template: Template) -> list[PreferencePair]:
    """D_t and D_e, from one source that holds both or from one each, in any layout of :func:`as_pairs`.

    Raises:
        UserError: As in `read_pairs`.
    """
    if empty_source is None:
        if not isinstance(source, (str, os.PathLike)):
            return as_pairs(source, template, name="pairs")
        empty_source = source
    found = read_pairs(source, template, "thinking", name="pairs")
    return found + read_pairs(empty_source, template, "nothinking", name="empty_pairs")


def _pairs(rows: Iterable[tuple[str, Any]], source: TemplateSource, mode: Mode | None) -> list[PreferencePair]:
    template: Template | None = None
    found, without = [], 0
    for where, row in preference_rows(rows):
        if template is None:
            template = source if isinstance(source, Template) else source()
        if isinstance(row, PreferencePair):
            found.append(template.vocabulary.checked(row, where))
        elif row is None:
            without += 1
        elif not isinstance(row, Mapping):
            raise UserError(f"{where}: a {type(row).__name__}, neither a pair nor a row of columns.")
        elif "mode" in row and not missing_fields(PreferencePair, dict(row)):
            found.append(from_dict(PreferencePair, dict(row), where, template.vocabulary))
            _check_answer_starts(found[-1], template, where)
        else:
            found.append(foreign_pair(dict(row), template, mode, where))
    if without:
        say(f"{without} prompts prefer no answer (ties, or fewer than two with a score) and are left out.")
    return found


def foreign_pair(row: dict[str, Any], template: Template, mode: Mode | None, where: str) -> PreferencePair:
    """A pair from one row of texts, messages or ids; see :func:`as_pairs`.

    Raises:
        UserError: As there.
    """
    mode = row.get("mode", mode)
    if mode not in MODES:
        raise UserError(
            f"{where}: field `mode` must be `thinking` (D_t) or `nothinking` (D_e), not {mode!r}; give it by `mode`."
        )
    given = {name: row[name] for name in _CARRIED if row.get(name) is not None}
    without = [name for name in _IDS if row.get(name) is None]
    if 0 < len(without) < len(_IDS):
        raise UserError(f"{where}: no column {' and '.join(f'`{name}`' for name in without)}. {_NEEDED}")
    if not without:
        given |= {name: row[name] for name in ("ref_chosen_logps", "ref_rejected_logps") if row.get(name) is not None}
        prompt_ids, sides = _from_ids(row, template, mode, where)
        question: Question = _question_of(training_text(prompt_ids, template.tokenizer, is_prompt=False), template)
    else:
        try:
            question, prompt_ids, sides = _from_texts(row, template, mode, where)
        except PromptError as error:
            raise UserError(f"{where}: {error}") from error
    if sides[0] == sides[1]:
        raise UserError(f"{where}: chosen and rejected are the same tokens.")
    starts = [_answer_start(ids, template, mode) for ids in sides]
    name = row.get("prompt_id")
    texts = [training_text(ids, template.tokenizer) for ids in sides]
    values = {
        "prompt_id": default_prompt_id(question) if name is None else str(name),
        "mode": mode,
        "prompt": training_text(prompt_ids, template.tokenizer, is_prompt=True),
        "chosen": texts[0],
        "rejected": texts[1],
        "prompt_ids": prompt_ids,
        "chosen_ids": sides[0],
        "rejected_ids": sides[1],
        "chosen_answer_start": starts[0],
        "rejected_answer_start": starts[1],
        "chosen_answer": None if starts[0] is None else template.answer_text(sides[0][starts[0] :]),
        "rejected_answer": None if starts[1] is None else template.answer_text(sides[1][starts[1] :]),
    }
    return from_dict(PreferencePair, values | given, where, template.vocabulary)


def _check_answer_starts(pair: PreferencePair, template: Template, where: str) -> None:
    """Refuses a D_t pair of this template that says its answers begin elsewhere than behind the closing tag."""
    if (
        pair.mode != "thinking"
        or pair.template != template.name
        or template.control_tokens[template.protocol.close_tag] < 0
    ):
        return  # where the tag spans several tokens, looking for it takes longer than it is worth
    for name, start, ids in (
        ("chosen_answer_start", pair.chosen_answer_start, pair.chosen_ids),
        ("rejected_answer_start", pair.rejected_answer_start, pair.rejected_ids),
    ):
        length = template.trace_length(ids)
        if start is not None and start != length:
            ends = "never closes" if length is None else f"ends at {length}"
            raise UserError(f"{where}: field `{name}` is {start}, but the trace {ends}. Correct it, or leave it out.")


def _answer_start(ids: tuple[int, ...], template: Template, mode: Mode) -> int | None:
    if mode == "thinking":
        return template.trace_length(ids)
    closing = _closing(template)
    return len(closing) if ids[: len(closing)] == closing else None


def _closing(template: Template) -> tuple[int, ...]:
    """The tokens that close the empty trace; they depend on no question."""
    return template.empty_trace_ids(_PROBE)[1]


def _from_ids(
    row: dict[str, Any], template: Template, mode: Mode, where: str
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
    fields = record_fields(PreferencePair)
    prompt, chosen, rejected = (fields[name].read(row[name], where) for name in _IDS)
    for name, ids in zip(_IDS, (prompt, chosen, rejected), strict=True):
        if not ids:
            raise UserError(f"{where}: `{name}` is empty.")
    vocabulary = template.vocabulary
    prompt = vocabulary.prompt(prompt, where)
    chosen = vocabulary.response(chosen, where, "chosen_ids")
    rejected = vocabulary.response(rejected, where, "rejected_ids")
    opening = template.control_tokens[template.protocol.open_tag]
    for name, ids in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        if mode == "thinking" and prompt[-1:] == ids[:1] == (opening,):
            raise UserError(f"{where}: `{name}` begins with the opening tag that the prompt ends in already.")
    closing = _closing(template) if mode == "nothinking" else ()
    if closing and prompt[-len(closing) :] == closing:  # the D_e prompt: its end opens the completions
        prompt, chosen, rejected = prompt[: -len(closing)], closing + chosen, closing + rejected
    return prompt, (chosen, rejected)


def plain_row(row: dict[str, Any], template: Template, where: str) -> dict[str, Any]:
    """A row of texts or messages as one whose `chosen` and `rejected` are texts, with the prompt apart.

    Raises:
        UserError: As in :func:`as_pairs`.
    """
    prompt, chosen, rejected = _prompt_and_texts(row, template, where)
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt_and_texts(row: dict[str, Any], template: Template, where: str) -> tuple[Any, str, str]:
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        names = " and ".join(f"`{name}`" for name in missing)
        raise UserError(f"{where}: no column {names} (columns: {', '.join(row) or 'none'}). {_NEEDED}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _from_messages(prompt, chosen, rejected, template, where)
    elif not isinstance(chosen, str) or not isinstance(rejected, str):
        raise UserError(f"{where}: `chosen` and `rejected` must both be text or both messages. {_NEEDED}")
    elif prompt is None:
        prompt, chosen, rejected = _shared_text(chosen, rejected, template, where)
    return prompt, chosen, rejected


def _from_texts(
    row: dict[str, Any], template: Template, mode: Mode, where: str
) -> tuple[Question, tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
    """(question, prompt ids, completions' ids) of a row of texts or messages."""
    prompt, chosen, rejected = _prompt_and_texts(row, template, where)
    rendered = isinstance(prompt, str) and _is_rendered(prompt, template)
    question: Question
    if isinstance(prompt, str) and rendered:
        question, text = _question_of(prompt, template), _training_prompt(prompt, template, mode)
    else:
        if not isinstance(prompt, (str, list)):
            raise UserError(f"{where}: `prompt` must be a text or messages, not {prompt!r}.")
        if isinstance(prompt, list) and _role(prompt[-1:] and prompt[-1]) == "assistant":
            raise UserError(f"{where}: the prompt's last turn is an assistant's; it must be a user's.")
        known = {name: row.get(name) for name in ("system", "system_prompt")}
        question = prompt_from_row({"prompt": prompt, **known}, where).question
        text = template.prompt_text(question, "thinking")
    opening = ""
    if mode == "nothinking":
        thinking, empty = template.protocol.thinking_opening, template.protocol.empty_trace
        if empty.startswith(thinking):
            opening = empty[len(thinking) :]
        else:  # D_e's prompt does not go on where D_t's ends
            text = text.removesuffix(thinking) + empty
    encode = _encoder(text, template, rendered=rendered)
    sides = [
        _completion_ids(encode, text, opening, completion, template, mode, f"{where}: `{name}`")
        for name, completion in (("chosen", chosen), ("rejected", rejected))
    ]
    return question, encode(text), (sides[0], sides[1])


def _encoder(prompt: str, template: Template, *, rendered: bool) -> Callable[[str], tuple[int, ...]]:
    """How texts that begin with a prompt are tokenised.

    The template's prompts bring their own BOS; in front of a prompt that was rendered elsewhere without one, the
    tokenizer puts it where it does so in front of any text (as TRL tokenises).
    """
    bos = template.tokenizer.bos_token
    special = rendered and not (bos and prompt.startswith(str(bos)))
    return lambda text: tuple(template.tokenizer.encode(text, add_special_tokens=special))


def _completion_ids(
    encode: Callable[[str], tuple[int, ...]],
    prompt: str,
    opening: str,
    completion: str,
    template: Template,
    mode: Mode,
    where: str,
) -> tuple[int, ...]:
    """Ids behind the prompt of ``prompt + opening + completion`` + end-of-sequence, tokenised at once."""
    eos, close = str(template.tokenizer.eos_token), template.protocol.close_tag
    body = completion.removesuffix(eos)
    if not body.strip():
        raise UserError(f"{where} is empty.")
    body = template.own_part(body, prompt + opening, mode)
    tag = template.protocol.open_tag
    if mode == "nothinking" and (tag in body or close in body):
        raise UserError(f"{where} has a think tag in it, but a pair of D_e has an empty trace.")
    openings = body.count(tag) + prompt.rstrip().endswith(tag)
    if mode == "thinking" and (openings > 1 or body.count(close) > 1):
        raise UserError(f"{where} has a doubled think tag; a response opens and closes its trace once.")
    inside = next((token for token in _special_tokens(template) if token in body), None)
    if inside is not None:
        raise UserError(f"{where} has the special token {inside} inside, so it is unclear where the response ends.")
    prompt_ids, start, whole = encode(prompt), encode(prompt + opening), encode(prompt + opening + body + eos)
    if start[: len(prompt_ids)] != prompt_ids or whole[: len(start)] != start:
        raise UserError(
            f"{where}: its first token merges with the end of the prompt, so the boundary between them is ambiguous. "
            "Give `prompt_ids`, `chosen_ids` and `rejected_ids` instead."
        )
    return whole[len(prompt_ids) :]


def _special_tokens(template: Template) -> list[str]:
    """Tokens that structure a chat; think tags are not among them, whatever the tokenizer says."""
    tokens = map(str, template.tokenizer.all_special_tokens)
    added = (str(t) for t in template.tokenizer.added_tokens_decoder.values() if t.special)
    tags = (template.protocol.open_tag, template.protocol.close_tag)
    return [token for token in dict.fromkeys((*tokens, *added)) if token not in tags]


def _is_rendered(prompt: str, template: Template) -> bool:
    """Whether a text is a user turn and the generation prompt behind it; the response may have begun."""
    before, after = _frame(template)
    start = before.removeprefix(str(template.tokenizer.bos_token or "")).strip()
    header = after.removesuffix(template.protocol.thinking_opening).strip()
    front, found, back = prompt.rpartition(header) if header else ("", "", "")
    return bool(found) and start in front and not any(token in back for token in _special_tokens(template))


def _frame(template: Template) -> tuple[str, str]:
    """What the template puts around a question in D_t."""
    before, _, after = template.prompt_text(_PROBE, "thinking").partition(_PROBE)
    return before, after


def _question_of(rendered: str, template: Template) -> str:
    """The user's question in a rendered prompt of either mode; the whole text where it has another form."""
    before, after = _frame(template)
    header = after.removesuffix(template.protocol.thinking_opening)
    bos = str(template.tokenizer.bos_token or "")
    for ending in (header + template.protocol.empty_trace, after, header):
        for start in (before, before.removeprefix(bos)):
            if rendered.startswith(start) and ending and rendered.endswith(ending):
                return rendered[len(start) : len(rendered) - len(ending)]
    return rendered


def _training_prompt(rendered: str, template: Template, mode: Mode) -> str:
    """A rendered prompt in D_t's form."""
    protocol = template.protocol
    if mode == "nothinking" and protocol.empty_trace and rendered.endswith(protocol.empty_trace):
        return rendered.removesuffix(protocol.empty_trace) + protocol.thinking_opening
    return rendered


def _shared_text(chosen: str, rejected: str, template: Template, where: str) -> tuple[str, str, str]:
    """Prompt and completions where the prompt stands inside both texts: up to the generation prompt they share."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    _, after = _frame(template)
    header = after.removesuffix(template.protocol.thinking_opening)
    for ending in (header + template.protocol.empty_trace, after, header):
        place = chosen.rfind(ending, 0, shared) if ending.strip() else -1
        if place >= 0:
            cut = place + len(ending)
            return chosen[:cut], chosen[cut:], rejected[cut:]
    raise UserError(
        f"{where}: no column `prompt`, and `chosen` and `rejected` do not begin with one rendered prompt of template "
        f"{template.name}. {_NEEDED}"
    )


def _from_messages(
    prompt: Any, chosen: list[Any], rejected: list[Any], template: Template, where: str
) -> tuple[list[Any], str, str]:
    """Turns of the prompt and completions of message lists, the prompt in front of both or in a column of its own."""
    if isinstance(prompt, list) and chosen[: len(prompt)] != prompt:
        turns: Sequence[Any] = prompt
    else:
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        shared = min(len(chosen), len(rejected)) if shared is None else shared
        if shared and _role(chosen[shared - 1]) == "assistant":  # equal answers; refused later
            shared -= 1
        turns, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not turns and isinstance(prompt, str):
            turns = [{"role": "user", "content": prompt}]
    texts = []
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) != 1 or _role(messages[0]) != "assistant":
            raise UserError(f"{where}: `{name}` must end in exactly one assistant message behind the prompt.")
        texts.append(_assistant_text(messages[0], template, f"{where}: `{name}`"))
    return list(turns), texts[0], texts[1]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _assistant_text(message: dict[str, Any], template: Template, where: str) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise UserError(f"{where}: the assistant message has no text as its content.")
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if not reasoning:
        return content
    return template.joined(reasoning, content)
