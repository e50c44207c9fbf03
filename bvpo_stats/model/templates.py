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
from datetime import datetime
from typing import TYPE_CHECKING, Any

from bvpo_stats.errors import UserError
from bvpo_stats.records import Message, Mode, Question, Role, Vocabulary, chat_turns, question_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


CLOCK = datetime(2024, 7, 26)
"""What templates that write the date are told, always: a prompt must not change between sampling and pairing, or from
one run of a command to the next. It is the date that Llama's templates fall back on."""


@dataclass(frozen=True)
class Protocol:
    """How one family of reasoning models marks its traces.

    Attributes:
        name: Name for ``--template`` and the records.
        thinking_opening: Text after the rendered assistant marker in D_t prompts (empty: the model writes ``<think>``).
        empty_trace: Text after the rendered assistant marker in D_e prompts: the trace opened and closed at once.
        open_tag: Text that begins a trace.
        close_tag: Text that ends a trace.
    """

    name: str
    thinking_opening: str
    empty_trace: str
    open_tag: str = "<think>"
    close_tag: str = "</think>"


# Appendix C.3 of the paper fixes `<think>` and `<think></think>` for the R1 family; the official R1-Distill template
# adds a newline after `<think>`, which the model writes itself when it is left out, and which would keep the D_e prompt
# from being a continuation of the D_t prompt. Qwen3's own template fixes its empty trace; its D_t prompt ends at the
# marker, or behind `<think>` in the models that always think (and in Qwen3.5). DeepSeek-V3.1 thinks on request only;
# where it does not, its template closes a trace that was never opened, which is no point of pi(r, y | x).
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("r1-distill", "<think>", "<think></think>"),
        Protocol("r1-0528", "<think>", "<think></think>"),
        Protocol("deepseek-v3.1", "<think>", "<think></think>"),
        Protocol("qwen3", "", "<think>\n\n</think>\n\n"),
        Protocol("qwen3-thinking", "<think>", "<think>\n\n</think>\n\n"),
        Protocol("embedded", "<think>", "<think></think>"),
    )
}


