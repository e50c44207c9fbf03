"""The plain records that flow through the package: one line of JSONL each."""

from __future__ import annotations

import hashlib
import math
import types
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bvpo_stats.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Mode = Literal["thinking", "nothinking"]
FinishReason = Literal["stop", "length"]
Side = Literal["chosen", "rejected"]
TraceSource = Literal["anchor", "same-answer", "mh", "prior"]

MODES: tuple[Mode, Mode] = ("thinking", "nothinking")
SIDES: tuple[Side, Side] = ("chosen", "rejected")
UNKNOWN = "unknown"
"""How reports call a model or template that no record names."""


@dataclass(frozen=True)
class Prompt:
    """One question: the cluster of every statistic.

    Attributes:
        prompt_id: Unique name of the prompt; joins samples, pairs and traces.
        prompt: The user's text, before any template.
        gold: Reference answer, where the data has one.
    """

    prompt_id: str
    prompt: str
    gold: str | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled response, exactly as the sampler saw it.

    ``prompt_ids + completion_ids`` is the token sequence the policy generated from; nothing is ever re-rendered through
    a chat template, which would strip the trace.

    Attributes:
        prompt_id: The prompt it answers.
        sample_index: 0 .. n-1 within (prompt, mode).
        mode: ``thinking`` (D_t form) or ``nothinking`` (D_e form, reasoning switched off).
        prompt: The user's text.
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
        max_new_tokens: Cut-off.
        model: Identity of the model that wrote it.
        template: Name of the template protocol.
        engine: ``transformers``, ``openai`` or ``file``.
        gold: Reference answer carried over from the prompt.
        logprobs: Per-token log pi(token | before) at temperature 1, where already known.
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
    max_new_tokens: int | None = None
    model: str | None = None
    template: str | None = None
    engine: str | None = None
    gold: str | None = None
    logprobs: tuple[float, ...] | None = None

    @property
    def key(self) -> str:
        """Unique name of the draw: ``prompt_id/mode/sample_index``."""
        return f"{self.prompt_id}/{self.mode}/{self.sample_index}"

    @property
    def complete(self) -> bool:
        """Whether the response finished by itself and has a final answer."""
        return self.finish_reason == "stop" and self.answer_start is not None


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
        model: Identity of the sampling model.
        template: Name of the template protocol.
        ref_chosen_logps: Reference log pi(chosen_ids | prompt_ids), summed over tokens, where stored.
        ref_rejected_logps: The same for ``rejected_ids``.
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
    model: str | None = None
    template: str | None = None
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None


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


def default_prompt_id(question: str) -> str:
    """The id of a prompt that has none: ``p`` + the first 16 hex digits of the SHA-256 of the user's text."""
    return "p" + hashlib.sha256(question.encode()).hexdigest()[:16]


_SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True)
class Field:
    """One field of a record, as its type hint gives it: all that readers and writers know about a format.

    Attributes:
        name: Its name.
        type: ``str``, ``int``, ``float``, or the element type of a list of numbers.
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
        if self.many:
            values = value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors of formatted datasets
            if isinstance(values, (list, tuple)):
                if self.type is int and (not values or (set(map(type, values)) == {int} and min(values) >= 0)):
                    return tuple(values)  # the usual case, fast: traces are long
                found = [self._number(entry) for entry in values]
                if None not in found:
                    return tuple(found)
        elif self.choices:
            if isinstance(value, str) and value in self.choices:
                return value
        elif self.type is str:
            if isinstance(value, str):
                return value
        elif (number := self._number(value)) is not None:
            return number
        shown = repr(value)
        raise UserError(
            f"{where}: field `{self.name}` must be {self._words()}, not "
            f"{shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}."
        )

    def _number(self, value: Any) -> int | float | None:
        """The number in a value, None where it is not one that is allowed."""
        if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            value = value.item()  # NumPy's and torch's numbers
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        if self.type is float:
            return float(value)
        return value if isinstance(value, int) and value >= 0 else None

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
    types = {
        name: plain[field.type] if not field.many else pa.list_(pa.int32() if field.type is int else plain[field.type])
        for name, field in known.items()
    }
    return pa.schema([(name, types[name]) for name in (known if columns is None else columns)])


def to_dict(record: Record) -> dict[str, Any]:
    """The record as a JSON-ready dictionary; fields that default to None are left out where they are None."""
    optional = {field.name for field in fields(record) if field.default is None}
    return {k: v for k, v in asdict(record).items() if v is not None or k not in optional}


def missing_fields(kind: type[Record], row: dict[str, Any]) -> list[str]:
    """Names of the fields that a row lacks."""
    return [field.name for field in record_fields(kind).values() if field.required and row.get(field.name) is None]


def from_dict(kind: type[RecordT], row: dict[str, Any], where: str = "record") -> RecordT:
    """Builds a record from a row: a JSON object, or a row of a table or dataset. Unknown fields are ignored.

    Args:
        kind: The record type.
        row: The row.
        where: How to name the row in an error, e.g. ``samples.jsonl:12``.

    Raises:
        UserError: A required field is missing, a value is of the wrong type (:meth:`Field.read`), or an answer would
            begin behind the end of its completion.
    """
    missing = missing_fields(kind, row)
    if missing:
        raise UserError(f"{where}: not a {kind.__name__} record; missing {', '.join(missing)}.")
    record: Any = kind(
        **{name: field.read(row[name], where) for name, field in record_fields(kind).items() if name in row},
    )
    for name in row.keys() & _ANSWER_STARTS.keys():
        start, ids = getattr(record, name, None), getattr(record, _ANSWER_STARTS[name], None)
        if start is not None and ids is not None and start > len(ids):
            raise UserError(f"{where}: `{name}` is {start}, but `{_ANSWER_STARTS[name]}` has {len(ids)} tokens.")
    return record  # type: ignore[no-any-return]


_ANSWER_STARTS = {
    "answer_start": "completion_ids",
    "chosen_answer_start": "chosen_ids",
    "rejected_answer_start": "rejected_ids",
}


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
