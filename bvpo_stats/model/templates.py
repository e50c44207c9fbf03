"""Prompt protocols of reasoning models: token-exact D_t and D_e prompts, and where a completion's trace ends.

Only generation prompts are ever rendered through a chat template. A finished response never is: the templates of
reasoning models strip the trace from past assistant turns, so ``<think>R</think>A`` and ``<think></think>A`` would
become the same text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bvpo_stats.errors import UserError
from bvpo_stats.records import Message, Mode, Question, Role, question_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENING = re.compile(r"<think>\s*(</think>\s*)?\Z")
_PROBE = "probe"
_SHOWN = 60  # characters of a text that is refused


class PromptError(UserError):
    """One question that cannot be put to the model as it is; others can.

    Attributes:
        reason: Short name of the cause, for counting: ``control-tokens`` or ``not-rendered``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Protocol:
    """How one family of reasoning models marks its traces.

    Attributes:
        name: Name for ``--template`` and the records.
        thinking_opening: Text after the rendered assistant marker in D_t prompts (empty: the model writes ``<think>``).
        empty_trace: Text after the rendered assistant marker in D_e prompts: the trace opened and closed at once.
        close_tag: Text that ends a trace.
    """

    name: str
    thinking_opening: str
    empty_trace: str
    close_tag: str = "</think>"


# Appendix C.3 of the paper fixes `<think>` and `<think></think>` for the R1 family; the official R1-Distill template
# adds a newline after `<think>`, which the model writes itself when it is left out, and which would keep the D_e prompt
# from being a continuation of the D_t prompt. Qwen3's own template fixes its empty trace; its D_t prompt ends at the
# marker.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("r1-distill", "<think>", "<think></think>"),
        Protocol("r1-0528", "<think>", "<think></think>"),
        Protocol("qwen3", "", "<think>\n\n</think>\n\n"),
        Protocol("embedded", "<think>", "<think></think>"),
    )
}