@dataclass(frozen=True)
class Template:
    """A protocol bound to a tokenizer.

    Attributes:
        protocol: The protocol.
        tokenizer: The model's fast tokenizer.
        switch: What the chat template must be told for the model to think, e.g. ``(("thinking", True),)``.
        words: Number of the model's token ids; None for the tokenizer's.
        eos_ids: Tokens that end a response; empty for the tokenizer's.
    """

    protocol: Protocol
    tokenizer: PreTrainedTokenizerBase
    switch: tuple[tuple[str, Any], ...] = ()
    words: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Identity for the records.

        The protocol's name, the empty trace where it is not the protocol's own, and the date that a template was told.
        """
        default, name = PROTOCOLS.get(self.protocol.name), self.protocol.name
        if default is None or default.empty_trace != self.protocol.empty_trace:
            name += f"[{self.protocol.empty_trace!r}]"
        return f"{name} on {CLOCK:%Y-%m-%d}" if _tells_time(self.tokenizer) else name

    def prompt_text(self, question: Question, mode: Mode) -> str:
        """The generation prompt: D_t form (``thinking``) or D_e form (``nothinking``), Appendix C.3 of the paper.

        Raises:
            PromptError: A turn's text is not in it, or would be read as control tokens.
        """
        self._check_texts(question)
        rendered = _render(self.tokenizer, question, **dict(self.switch))
        roles = tuple(turn.role for turn in question_turns(question))
        _check_standing(*_probes(self.tokenizer, str(self.tokenizer.chat_template), roles), self.protocol.close_tag)
        _check_standing(question, rendered, self.protocol.close_tag)
        header = _header(rendered, self.protocol)
        return header + (self.protocol.thinking_opening if mode == "thinking" else self.protocol.empty_trace)

    def prompt_ids(self, question: Question, mode: Mode) -> tuple[int, ...]:
        """Token ids of :meth:`prompt_text`; the rendered text brings its own BOS, so none is added."""
        return self.encode(self.prompt_text(question, mode))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text as it is: a rendered prompt brings its own BOS."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """What token ids of this model can be."""
        tokenizer = self.tokenizer
        ends = self.eos_ids or (() if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),))
        others = (*ends, tokenizer.bos_token_id, tokenizer.unk_token_id)
        pad = None if tokenizer.pad_token_id in others else tokenizer.pad_token_id
        return Vocabulary(self.words or len(tokenizer), ends, pad)

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Tokens that structure a chat, by their text: special ones, think tags, and what the chat template writes.

        Role markers and think tags are often added to a tokenizer without being called special. An id of -1 is a text
        of several tokens.
        """
        tokenizer = self.tokenizer
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        source = str(tokenizer.chat_template)
        names = [*map(str, tokenizer.all_special_tokens), self.protocol.open_tag, self.protocol.close_tag]
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
                text = text.replace(self.protocol.open_tag, "", 1).replace(self.protocol.close_tag, "", 1)
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

    def joined(self, reasoning: str, answer: str | None) -> str:
        """A response with its trace apart, as the model wrote it behind the D_t prompt; no answer: never closed."""
        text = ("" if self.protocol.thinking_opening else self.protocol.open_tag) + reasoning
        return text if answer is None else f"{text}{self.protocol.close_tag}{answer}"

    def own_part(self, text: str, prompt: str, mode: Mode) -> str:
        """What of a turn's text belongs behind its prompt: people's texts hold the whole turn.

        The opening tag that a D_t prompt ends in already is the same tag, and so is the empty trace of D_e, or what
        closes it (Appendix C.3 prepends that).
        """
        if mode == "thinking":
            tag = self.protocol.open_tag
            if prompt.rstrip().endswith(tag) and text.lstrip().startswith(tag):
                text = text.lstrip().removeprefix(tag)
                text = text.removeprefix("\n") if prompt.endswith("\n") else text
            return text
        empty, opening = self.protocol.empty_trace, self.protocol.thinking_opening
        for spelled in (empty, empty.removeprefix(opening), self.protocol.close_tag):
            if spelled and text.startswith(spelled):
                return text[len(spelled) :]
        return text

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
        trace = trace.partition(self.protocol.close_tag)[0].lstrip().removeprefix(self.protocol.open_tag).strip()
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

    Where the template has a switch for thinking (``enable_thinking``, ``thinking``, ...), it is found by trying it and
    is on in the prompts of both sets: D_e is D_t with an empty trace, not another conversation.

    Args:
        tokenizer: The model's tokenizer.
        name: Overrides the choice: one of :data:`PROTOCOLS`.
        empty_trace: Overrides how an empty trace is spelled, e.g. ``<think>\n\n</think>``; ``\n`` may be spelled out.

    Raises:
        UserError: No chat template, an unknown name, an unrecognised rendering, one that closes the trace or that
            changes from call to call, or a tokenizer without think tags and no ``empty_trace`` to go by.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("The tokenizer has no chat template. Use the model's own chat (not base) tokenizer.")
    if name is not None and name not in PROTOCOLS:
        raise UserError(f"`template={name!r}`: unknown. Choose one of {', '.join(PROTOCOLS)}.")
    spelled = None if empty_trace is None else _tags_of(unescaped(empty_trace))
    rendering = _find_rendering(tokenizer, spelled or _THINK_TAGS)
    protocol = PROTOCOLS[name] if name is not None else _recognise(tokenizer, rendering, spelled)
    if spelled is not None:
        protocol = replace(
            protocol, empty_trace=spelled.empty_trace, open_tag=spelled.open_tag, close_tag=spelled.close_tag
        )
    elif not _has_think_tags(tokenizer) and rendering.empty_trace is None:
        raise UserError(
            "The tokenizer has no <think> and </think> tokens, so it is unclear how this model spells an empty trace. "
            "Give it with `empty_trace`, e.g. `empty_trace='<think></think>'`."
        )
    return Template(protocol, tokenizer, rendering.switch)


