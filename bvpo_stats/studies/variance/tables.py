"""Appendix B's tables from scored completions: pure arithmetic, no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.records import MODES, Completion, Mode
from bvpo_stats.statistics.proportions import Interval, Statistic, jackknife_interval

Table = dict[str, Interval]
Pooling = Literal["tokens", "questions"]


@dataclass(frozen=True)
class Definitions:
    """The choices Appendix B leaves open.

    Attributes:
        nll: ``tokens`` pools log-probabilities over all tokens (reproduces the paper's identity NLL_think = share x
            NLL_trace + (1 - share) x NLL_answer); ``questions`` averages per-question NLLs.
        ddof: Variance divides by n - ddof; 1 is unbiased.
        level: Confidence level of every interval.
    """

    nll: Pooling = "tokens"
    ddof: int = 1
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.nll not in ("tokens", "questions"):
            raise UserError(f"`nll={self.nll!r}`: must be tokens or questions.")
        if self.ddof not in (0, 1):
            raise UserError(f"`ddof={self.ddof}`: must be 0 or 1.")
        if not 0 < self.level < 1:
            raise UserError(f"`level={self.level}`: must lie between 0 and 1, e.g. 0.95.")


@dataclass(frozen=True)
class ScoredSample:
    """One completion reduced to what the tables need.

    Attributes:
        prompt_id: Its question.
        mode: Thinking or NoThinking.
        logp: Joint log-probability of the completion at temperature 1, nats.
        length: Tokens.
        trace_logp: Log-probability of the trace tokens, closing tag included; 0 in NoThinking mode.
        trace_length: Trace tokens.
        complete: False for truncated completions and traces that never closed.
    """

    prompt_id: str
    mode: Mode
    logp: float
    length: int
    trace_logp: float
    trace_length: int
    complete: bool


@dataclass(frozen=True)
class VarianceTables:
    """Tables 3, 4 and 5 with intervals, and what they were computed from.

    Attributes:
        table3: Variance ratios, Thinking / NoThinking.
        table4: Mean-length ratio and per-token NLL by mode (nats per token).
        table5: Trace and answer segments within Thinking.
        modes: Per-mode averages over questions: variance and mean of joint log-probability (nats) and length (tokens).
        n_prompts: Questions used.
        n_samples: Completions used.
        truncated: Completions set aside because they were cut or their trace never closed.
        dropped_prompts: Questions left out because fewer than two complete responses remained in some mode.
    """

    table3: Table
    table4: Table
    table5: Table
    modes: dict[str, Table]
    n_prompts: int
    n_samples: int
    truncated: int
    dropped_prompts: int


def reduce_sample(completion: Completion, logprobs: Float[np.ndarray, " tokens"]) -> ScoredSample:
    """Sums per-token log-probabilities over the completion and over its trace, in float64.

    Raises:
        UserError: As many log-probabilities as tokens are needed, all finite.
    """
    values = np.asarray(logprobs, dtype=np.float64)
    if len(values) != len(completion.completion_ids):
        raise UserError(
            f"Sample {completion.key}: {len(values)} log-probs for {len(completion.completion_ids)} tokens. "
            "Drop the `logprobs` field to have them recomputed."
        )
    if not np.isfinite(values).all():
        raise UserError(
            f"Sample {completion.key}: a log-probability is NaN or infinite. Check the model's weights and `dtype`."
        )
    start = completion.answer_start or 0
    return ScoredSample(
        prompt_id=completion.prompt_id,
        mode=completion.mode,
        logp=float(values.sum()),
        length=len(values),
        trace_logp=float(values[:start].sum()),
        trace_length=start,
        complete=completion.complete,
    )


# Feature columns of a question: of each mode, of the two segments of Thinking, and the trace's share of the tokens.
_BY_MODE = ("var_logp", "var_len", "mean_logp", "mean_len", "nll_sum", "tokens", "nll_mean")
_BY_SEGMENT = ("nll_sum", "tokens", "nll_mean")
_COLUMNS = (
    *(f"{what}_{mode}" for mode in MODES for what in _BY_MODE),
    *(f"{what}_{part}" for part in ("trace", "answer") for what in _BY_SEGMENT),
    "share_mean",
)
_AT = {name: column for column, name in enumerate(_COLUMNS)}


def question_features(
    thinking: list[ScoredSample], nothinking: list[ScoredSample], ddof: int
) -> Float[np.ndarray, " features"]:
    """Feature vector of one question; every table entry is a function of the average of these over questions."""
    row = np.zeros(len(_COLUMNS))
    for mode, samples in zip(MODES, (thinking, nothinking), strict=True):
        logp = np.array([sample.logp for sample in samples])
        length = np.array([sample.length for sample in samples], dtype=np.float64)
        row[_AT[f"var_logp_{mode}"]] = logp.var(ddof=ddof)
        row[_AT[f"var_len_{mode}"]] = length.var(ddof=ddof)
        row[_AT[f"mean_logp_{mode}"]] = logp.mean()
        row[_AT[f"mean_len_{mode}"]] = length.mean()
        _segment(row, mode, -logp.sum(), length.sum())
    trace = sum(sample.trace_logp for sample in thinking)
    trace_tokens = sum(sample.trace_length for sample in thinking)
    tokens = sum(sample.length for sample in thinking)
    _segment(row, "trace", -trace, trace_tokens)
    _segment(row, "answer", -(sum(sample.logp for sample in thinking) - trace), tokens - trace_tokens)
    row[_AT["share_mean"]] = trace_tokens / tokens
    return row


def _segment(row: Float[np.ndarray, " features"], name: str, nll: float, tokens: float) -> None:
    row[_AT[f"nll_sum_{name}"]] = nll
    row[_AT[f"tokens_{name}"]] = tokens
    row[_AT[f"nll_mean_{name}"]] = nll / tokens if tokens else np.nan


def _column(name: str) -> Statistic:
    at = _AT[name]
    return lambda x: x[..., at]


def _quotient(above: Statistic, below: Statistic) -> Statistic:
    return lambda x: above(x) / below(x)


def _nll(part: str, pooling: Pooling) -> Statistic:
    if pooling == "questions":
        return _column(f"nll_mean_{part}")
    return _quotient(_column(f"nll_sum_{part}"), _column(f"tokens_{part}"))


def variance_tables(samples: Iterable[ScoredSample], definitions: Definitions | None = None) -> VarianceTables:
    """Tables 3, 4 and 5 of Appendix B.

    For each question the mean and variance (n - ddof) of joint log-probability and length are taken over its complete
    responses in each mode, then averaged over questions; ratios are Thinking / NoThinking of these averages. Intervals
    are by delete-one-question jackknife, paired over questions (log scale for positive quantities).

    Raises:
        UserError: No question has two complete responses in both modes.
    """
    definitions = definitions or Definitions()
    groups, truncated = _group(samples)
    usable = {key: group for key, group in groups.items() if all(len(group[mode]) >= 2 for mode in MODES)}
    if not usable:
        raise UserError(
            f"No question has at least 2 complete responses in both modes ({truncated} truncated or unclosed responses "
            "were set aside). Raise `max_new_tokens` or `samples`."
        )
    rows = np.stack([question_features(g["thinking"], g["nothinking"], definitions.ddof) for g in usable.values()])
    tables = _entries(rows, definitions)
    return replace(
        tables,
        n_samples=sum(len(group[mode]) for group in usable.values() for mode in MODES),
        truncated=truncated,
        dropped_prompts=len(groups) - len(usable),
    )


def _group(samples: Iterable[ScoredSample]) -> tuple[dict[str, dict[Mode, list[ScoredSample]]], int]:
    groups: dict[str, dict[Mode, list[ScoredSample]]] = {}
    truncated = 0
    for sample in samples:
        group = groups.setdefault(sample.prompt_id, {mode: [] for mode in MODES})
        if sample.complete:
            group[sample.mode].append(sample)
        else:
            truncated += 1
    # sorted, so that the order in which responses were drawn leaves no trace in the last digits
    return {key: groups[key] for key in sorted(groups)}, truncated


def _entries(rows: Float[np.ndarray, "questions features"], definitions: Definitions) -> VarianceTables:
    def interval(statistic: Statistic, *, positive: bool = True) -> Interval:
        return jackknife_interval(rows, statistic, level=definitions.level, positive=positive)

    def ratio(what: str) -> Interval:
        return interval(_quotient(_column(f"{what}_thinking"), _column(f"{what}_nothinking")))

    think, no = _nll("thinking", definitions.nll), _nll("nothinking", definitions.nll)
    trace, answer = _nll("trace", definitions.nll), _nll("answer", definitions.nll)
    if definitions.nll == "questions":
        share = _column("share_mean")
    else:
        share = _quotient(_column("tokens_trace"), _column("tokens_thinking"))
    return VarianceTables(
        table3={"logp_variance_ratio": ratio("var_logp"), "length_variance_ratio": ratio("var_len")},
        table4={
            "mean_length_ratio": ratio("mean_len"),
            "nll_think": interval(think),
            "nll_no": interval(no),
            "delta_nll": interval(lambda x: think(x) - no(x), positive=False),
            "percent_increase": interval(lambda x: 100 * (think(x) / no(x) - 1), positive=False),
        },
        table5={
            "trace_token_share": interval(share),
            "nll_trace": interval(trace),
            "nll_answer": interval(answer),
            "nll_ratio": interval(_quotient(trace, answer)),
        },
        modes={
            mode: {
                "logp_variance": interval(_column(f"var_logp_{mode}")),
                "length_variance": interval(_column(f"var_len_{mode}")),
                "mean_logp": interval(_column(f"mean_logp_{mode}"), positive=False),
                "mean_length": interval(_column(f"mean_len_{mode}")),
            }
            for mode in MODES
        },
        n_prompts=len(rows),
        n_samples=0,
        truncated=0,
        dropped_prompts=0,
    )