@dataclass(frozen=True)
class Template:
    """A protocol bound to a tokenizer.

    Attributes:
        protocol: The protocol.
        tokenizer: The model's fast tokenizer.
    """

    protocol: Protocol
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """Identity for the records: the protocol's name, with the empty trace where it is not the protocol's own."""
        default = PROTOCOLS.get(self.protocol.name)
        if default is not None and default.empty_trace == self.protocol.empty_trace:
            return self.protocol.name
        return f"{self.protocol.name}[{self.protocol.empty_trace!r}]"

    def prompt_text(self, question: Question, mode: Mode) -> str:
        """The generation prompt: D_t form (``thinking``) or D_e form (``nothinking``), Appendix C.3 of the paper.

        Raises:
            PromptError: A turn's text is not in it, or would be read as control tokens.
        """
        self._check_texts(question)
        rendered = _render(self.tokenizer, question)
        roles = tuple(turn.role for turn in question_turns(question))
        _check_standing(*_probes(self.tokenizer, str(self.tokenizer.chat_template), roles), self.protocol.close_tag)
        _check_standing(question, rendered, self.protocol.close_tag)
        header = _OPENING.sub("", rendered)
        return header + (self.protocol.thinking_opening if mode == "thinking" else self.protocol.empty_trace)

    def prompt_ids(self, question: Question, mode: Mode) -> tuple[int, ...]:
        """Token ids of :meth:`prompt_text`; the rendered text brings its own BOS, so none is added."""
        return tuple(self.tokenizer.encode(self.prompt_text(question, mode), add_special_tokens=False))

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Tokens that structure a chat, by their text: special ones, think tags, and what the chat template writes.

        Role markers and think tags are often added to a tokenizer without being called special. An id of -1 is a text
        of several tokens.
        """
        tokenizer = self.tokenizer
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        source = str(tokenizer.chat_template)
        names = [*map(str, tokenizer.all_special_tokens), "<think>", self.protocol.close_tag]
        # not a word or white space, which some tokenizers add, too
        names += [name for name, special in added.items() if special or (name in source and not _is_word(name))]
        found = {}
        for name in dict.fromkeys(names):
            ids = tokenizer.encode(name, add_special_tokens=False)
            found[name] = ids[0] if len(ids) == 1 else -1
        return found

    def _check_texts(self, question: Question) -> None:
        """Refuses turns whose text would become control tokens: a think tag, a role marker, an end of sequence.

        A tokenizer turns such a text into the token itself wherever it stands, and no spelling of it is both the user's
        text and harmless, so it is not for us to choose one.
        """
        ids = set(self.control_tokens.values()) - {-1, self.tokenizer.unk_token_id}
        for turn in question_turns(question):
            text = turn.content
            if turn.role == "assistant":  # a past turn's own trace, which templates leave out
                text = text.replace("<think>", "", 1).replace(self.protocol.close_tag, "", 1)
            inside = next((name for name in self.control_tokens if name in text), None)
            if inside is None:
                tokens = ids.intersection(self.tokenizer.encode(text, add_special_tokens=False))
                inside = str(self.tokenizer.convert_ids_to_tokens(min(tokens))) if tokens else None
            if inside is not None:
                raise PromptError(
                    "control-tokens",
                    f"the {turn.role}'s text holds {inside}, which the model would read as a control token and not as "
                    "text; write it in another way, or leave the prompt out.",
                )

    def empty_trace_ids(self, question: Question) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Splits the D_e prompt into the D_t prompt and the tokens that close the empty trace.

        In training form both D_t and D_e share the prompt, and a D_e response is ``closing + answer`` (the paper
        prepends ``</think>`` to it), a point of the same distribution pi(r, y | x) with r empty.

        Returns:
            (prompt ids, closing ids). Where the D_e prompt does not continue the D_t prompt token by token, the split
            is (D_e prompt, ()).
        """
        thinking, empty = self.prompt_ids(question, "thinking"), self.prompt_ids(question, "nothinking")
        if empty[: len(thinking)] == thinking:
            return thinking, empty[len(thinking) :]
        return empty, ()

    def trace_length(self, completion_ids: Sequence[int]) -> int | None:
        """Number of tokens of a D_t completion up to and including the first closing tag; None if it never closes."""
        tag = self.tokenizer.encode(self.protocol.close_tag, add_special_tokens=False)
        ids = list(completion_ids)
        if len(tag) == 1:
            return ids.index(tag[0]) + 1 if tag[0] in ids else None
        if self.protocol.close_tag not in self._decode(ids):
            return None
        low, high = 1, len(ids)  # the tag spans several tokens: bisect for the shortest prefix whose text holds it
        while low < high:
            middle = (low + high) // 2
            if self.protocol.close_tag in self._decode(ids[:middle]):
                high = middle
            else:
                low = middle + 1
        return low

    def split(self, completion_ids: Sequence[int], mode: Mode) -> tuple[int | None, str | None, str | None]:
        """Splits a completion into trace and final answer.

        Returns:
            (answer_start, trace text, answer text) as in :class:`~bvpo_stats.records.Completion`. A trace that
            never closes has no answer: (None, its text, None).
        """
        if mode == "nothinking":
            return 0, None, self.answer_text(completion_ids)
        start = self.trace_length(completion_ids)
        trace = self._decode(list(completion_ids[:start]), skip_special_tokens=True)
        trace = trace.partition(self.protocol.close_tag)[0].lstrip().removeprefix("<think>").strip()
        if start is None:
            return None, trace, None
        return start, trace, self.answer_text(completion_ids[start:])

    def answer_text(self, answer_ids: Sequence[int]) -> str:
        """The final answer as a person sees it: special tokens dropped, white space stripped."""
        return self._decode(list(answer_ids), skip_special_tokens=True).strip()

    def completion_text(self, completion_ids: Sequence[int]) -> str:
        """The whole completion, think tags kept, special tokens dropped."""
        return self._decode(list(completion_ids), skip_special_tokens=True)

    def _decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )


