"""The plain records that flow through the package: one line of JSONL each."""

from __future__ import annotations

import hashlib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bvpo_stats.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Mode = Literal["thinking", "nothinking"]
FinishReason = Literal["stop", "length"]
Side = Literal["chosen", "rejected"]
Role = Literal["system", "user", "assistant"]
TraceSource = Literal["anchor", "same-answer", "mh", "prior"]

MODES: tuple[Mode, Mode] = ("thinking", "nothinking")
SIDES: tuple[Side, Side] = ("chosen", "rejected")
UNKNOWN = "unknown"
"""How reports call a model or template that no record names."""

_FINGERPRINT = re.compile(r"[^@+]*@([0-9a-f]{12})(?=\+|\Z)")


def content_of(identity: Any) -> Any:
    """What two identities are compared by: of a model, ``name@fingerprint``, the fingerprint where it has one.

    A folder that was renamed or moved holds the same model.

    Args:
        identity: A model's identity, or anything that may hold some: a dictionary or a list. All else stays as it is.

    >>> content_of("r1@0123456789ab+tuned@ba9876543210")
    '0123456789ab+ba9876543210'
    """
    if isinstance(identity, str):
        return _FINGERPRINT.sub(r"\1", identity)
    if isinstance(identity, dict):
        return {key: content_of(value) for key, value in identity.items()}
    return [content_of(value) for value in identity] if isinstance(identity, list) else identity


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: The text.
    """

    role: Role
    content: str


Question = str | tuple[Message, ...]
"""What a template renders: the text of one user turn, or all turns in front of the answer, system prompt included."""


@dataclass(frozen=True)
class Prompt:
    """One question: the cluster of every statistic.

    Attributes:
        prompt_id: Unique name of the prompt; joins samples, pairs and traces.
        prompt: The user's text, before any template; of several turns the last one's.
        gold: Reference answer, where the data has one.
        messages: All turns in front of the answer, the last of them ``prompt``; None where that is all there is.
    """

    prompt_id: str
    prompt: str
    gold: str | None = None
    messages: tuple[Message, ...] | None = None

    @property
    def question(self) -> Question:
        """What a template renders."""
        return self.messages or self.prompt


@dataclass(frozen=True)
class Completion:
    """One sampled response, exactly as the sampler saw it.

    ``prompt_ids + completion_ids`` is the token sequence the policy generated from; nothing is ever re-rendered through
    a chat template, which would strip the trace.

    Attributes:
        prompt_id: The prompt it answers.
        sample_index: 0 .. n-1 within (prompt, mode).
        mode: ``thinking`` (D_t form) or ``nothinking`` (D_e form, reasoning switched off).
        prompt: The user's text; of several turns the last one's.
        prompt_ids: Token ids of the generation prompt, template included.
        completion_ids: Token ids the sampler wrote, end-of-sequence included where it stopped by itself.
        text: The completion decoded, special tokens of the template left out.
        finish_reason: ``stop`` (wrote end-of-sequence) or ``length`` (cut).
        answer_start: Index in ``completion_ids`` of the first answer token, i.e. the number of trace tokens with the
            closing tag counted as trace. 0 in ``nothinking`` mode; None when the trace was never closed.
        trace: Text of the trace, None in ``nothinking`` mode.
        answer: Text of the final answer, None when there is none (unclosed trace).
        seed: Seed of the run; the draw is a function of (seed, prompt_id, mode, sample_index). This and what follows
            is None where it is not known; unknown is never taken for a default.
        temperature: Sampling temperature.
        top_p: Nucleus mass (1 = off).
        top_k: Tokens that a draw was limited to (0 = off).
        max_new_tokens: Cut-off.
        model: Identity of the model that wrote it.
        template: Name of the template protocol.
        engine: ``transformers``, ``vllm``, ``openai`` or ``file``.
        gold: Reference answer carried over from the prompt.
        logprobs: Per-token log pi(token | before) at temperature 1, where already known.
        messages: As in :class:`Prompt`.
        sampler_logp: log q(completion_ids), nats: the log-probability under what drew them, with its temperature and
            nucleus; None where the sampler does not say.
    """

    prompt_id: str
    sample_index: int
    mode: Mode
    prompt: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    answer_start: int | None
    trace: str | None
    answer: str | None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    model: str | None = None
    template: str | None = None
    engine: str | None = None
    gold: str | None = None
    logprobs: tuple[float, ...] | None = None
    messages: tuple[Message, ...] | None = None
    sampler_logp: float | None = None

    @property
    def question(self) -> Question:
        """What a template renders."""
        return self.messages or self.prompt

    @property
    def key(self) -> str:
        """Unique name of the draw."""
        return draw_key(self.prompt_id, self.mode, self.sample_index)

    @property
    def complete(self) -> bool:
        """Whether the response finished by itself and has a final answer."""
        return self.finish_reason == "stop" and self.answer_start is not None


def draw_key(prompt_id: str, mode: str, sample_index: int) -> str:
    """Unique name of a draw: ``prompt_id/mode/sample_index``."""
    return f"{prompt_id}/{mode}/{sample_index}"


MOST_LOST = 0.02
"""Share of lost responses beyond which pairs select by trace: at 5% cut, norm(b_t) / norm(mu) is .022 on the oracle."""


@dataclass(frozen=True)
class Truncation:
    """How many of the responses sampled in one mode have no answer; pairs are a selection from the others.

    Attributes:
        responses: All of them.
        cut: Cut at the token limit, in the trace or in the answer.
        unclosed: Ended by themselves without closing their trace.
    """

    responses: int = 0
    cut: int = 0
    unclosed: int = 0

    @classmethod
    def by_mode(cls, completions: Iterable[Completion]) -> dict[Mode, Truncation]:
        """Counts completions."""
        found = {mode: cls() for mode in MODES}
        for completion in completions:
            found[completion.mode] = found[completion.mode].count(completion.finish_reason, completion.answer_start)
        return found

    def count(self, finish_reason: Any, answer_start: Any) -> Truncation:
        """With one more response."""
        cut = finish_reason != "stop"
        return Truncation(self.responses + 1, self.cut + cut, self.unclosed + (not cut and answer_start is None))

    @property
    def cut_share(self) -> float:
        """Share of the responses that were cut."""
        return self.cut / max(1, self.responses)

    @property
    def unclosed_share(self) -> float:
        """Share of the responses that never closed their trace."""
        return self.unclosed / max(1, self.responses)

    def cautions(self, mode: Mode, *, drawn_here: bool = False) -> list[str]:
        """What a reader of a report should worry about, by cause.

        Args:
            mode: How they were sampled.
            drawn_here: By the run that is reported, whose limit on new tokens may be raised.
        """
        found = []
        if self.cut_share > MOST_LOST:
            found.append(
                f"{self.cut_share:.1%} of the {mode} responses were cut at the token limit; what is left is a "
                "selection of short ones"
                + (", and of pairs made of it mu = E g_t does not hold" if mode == "thinking" else "")
                + f". {more_tokens(drawn_here)}"
            )
        if self.unclosed_share > MOST_LOST:
            found.append(
                f"{self.unclosed_share:.1%} of the {mode} responses ended by themselves without closing their trace. "
                "More tokens do not help: check `template`, and that the model was trained to close it."
            )
        return found


def more_tokens(drawn_here: bool) -> str:
    """What to do about responses that were cut, whether the run itself drew them or they came from elsewhere."""
    return "Raise `max_new_tokens`." if drawn_here else "Sample again with a larger limit on new tokens."


@dataclass(frozen=True)
class PreferencePair:
    """A chosen and a rejected response to one prompt, with exact ids (TRL's column names where it has them).

    In ``nothinking`` mode ``prompt_ids`` is the D_e prompt of the training form: the same prompt as in D_t, while the
    tokens that close the empty trace open both completions and count as trace (``*_answer_start`` is their number).

    Where a pair comes from is optional: None means that it is not known, and is never taken for a default. An unknown
    temperature, nucleus, model or answer boundary rules out that the pair's traces count as draws of pi_ref.

    Attributes:
        prompt_id: The prompt.
        mode: ``thinking`` (D_t) or ``nothinking`` (D_e).
        prompt: Rendered prompt text.
        chosen: Chosen completion, text.
        rejected: Rejected completion, text.
        prompt_ids: Token ids of the prompt.
        chosen_ids: Token ids of the chosen completion, end-of-sequence included.
        rejected_ids: Token ids of the rejected completion.
        chosen_answer_start: Number of trace tokens at the head of ``chosen_ids``.
        rejected_answer_start: Number of trace tokens at the head of ``rejected_ids``.
        chosen_answer: Final answer, text.
        rejected_answer: Final answer, text.
        chosen_reward: Reward of the chosen answer.
        rejected_reward: Reward of the rejected answer.
        chosen_index: ``sample_index`` of the chosen response.
        rejected_index: ``sample_index`` of the rejected response.
        temperature: Temperature the responses were sampled at.
        top_p: Nucleus mass they were sampled with.
        top_k: Tokens that a draw was limited to (0 = off).
        cut_share: Share of all responses sampled in this mode, pairs or not, that were cut at the token limit.
        unclosed_share: Share of them that ended by themselves without closing their trace.
        model: Identity of the sampling model.
        template: Name of the template protocol.
        ref_chosen_logps: Reference log pi(chosen_ids | prompt_ids), summed over tokens, where stored.
        ref_rejected_logps: The same for ``rejected_ids``.
        sampler_chosen_logps: log q(chosen_ids | prompt_ids) of what drew them, as in :class:`Completion`; D_t only.
        sampler_rejected_logps: The same for ``rejected_ids``.
    """

    prompt_id: str
    mode: Mode
    prompt: str
    chosen: str
    rejected: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_answer_start: int | None = None
    rejected_answer_start: int | None = None
    chosen_answer: str | None = None
    rejected_answer: str | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    chosen_index: int | None = None
    rejected_index: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    cut_share: float | None = None
    unclosed_share: float | None = None
    model: str | None = None
    template: str | None = None
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    sampler_chosen_logps: float | None = None
    sampler_rejected_logps: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of both sequences, the prompt in each."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class TraceRecord:
    """One trace for one side of a pair: material for the K-trace marginal gradient of the answer y.

    Attributes:
        prompt_id: The prompt.
        side: Which answer of the pair y is.
        source: ``anchor`` (the pair's own trace), ``same-answer`` (another sample that ended in the same answer; an
            exact posterior draw), ``mh`` (Metropolis-Hastings from the anchor, stationary from the start) or ``prior``
            (a trace of the prompt regardless of its answer, i.e. a draw of pi(r | x)).
        index: Running number within (prompt_id, side, source).
        prompt_ids: Token ids of the prompt.
        completion_ids: Token ids of (r, y): the trace, its closing tag, then the pair's answer y with end-of-sequence.
        answer_start: Number of trace tokens at the head of ``completion_ids``.
        trace_logp: Log-probability of the trace tokens under the proposal that drew them (the sampling model at the
            sampling temperature): log q(r), in nats.
        joint_logp: log pi_ref(r, y | x) under the sampling model at temperature 1, in nats.
        temperature: Temperature of the proposal.
        model: Identity of the sampling model.
        template: Name of the template protocol.
    """

    prompt_id: str
    side: Side
    source: TraceSource
    index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    answer_start: int
    trace_logp: float
    joint_logp: float
    temperature: float | None = None
    model: str | None = None
    template: str | None = None


RecordT = TypeVar("RecordT", Prompt, Completion, PreferencePair, TraceRecord)
Record = Prompt | Completion | PreferencePair | TraceRecord


def default_prompt_id(question: Question) -> str:
    """The id of a prompt that has none: ``p`` + the first 16 hex digits of the SHA-256 of the user's text.

    Of several turns, the text is their JSON: a list of ``[role, content]``.
    """
    if not isinstance(question, str):
        question = json.dumps([[turn.role, turn.content] for turn in question], ensure_ascii=False)
    return "p" + hashlib.sha256(question.encode()).hexdigest()[:16]


def question_turns(question: Question) -> tuple[Message, ...]:
    """The turns of a question."""
    return (Message("user", question),) if isinstance(question, str) else question


def chat_turns(question: Question) -> list[dict[str, str]]:
    """The turns as chat templates and chat APIs take them."""
    return [{"role": turn.role, "content": turn.content} for turn in question_turns(question)]


def plain_question(turns: tuple[Message, ...]) -> Question:
    """The turns as a question: text where they are one user turn."""
    return turns[0].content if [turn.role for turn in turns] == ["user"] else turns


_ROLES: dict[Any, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def read_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Turns from messages as data sets and chat APIs write them.

    A message has a ``role`` and a ``content`` (ShareGPT: ``from`` and ``value``). Content that comes in parts is joined
    where all parts are text.

    Args:
        value: A list of messages.
        where: How to name it in an error.

    Raises:
        UserError: No list of messages, an unknown role, or content that is not text (null, a number, an image, a call
            of a tool); the message is named.
    """
    entries = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(entries, (list, tuple)) or not entries:
        raise UserError(f"{where}: must be a list of messages with `role` and `content`, not {_shown(value)}.")
    return tuple(_message(entry, f"{where}, message {number}") for number, entry in enumerate(entries, start=1))


def _message(entry: Any, where: str) -> Message:
    if isinstance(entry, Message):
        entry = asdict(entry)
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: must have `role` and `content`, not {_shown(entry)}.")
    name = entry.get("role", entry.get("from"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where}: the role must be system, user or assistant, not {_shown(name)}.")
    if entry.get("tool_calls"):
        raise UserError(f"{where}: calls of tools are not supported; give turns of text.")
    content = entry.get("content", entry.get("value"))
    if isinstance(content, (list, tuple)):
        content = "".join(_part(part, where) for part in content)
    return Message(role, read_text(content, where, "content"))


def _part(part: Any, where: str) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    shown = kind if isinstance(kind, str) and kind != "text" else _shown(part)
    raise UserError(f"{where}: a content part of type {shown}; only parts of text can be used.")


def read_text(value: Any, where: str, name: str) -> str:
    """A text that can be written down again.

    Raises:
        UserError: It is none, or has half a surrogate pair in it, which no encoding of text knows.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: field `{name}` must be a text, not {_shown(value)}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise half_character(where, name, error) from error
    return value


def half_character(where: str, name: str, error: UnicodeEncodeError) -> UserError:
    """The error of a field with a lone surrogate: half of a character, which JSON can spell and no file can hold."""
    field = name.encode("utf-8", errors="backslashreplace").decode()
    return UserError(
        f"{where}: field `{field}` has half a character in it ({error.object[error.start]!r}, a lone surrogate). Write "
        "the text again as UTF-8."
    )


_LARGEST = 2.0**1023  # beyond it, a whole number is no float any more
_SHOWN = 60  # characters of a wrong value


def _shown(value: Any) -> str:
    """A wrong value on one line, in short."""
    words = "null" if value is None else repr(value)
    return words if len(words) <= _SHOWN else words[:_SHOWN] + "..."


@dataclass(frozen=True)
class Field:
    """One field of a record, as its type hint gives it: all that readers and writers know about a format.

    Attributes:
        name: Its name.
        type: ``str``, ``int``, ``float``, or the element type of a list of numbers or :class:`Message`.
        many: Whether it is a list.
        choices: The only values allowed; empty for any.
        nullable: Whether None (unknown) is allowed.
        required: Whether a row must have it.
    """

    name: str
    type: type
    many: bool
    choices: tuple[Any, ...]
    nullable: bool
    required: bool

    def read(self, value: Any, where: str) -> Any:
        """A value of a row as the record holds it.

        Integers (ids, indices, numbers of tokens) are never negative, and numbers never NaN or infinite.

        Raises:
            UserError: The value is of another type or not allowed; place, field and value are named.
        """
        if value is None and self.nullable:
            return None
        if self.type is Message:
            return read_messages(value, f"{where}: field `{self.name}`")
        if self.many:
            values = value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors of formatted datasets
            if isinstance(values, (list, tuple)):
                plain = self.type is int and set(map(type, values)) <= {int}
                if plain and (not values or (min(values) >= 0 and max(values) < 2**63)):
                    return tuple(values)  # the usual case, fast: traces are long
                found = [self._number(entry) for entry in values]
                if None not in found:
                    return tuple(found)
        elif self.choices:
            if isinstance(value, str) and value in self.choices:
                return value
        elif self.type is str:
            if isinstance(value, str):
                return read_text(value, where, self.name)
        elif (number := self._number(value)) is not None:
            return number
        raise UserError(f"{where}: field `{self.name}` must be {self._words()}, not {_shown(value)}.")

    def _number(self, value: Any) -> int | float | None:
        """The number in a value, None where it is not one that is allowed."""
        if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            value = value.item()  # NumPy's and torch's numbers
        # JSON's whole numbers have any length: those beyond 64 bits are no index, and beyond 308 digits no number
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
            return None
        if self.type is float:
            return float(value)
        return value if isinstance(value, int) and 0 <= value < 2**63 else None

    def _words(self) -> str:
        if self.choices:
            kind = " or ".join(f"`{choice}`" for choice in self.choices)
        else:
            kind = {
                (str, False): "a text",
                (int, False): "an integer from 0",
                (float, False): "a finite number",
                (int, True): "a list of integers from 0 (token ids)",
                (float, True): "a list of finite numbers",
            }[self.type, self.many]
        return f"{kind} or null" if self.nullable else kind


_FIELDS: dict[Any, dict[str, Field]] = {}


def record_fields(kind: type[Record]) -> dict[str, Field]:
    """The fields of a record type by name, from the type hints of its dataclass."""
    if kind in _FIELDS:
        return _FIELDS[kind]
    hints = get_type_hints(kind)
    found: dict[str, Field] = {}
    for field in fields(kind):
        hint, nullable = hints[field.name], False
        if get_origin(hint) in (Union, types.UnionType):
            (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
            nullable = True
        choices: tuple[Any, ...] = ()
        many = False
        if get_origin(hint) is Literal:
            choices, hint = get_args(hint), str
        elif get_origin(hint) is tuple:
            hint, many = get_args(hint)[0], True
        required = field.default is MISSING and not nullable
        found[field.name] = Field(field.name, hint, many, choices, nullable, required)
    _FIELDS[kind] = found
    return found


def arrow_schema(kind: type[Record], columns: Iterable[str] | None = None) -> pa.Schema:
    """The Arrow (Parquet) columns of a record type.

    Args:
        kind: The record type.
        columns: Names of the columns, in order; all fields when None.
    """
    import pyarrow as pa

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    known = record_fields(kind)
    entries = plain | {int: pa.int32(), Message: pa.struct([(entry.name, pa.string()) for entry in fields(Message)])}
    types = {name: pa.list_(entries[field.type]) if field.many else plain[field.type] for name, field in known.items()}
    return pa.schema([(name, types[name]) for name in (known if columns is None else columns)])


def to_dict(record: Record) -> dict[str, Any]:
    """The record as a JSON-ready dictionary; fields that default to None are left out where they are None."""
    optional = {field.name for field in fields(record) if field.default is None}
    return {k: v for k, v in asdict(record).items() if v is not None or k not in optional}


def missing_fields(kind: type[Record], row: dict[str, Any]) -> list[str]:
    """Names of the fields that a row lacks."""
    return [field.name for field in record_fields(kind).values() if field.required and row.get(field.name) is None]


def from_dict(
    kind: type[RecordT], row: dict[str, Any], where: str = "record", vocabulary: Vocabulary | None = None
) -> RecordT:
    """Builds a record from a row: a JSON object, or a row of a table or dataset. Unknown fields are ignored.

    Args:
        kind: The record type.
        row: The row.
        where: How to name the row in an error, e.g. ``samples.jsonl:12``.
        vocabulary: Of the model that the token ids are for; see :meth:`Vocabulary.checked`.

    Raises:
        UserError: A required field is missing, a value is of the wrong type (:meth:`Field.read`) or out of its range,
            an answer would begin behind the end of its completion, or ids are none of the model's.
    """
    missing = missing_fields(kind, row)
    if missing:
        raise UserError(f"{where}: not a {kind.__name__} record; missing {', '.join(missing)}.")
    if row.get("top_k") == -1:  # vLLM's word for off
        row = row | {"top_k": 0}
    record: Any = kind(
        **{name: field.read(row[name], where) for name, field in record_fields(kind).items() if name in row},
    )
    for name in row.keys() & _ANSWER_STARTS.keys():
        start, ids = getattr(record, name, None), getattr(record, _ANSWER_STARTS[name], None)
        if start is not None and ids is not None and start > len(ids):
            raise UserError(f"{where}: `{name}` is {start}, but `{_ANSWER_STARTS[name]}` has {len(ids)} tokens.")
    for name, (low, high, words) in _RANGES.items():
        value = getattr(record, name, None)
        if value is not None and not low <= value <= high:
            raise UserError(f"{where}: field `{name}` must {words}, not {value:g}.")
    logprobs = getattr(record, "logprobs", None)
    if logprobs is not None and (len(logprobs) != len(record.completion_ids) or max(logprobs, default=0.0) > 0):
        raise UserError(
            f"{where}: field `logprobs` must hold a number up to 0 for each of the {len(record.completion_ids)} "
            "`completion_ids`."
        )
    return record if vocabulary is None else vocabulary.checked(record, where)


_RANGES = {
    "temperature": (0.0, math.inf, "not be negative"),
    "top_p": (0.0, 1.0, "lie between 0 and 1"),
    "cut_share": (0.0, 1.0, "lie between 0 and 1"),
    "unclosed_share": (0.0, 1.0, "lie between 0 and 1"),
    **dict.fromkeys(
        ("sampler_logp", "sampler_chosen_logps", "sampler_rejected_logps"),
        (-math.inf, 0.0, "be a log-probability, at most 0"),
    ),
}
_ANSWER_STARTS = {
    "answer_start": "completion_ids",
    "chosen_answer_start": "chosen_ids",
    "rejected_answer_start": "rejected_ids",
}


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a model: what records are judged by, before any weights are loaded.

    Attributes:
        size: Ids are 0 to size - 1.
        eos_ids: Those that end a response.
        pad_id: The one that fills up batches; None where there is none that stands for nothing else, so that it is not
            certain which tokens are padding.
    """

    size: int
    eos_ids: tuple[int, ...]
    pad_id: int | None = None

    def check(self, ids: Sequence[int], where: str, name: str) -> None:
        """Refuses an id that the model does not have; place, field and id are named."""
        wrong = next((token for token in ids if not 0 <= token < self.size), None)
        if wrong is not None:
            raise UserError(
                f"{where}: field `{name}` holds the id {wrong}, but the model's are 0 to {self.size - 1}. Is it the "
                "model that these ids are for?"
            )

    def prompt(self, ids: tuple[int, ...], where: str, name: str = "prompt_ids") -> tuple[int, ...]:
        """The prompt without padding on its left.

        Raises:
            UserError: An id that the model does not have, or padding elsewhere.
        """
        self.check(ids, where, name)
        start = next((place for place, token in enumerate(ids) if token != self.pad_id), len(ids))
        if self.pad_id in ids[start:]:
            raise UserError(f"{where}: field `{name}` has padding (id {self.pad_id}) inside. Remove it.")
        return ids[start:]

    def response(self, ids: tuple[int, ...], where: str, name: str) -> tuple[int, ...]:
        """The response up to its end: padding and repeated ends of sequence behind it are cut off.

        Padding inside may have been sampled, as any token may.

        Raises:
            UserError: An id that the model does not have, padding in front, or tokens behind the end.
        """
        self.check(ids, where, name)
        if ids[:1] == (self.pad_id,):
            raise UserError(f"{where}: field `{name}` begins with padding (id {self.pad_id}). Remove it.")
        length = len(ids)
        while length and ids[length - 1] == self.pad_id:
            length -= 1
        while length > 1 and ids[length - 1] in self.eos_ids and ids[length - 2] in self.eos_ids:
            length -= 1
        inside = next((token for token in ids[: max(0, length - 1)] if token in self.eos_ids), None)
        if inside is not None:
            raise UserError(
                f"{where}: field `{name}` goes on behind an end of sequence (id {inside}). Where that is padding, cut "
                "it off."
            )
        return ids[:length]

    def checked(self, record: Any, where: str) -> Any:
        """A record with its ids checked; of a pair or trace, padding is cut off where it is certain.

        Raises:
            UserError: As in `prompt` and `response`; or a pair or trace that does not end in an end of sequence.
        """
        changes = {}
        for name in ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids"):
            ids = getattr(record, name, ())
            if not ids or isinstance(record, Completion):
                self.check(ids, where, name)  # what was sampled is what was sampled
            elif name == "prompt_ids":
                changes[name] = self.prompt(ids, where)
            else:
                changes[name] = self.response(ids, where, name)
                if self.eos_ids and changes[name][-1] not in self.eos_ids:
                    raise UserError(
                        f"{where}: field `{name}` does not end in an end of sequence (id "
                        f"{' or '.join(map(str, self.eos_ids))}). Was the response cut? It has no whole answer then."
                    )
        return replace(record, **changes) if any(getattr(record, n) != ids for n, ids in changes.items()) else record


_STOP_WORDS = (
    "stop",
    "eos",
    "eostoken",
    "eostokenid",
    "eosfound",
    "stoptoken",
    "endturn",
    "endofturn",
    "endofsequence",
)
_LENGTH_WORDS = ("length", "maxlength", "maxtokens", "maxnewtokens", "maxoutputtokens", "tokenlimit", "modellength")


def read_finish_reason(value: Any, eos_ids: Sequence[int] = ()) -> str:
    """Why a response ended, from whatever a sampler calls it.

    ``stop`` (the model wrote an end of sequence) and ``length`` (it was cut) in any spelling (``EOS_TOKEN``,
    ``FinishReason.MAX_TOKENS``) and shape (``{"type": "length", ...}``); every other word as it is, e.g. ``abort``, and
    ``unknown`` for null. Only the first means that a response is whole.

    Args:
        value: What the record says.
        eos_ids: Tokens that end a response: SGLang says which token or text it ``matched``.
    """
    if isinstance(value, Mapping):
        matched = value.get("matched", value.get("stop_reason"))
        inner = next((value[name] for name in ("type", "finish_reason", "reason", "name") if name in value), None)
        found = read_finish_reason(inner, eos_ids)
        return "stop-sequence" if found == "stop" and not is_end(matched, eos_ids) else found
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return read_finish_reason(value[0], eos_ids)
    if not isinstance(value, str) or not value.strip():
        return UNKNOWN
    word = value.strip().rpartition(".")[2].lower()
    bare = "".join(filter(str.isalnum, word)).removeprefix("finishreason")
    return "stop" if bare in _STOP_WORDS else "length" if bare in _LENGTH_WORDS else word[:_SHOWN]


def is_end(matched: Any, eos_ids: Sequence[int]) -> bool:
    """Whether what stopped a sampler was an end of sequence: servers then name none, or the token."""
    return matched is None or (type(matched) is int and (matched in eos_ids or not eos_ids))


def record_kind(row: dict[str, Any]) -> type[Record] | None:
    """The type of record that a row looks like, by the fields that only one type has; None for none."""
    for kind, names in (
        (TraceRecord, ("side", "source", "completion_ids")),
        (Completion, ("sample_index", "completion_ids")),
        (PreferencePair, ("chosen_ids", "rejected_ids")),
        (Prompt, ("prompt_id", "prompt")),
    ):
        if all(name in row for name in names):
            return kind
    return None