def unescaped(text: str) -> str:
    r"""A text as it was meant on a command line, where a newline is hard to write: ``\n`` and ``\t`` spelled out."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclass(frozen=True)
class _Rendering:
    """What a template renders for one question, with thinking on.

    Attributes:
        text: The generation prompt.
        switch: The argument that turns thinking on; empty where it is on by default.
        empty_trace: How the template itself spells an empty trace when thinking is off; None where it does not.
    """

    text: str
    switch: tuple[tuple[str, Any], ...]
    empty_trace: str | None


# Names that templates give their switch, by the words in it, and values of on and off. A rendering that does not change
# tells that a name is not the template's, or not a switch.
_SWITCH = re.compile(r"\b\w*(?:think|reason)\w*\b", re.IGNORECASE)
_VALUES: tuple[tuple[Any, Any], ...] = (
    (True, False),
    ("on", "off"),
    ("enabled", "disabled"),
    ("high", "none"),
    (-1, 0),
)
_NO_FLAG = ("effort", "budget", "content")
_INVERTED = re.compile(r"(?:\A|_)(?:no|not|disable|skip|without|suppress)", re.IGNORECASE)


def _find_rendering(tokenizer: PreTrainedTokenizerBase, tags: Protocol) -> _Rendering:
    """The rendering with thinking on, found by trying the template's switches."""
    source = str(tokenizer.get_chat_template())
    probe: Question = _PROBE
    try:
        plain = _render(tokenizer, probe)
    except UserError as error:  # some templates insist on a system message, which the prompts may bring
        probe = (Message("system", "system"), Message("user", _PROBE))
        try:
            plain = _render(tokenizer, probe)
        except UserError:
            raise error from None
    if any(_render(tokenizer, probe) != plain for _ in range(3)):
        raise UserError(
            "The tokenizer's chat template renders the same message differently from call to call, so a prompt cannot "
            "be made again. Remove what is random from the template."
        )
    if "<|channel|>" in source:
        raise UserError(
            "The chat template puts traces into channels (<|channel|>analysis, as gpt-oss does) and not between tags; "
            "such models are not supported. Use one that marks its trace with tags, as DeepSeek-R1 and Qwen3 do."
        )
    closed = _is_closed(plain, tags)
    names = dict.fromkeys(_SWITCH.findall(source))
    for on_value, off_value in _VALUES:
        for switch in names:
            flag = isinstance(on_value, bool)
            if (flag and any(word in switch for word in _NO_FLAG)) or not (flag or closed):
                continue  # text values are tried only where thinking is off: elsewhere a template may print any of them
            value, other = (off_value, on_value) if _INVERTED.search(switch) else (on_value, off_value)
            on, off = (_try_render(tokenizer, probe, {switch: each}) for each in (value, other))
            if on is None or off is None or on == off or _is_closed(on, tags):
                continue
            needed = () if on == plain else ((switch, value),)
            return _Rendering(on, needed, _empty_trace_in(off, tags))
    if closed:
        raise UserError(
            "The chat template closes the trace before the model can think, and no switch of it was found that opens "
            "it. Change the template in the model's folder so that it ends in an open trace."
        )
    return _Rendering(plain, (), None)


def _try_render(tokenizer: PreTrainedTokenizerBase, probe: Question, options: dict[str, Any]) -> str | None:
    try:
        return _render(tokenizer, probe, **options)
    except UserError:
        return None