def find_template(
    tokenizer: PreTrainedTokenizerBase, *, name: str | None = None, empty_trace: str | None = None
) -> Template:
    r"""Chooses the protocol by what the tokenizer's own template renders.

    Args:
        tokenizer: The model's tokenizer.
        name: Overrides the choice: one of :data:`PROTOCOLS`.
        empty_trace: Overrides how an empty trace is spelled, e.g. ``<think>\n\n</think>``.

    Raises:
        UserError: No chat template, an unknown name, an unrecognised rendering, or a tokenizer without think tags and
            no ``empty_trace`` to go by.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("The tokenizer has no chat template. Use the model's own chat (not base) tokenizer.")
    if name is not None:
        if name not in PROTOCOLS:
            raise UserError(f"`template={name!r}`: unknown. Choose one of {', '.join(PROTOCOLS)}.")
        protocol = PROTOCOLS[name]
    else:
        protocol = _recognise(tokenizer, empty_trace)
    if empty_trace is not None:
        protocol = replace(protocol, empty_trace=empty_trace)
    elif not _has_think_tags(tokenizer):
        raise UserError(
            "The tokenizer has no <think> and </think> tokens, so it is unclear how this model spells an empty trace. "
            "Give it with `empty_trace`, e.g. `empty_trace='<think></think>'`."
        )
    return Template(protocol, tokenizer)


def _recognise(tokenizer: PreTrainedTokenizerBase, empty_trace: str | None) -> Protocol:
    rendered = _render(tokenizer, _PROBE)
    if "<\uff5cAssistant\uff5c>" in rendered:
        if rendered.endswith("<think>"):
            return PROTOCOLS["embedded"]
        return PROTOCOLS["r1-distill" if rendered.rstrip().endswith("<think>") else "r1-0528"]
    if "<|im_start|>assistant" in rendered:
        off = _render(tokenizer, _PROBE, enable_thinking=False)
        if off == rendered + PROTOCOLS["qwen3"].empty_trace:
            return PROTOCOLS["qwen3"]
    if empty_trace is not None:
        opening = _OPENING.search(rendered)
        return Protocol("custom", opening.group(0) if opening else "", empty_trace)
    if not _has_think_tags(tokenizer):
        raise UserError(
            "The tokenizer has no <think> and </think> tokens and its chat template is none of "
            f"{', '.join(PROTOCOLS)}. Say how an empty trace is spelled, e.g. "
            "`empty_trace='<think></think>'`."
        )
    raise UserError(
        f"The chat template is none of {', '.join(PROTOCOLS)}. Choose one with `template`, or give `empty_trace`."
    )


def _render(tokenizer: PreTrainedTokenizerBase, question: Question, **options: Any) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in question_turns(question)]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # a template is a program of the model's author; whatever it raises is about the model
        reason = " ".join(str(error).split())
        if isinstance(question, str):
            raise UserError(f"The tokenizer's chat template fails on a user message: {reason}") from error
        roles = ", ".join(message["role"] for message in messages)
        raise PromptError(
            "not-rendered", f"the tokenizer's chat template fails on these turns ({roles}): {reason}"
        ) from error
    return str(rendered)


def _check_standing(question: Question, rendered: str, close_tag: str) -> None:
    """Refuses a rendering without the text of every turn, in their order; white space around a text may go."""
    place = 0
    for turn in question_turns(question):
        # templates leave the trace of a past assistant turn out
        text = (turn.content.rpartition(close_tag)[2] if turn.role == "assistant" else turn.content).strip()
        found = rendered.find(text, place)
        if found < 0:
            raise PromptError(
                "not-rendered",
                f"the chat template leaves out the {turn.role}'s text or changes it ({text[:_SHOWN]!r}); this model "
                "cannot be asked that.",
            )
        place = found + len(text)


@functools.lru_cache(maxsize=64)
def _probes(tokenizer: PreTrainedTokenizerBase, source: str, roles: tuple[Role, ...]) -> tuple[Question, str]:
    """Turns of these roles and their rendering by the template ``source``: a short text may stand there by chance."""
    turns = tuple(Message(role, f"{_PROBE}-{number}-{role}") for number, role in enumerate(roles))
    return turns, _render(tokenizer, turns)


def _is_word(token: str) -> bool:
    return not token.strip() or token.strip().isalnum()


def _has_think_tags(tokenizer: PreTrainedTokenizerBase) -> bool:
    unknown = tokenizer.unk_token_id
    for tag in ("<think>", "</think>"):
        ids = tokenizer.encode(tag, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == unknown:
            return False
    return True
