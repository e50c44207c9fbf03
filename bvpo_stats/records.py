"""The plain records that flow through the package: one line of JSONL each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from bvpo_stats.errors import UserError

Mode = Literal["thinking", "nothinking"]
FinishReason = Literal["stop", "length"]
TraceSource = Literal["anchor", "same-answer", "mh", "prior"]

MODES: tuple[Mode, Mode] = ("thinking", "nothinking")


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
        seed: Seed of the run; the draw is a function of (seed, prompt_id, mode, sample_index).
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
    seed: int
    temperature: float
    top_p: float
    max_new_tokens: int
    model: str
    template: str
    engine: str
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
    chosen_answer_start: int
    rejected_answer_start: int
    chosen_answer: str
    rejected_answer: str
    chosen_reward: float
    rejected_reward: float
    chosen_index: int
    rejected_index: int
    temperature: float
    top_p: float
    model: str
    template: str
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
    side: Literal["chosen", "rejected"]
    source: TraceSource
    index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    answer_start: int
    trace_logp: float
    joint_logp: float
    temperature: float
    model: str
    template: str


RecordT = TypeVar("RecordT", Prompt, Completion, PreferencePair, TraceRecord)


def to_dict(record: Prompt | Completion | PreferencePair | TraceRecord) -> dict[str, Any]:
    """The record as a JSON-ready dictionary; fields that default to None are left out where they are None."""
    optional = {field.name for field in fields(record) if field.default is None}
    return {k: v for k, v in asdict(record).items() if v is not None or k not in optional}


def from_dict(kind: type[RecordT], row: dict[str, Any], where: str = "record") -> RecordT:
    """Builds a record from a JSON object; unknown fields are ignored.

    Args:
        kind: The record type.
        row: The JSON object.
        where: How to name the row in an error, e.g. ``samples.jsonl:12``.

    Raises:
        UserError: A required field is missing.
    """
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.name in row:
            value = row[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except TypeError as error:
        missing = str(error).partition(": ")[2] or str(error)
        raise UserError(f"{where}: not a {kind.__name__} record; missing {missing}.") from error