def _recognise(tokenizer: PreTrainedTokenizerBase, rendering: _Rendering, spelled: Protocol | None) -> Protocol:
    text = rendering.text
    if "<\uff5cAssistant\uff5c>" in text:
        if rendering.switch:
            return PROTOCOLS["deepseek-v3.1"]
        if text.endswith("<think>"):
            return PROTOCOLS["embedded"]
        return PROTOCOLS["r1-distill" if text.rstrip().endswith("<think>") else "r1-0528"]
    if "<|im_start|>assistant" in text and not rendering.switch:
        qwen3, always = PROTOCOLS["qwen3"], PROTOCOLS["qwen3-thinking"]
        if text.rstrip().endswith("<think>"):
            if rendering.empty_trace in (always.empty_trace, None) and _has_think_tags(tokenizer):
                return always
        elif rendering.empty_trace == qwen3.empty_trace:
            return qwen3
    custom = spelled
    if custom is None and rendering.empty_trace is not None:
        custom = Protocol("custom", "", rendering.empty_trace)
    if custom is not None:
        opening = text[len(_header(text, custom)) :]
        # White space behind a tag that is one token is left to the model, as in R1-Distill; where the tag is several
        # tokens, its last may hold the newline.
        return replace(custom, thinking_opening=opening.rstrip() if _has_think_tags(tokenizer) else opening)
    if not _has_think_tags(tokenizer):
        raise UserError(
            "The tokenizer has no <think> and </think> tokens and its chat template is none of "
            f"{', '.join(PROTOCOLS)}. Say how an empty trace is spelled, e.g. "
            "`empty_trace='<think></think>'`."
        )
    raise UserError(
        f"The chat template is none of {', '.join(PROTOCOLS)}. Choose one with `template`, or give `empty_trace`."
    )


# A macro of the name of transformers' function, which the template then calls instead: strftime of CLOCK, directive by
# directive. `{{ '' }}` keeps a newline at the template's start from being taken for the end of a block.
_STOPPED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format|replace('%%', '\x00')"
    + "".join(
        f"|replace({directive!r}, {CLOCK.strftime(directive)!r})"
        for letter in "aAbBcdefFDGHIjklmMpsStTRuUVwWxXyYzZ"
        for directive in (f"%{letter}", f"%-{letter}")
    )
    + "|replace('\x00', '%') }}{% endmacro %}{{ '' }}"
)

_THINK_TAGS = Protocol("custom", "", "<think></think>")
_TAG = r"(?:<[^<>\s]+>|\[[^\[\]\s]+\])"
_EMPTY = re.compile(rf"\s*(?P<opening>{_TAG})?\s*(?P<closing>{_TAG})\s*")


def _tags_of(empty_trace: str) -> Protocol:
    """The tags by which a spelled empty trace opens and closes a trace.

    Raises:
        UserError: It closes none.
    """
    found = _EMPTY.fullmatch(empty_trace)
    if found is None or not re.search("/|end", found["closing"], re.IGNORECASE):
        raise UserError(
            f"`empty_trace={empty_trace!r}`: must open a trace and close it, e.g. `empty_trace='<think></think>'`."
        )
    opening = found["opening"] or found["closing"].replace("/", "", 1)
    return Protocol("custom", "", empty_trace, opening, found["closing"])


def _header(rendered: str, tags: Protocol) -> str:
    """A generation prompt up to and including the assistant marker: without a trace that it opens (and closes)."""
    opening, close = re.escape(tags.open_tag), re.escape(tags.close_tag)
    return re.sub(rf"{opening}\s*({close}\s*)?\Z", "", rendered)


def _is_closed(rendered: str, tags: Protocol) -> bool:
    return rendered.rstrip().endswith(tags.close_tag)


def _empty_trace_in(rendered: str, tags: Protocol) -> str | None:
    """The empty trace at the end of a prompt, as the template spells it."""
    return rendered[len(_header(rendered, tags)) :] or None if _is_closed(rendered, tags) else None


def _render(tokenizer: PreTrainedTokenizerBase, question: Question, **options: Any) -> str:
    messages = chat_turns(question)
    source = str(tokenizer.get_chat_template())
    if _tells_time(tokenizer):
        source = _STOPPED_CLOCK + source
    try:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=True, **options
        )
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


def _tells_time(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def _has_think_tags(tokenizer: PreTrainedTokenizerBase) -> bool:
    unknown = tokenizer.unk_token_id
    for tag in ("<think>", "</think>"):
        ids = tokenizer.encode(tag, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == unknown:
            return False
    return True
