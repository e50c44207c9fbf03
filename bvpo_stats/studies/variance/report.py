"""Appendix B for one model: tables from scored responses, profiles for the figures, and the report of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.records import MODES, Completion, Mode, Truncation
from bvpo_stats.sampling.engines.base import SamplingOptions
from bvpo_stats.statistics.proportions import Interval, Statistic, jackknife_interval
from bvpo_stats.statistics.tails import TailInterval, even_top_share, geometric_ratio, tail_interval, top_share
from bvpo_stats.studies.base import MODE_NAMES, Finding, Mark, Presentation, Report, ResultTable, few_cautions

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
class Spread:
    """How the variances of single questions differ, in one mode: which of them rule their mean.

    Attributes:
        n_eff: Effective number of questions behind the interval of the mean variance.
        largest_share: The one question's that matters most, of the squared changes that n_eff counts.
        few: Whether few questions rule, see `bvpo_stats.statistics.tails.TailInterval`.
        top_share: Share of the sum of variances that the top 5% of questions hold.
        even_top_share: What that would be if all questions had one variance and responses were normal.
    """

    n_eff: float | None
    largest_share: float | None
    few: bool
    top_share: float | None
    even_top_share: float


@dataclass(frozen=True)
class VarianceTables:
    """Tables 3, 4 and 5 with intervals, and what they were computed from.

    Attributes:
        table3: Variance ratios, Thinking / NoThinking: of the means over questions (the paper's) and of the geometric
            means.
        table4: Mean-length ratio and per-token NLL by mode (nats per token).
        table5: Trace and answer segments within Thinking.
        modes: Per-mode averages over questions: variance and mean of joint log-probability (nats) and length (tokens).
        n_prompts: Questions used.
        n_samples: Completions used.
        truncated: Completions set aside because they were cut or their trace never closed.
        dropped_prompts: Questions left out because fewer than two complete responses remained in some mode.
        spreads: By mode, of ``logp`` and ``length``: which questions rule the mean variance.
        without_spread: Of ``logp`` and ``length``: questions that the ratio of geometric means leaves out because all
            their responses were alike in some mode.
    """

    table3: dict[str, TailInterval]
    table4: Table
    table5: Table
    modes: dict[str, Table]
    n_prompts: int
    n_samples: int
    truncated: int
    dropped_prompts: int
    spreads: dict[str, dict[str, Spread]] = field(default_factory=dict, kw_only=True)
    without_spread: dict[str, int] = field(default_factory=dict, kw_only=True)


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
_BY_MODE = ("var_logp", "var_len", "mean_logp", "mean_len", "nll_sum", "tokens", "nll_mean", "responses")
_BY_SEGMENT = ("nll_sum", "tokens", "nll_mean")
_COLUMNS = (
    *(f"{what}_{mode}" for mode in MODES for what in _BY_MODE),
    *(f"{what}_{part}" for part in ("trace", "answer") for what in _BY_SEGMENT),
    "share_mean",
)
_AT = {name: column for column, name in enumerate(_COLUMNS)}
_SHORT = {"logp": "logp", "length": "len"}  # what varies, and its columns


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
        row[_AT[f"responses_{mode}"]] = len(samples)
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
            "were set aside). Draw more responses a question, or with a larger limit on new tokens if they were cut."
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

    variances = {(what, mode): rows[:, _AT[f"var_{_SHORT[what]}_{mode}"]] for what in _SHORT for mode in MODES}
    responses = {mode: rows[:, _AT[f"responses_{mode}"]] for mode in MODES}
    means = {at: tail_interval(values, level=definitions.level) for at, values in variances.items()}
    table3: dict[str, TailInterval] = {}
    without_spread = {}
    for what in _SHORT:
        thinking, nothinking = (variances[what, mode] for mode in MODES)
        table3[f"{what}_variance_ratio"] = tail_interval(thinking, nothinking, level=definitions.level)
        table3[f"{what}_geometric_ratio"], without_spread[what] = geometric_ratio(
            thinking, nothinking, (responses["thinking"], responses["nothinking"]), level=definitions.level
        )

    def spread(what: str, mode: Mode) -> Spread:
        found = means[what, mode]
        even = even_top_share(float(np.median(responses[mode])))
        return Spread(found.n_eff, found.largest_share, found.few, top_share(variances[what, mode]), even)

    think, no = _nll("thinking", definitions.nll), _nll("nothinking", definitions.nll)
    trace, answer = _nll("trace", definitions.nll), _nll("answer", definitions.nll)
    if definitions.nll == "questions":
        share = _column("share_mean")
    else:
        share = _quotient(_column("tokens_trace"), _column("tokens_thinking"))
    return VarianceTables(
        table3=table3,
        table4={
            "mean_length_ratio": interval(_quotient(_column("mean_len_thinking"), _column("mean_len_nothinking"))),
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
                **{f"{what}_variance": _plain(means[what, mode]) for what in _SHORT},
                "mean_logp": interval(_column(f"mean_logp_{mode}"), positive=False),
                "mean_length": interval(_column(f"mean_len_{mode}")),
            }
            for mode in MODES
        },
        n_prompts=len(rows),
        n_samples=0,
        truncated=0,
        dropped_prompts=0,
        spreads={mode: {what: spread(what, mode) for what in _SHORT} for mode in MODES},
        without_spread=without_spread,
    )


def _plain(found: Interval) -> Interval:
    return Interval(found.value, found.low, found.high)


_BINS = 30
# Positions are counted in tokens from the start of the segment; bins widen so that long traces stay readable.
_EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
          6144, 8192, 12288, 16384, 32768, 65536, 131072)  # fmt: skip


@dataclass(frozen=True)
class Histogram:
    """Counts by mode on shared bins.

    Attributes:
        edges: Bin edges, one more than bins.
        counts: Complete responses per bin, by mode.
    """

    edges: tuple[float, ...]
    counts: dict[Mode, tuple[int, ...]]


@dataclass(frozen=True)
class PositionBin:
    """Mean NLL (nats per token) of the tokens at positions start <= i < stop of a segment."""

    start: int
    stop: int
    tokens: int
    nll: Interval


def histogram(samples: Iterable[ScoredSample], what: str) -> Histogram:
    """Distribution of ``length`` or ``logp`` over complete responses, by mode."""
    values = {
        mode: np.array([getattr(s, what) for s in samples if s.mode == mode and s.complete], dtype=np.float64)
        for mode in MODES
    }
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=_BINS)
    counts = {mode: tuple(int(c) for c in np.histogram(v, bins=edges)[0]) for mode, v in values.items()}
    return Histogram(tuple(float(e) for e in edges), counts)


_FEWEST = 10
"""Questions that a bin of positions must have for its mean to be shown with an interval: with fewer, the questions that
happen to be that long rule it, and a band on the log scale is as wide as one likes."""


class PositionProfile:
    """Collects NLL by position, per question, so that the intervals are by clusters."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Float[np.ndarray, "two bins"]]] = {
            "trace": {},
            "answer": {},
            "no-trace answer": {},
        }

    def add(self, prompt_id: str, segment: str, logprobs: Float[np.ndarray, " tokens"]) -> None:
        """Adds the tokens of one segment (``trace``, ``answer`` or ``no-trace answer``) of one response."""
        bins = np.searchsorted(_EDGES, np.arange(len(logprobs)), side="right") - 1
        size = len(_EDGES) - 1
        sums = self._sums[segment].setdefault(prompt_id, np.zeros((2, size)))
        sums[0] += np.bincount(bins, weights=-np.asarray(logprobs, dtype=np.float64), minlength=size)[:size]
        sums[1] += np.bincount(bins, minlength=size)[:size]

    def bins(self, level: float) -> dict[str, list[PositionBin]]:
        """Token-pooled mean NLL of each bin with its interval.

        Bins that fewer than ten questions reach are left out; where there are fewer than ten at all, the bins that all
        of them reach are kept, without an interval.
        """
        result: dict[str, list[PositionBin]] = {}
        for segment, by_prompt in self._sums.items():
            result[segment] = []
            if not by_prompt:
                continue
            rows = np.stack([by_prompt[key] for key in sorted(by_prompt)])  # [questions, 2, bins]
            for i in range(rows.shape[2]):
                reached = rows[rows[:, 1, i] > 0, :, i]
                if len(reached) < min(_FEWEST, len(rows)):
                    continue
                nll = jackknife_interval(reached, lambda x: x[..., 0] / x[..., 1], level=level, positive=True)
                if len(reached) < _FEWEST:
                    nll = replace(nll, low=None, high=None)
                result[segment].append(PositionBin(_EDGES[i], _EDGES[i + 1], int(reached[:, 1].sum()), nll))
        return result


_TITLES = {
    "table3": "Table 3. Variance ratios, Thinking / NoThinking",
    "table4": "Table 4. Mean length ratio and NLL (nats per token)",
    "table5": "Table 5. Trace and answer within Thinking (nats per token)",
}
_VARIES = {"logp": "log p", "length": "length"}
_LABELS = {
    "logp_variance_ratio": "Variance ratio (log p)",
    "logp_geometric_ratio": "Ratio of geometric means (log p)",
    "length_variance_ratio": "Variance ratio (length)",
    "length_geometric_ratio": "Ratio of geometric means (length)",
    "mean_length_ratio": "Mean length ratio",
    "nll_think": "NLL Think",
    "nll_no": "NLL No",
    "delta_nll": "Delta NLL",
    "percent_increase": "% increase",
    "trace_token_share": "Trace token share",
    "nll_trace": "NLL trace",
    "nll_answer": "NLL answer",
    "nll_ratio": "NLL ratio (trace / answer)",
}


@dataclass(frozen=True)
class VarianceReport(VarianceTables, Report):
    """Appendix B for one model: its tables, and everything that the figures show.

    Attributes:
        model: Identity of the model.
        seed: Seed of the run, None for responses from elsewhere.
        definitions: How the tables are defined.
        sampling: Sampling options, None for responses from elsewhere.
        template: Name of the protocol.
        published: The paper's row, where the model is one of its three.
        lengths: Distribution of lengths, tokens.
        logps: Distribution of joint log-probabilities, nats.
        positions: NLL along the trace and the answer.
        lost: Responses without an answer, by mode and cause.
    """

    study: ClassVar[str] = "variance"
    drawn_by: ClassVar[str | None] = "bvpo_stats.studies.variance.figures"

    model: str
    seed: int | None
    definitions: Definitions
    sampling: SamplingOptions | None
    template: str
    published: dict[str, Any] | None
    lengths: Histogram
    logps: Histogram
    positions: dict[str, list[PositionBin]]
    lost: dict[Mode, Truncation] = field(default_factory=dict)

    def present(self) -> Presentation:
        """Tables 3 to 5, and what their numbers are."""
        return Presentation(
            title="How much variance do traces add?",
            findings=(self._finding(), *self._typical()),
            tables=(*(self._table(name) for name in _TITLES), *self._spread_table()),
            notes=tuple(self._notes()),
            cautions=tuple(self._cautions()),
        )

    def written(self, folder: Path) -> str:
        """As every run, and the samples."""
        return f"{super().written(folder)}, samples"

    def _finding(self) -> Finding:
        """Whether log-probabilities vary more with a trace than without, as the interval says."""
        entry = self.table3["logp_variance_ratio"]
        if entry.value is None or entry.low is None or entry.high is None:
            return Finding("These responses do not say whether traces add variance.", "open")
        said = f"{_number(entry.value)} ({_number(entry.low)} to {_number(entry.high)})"
        if entry.few:
            return Finding(
                f"Log p varies {said} times as much with a trace as without, but few questions rule that: n_eff is "
                f"{entry.n_eff:.1f} of {self.n_prompts}.",
                "open",
            )
        if entry.low > 1:
            return Finding(f"Traces add variance: log p varies {said} times as much with a trace as without.", "holds")
        if entry.high < 1:
            return Finding(f"Traces add no variance here: log p varies {said} times as much with a trace.", "fails")
        return Finding(f"The variance ratio of log p, {said}, is not told apart from 1.", "open")

    def _typical(self) -> tuple[Finding, ...]:
        """What a trace does to a question's variance, whichever question it is."""
        entry = self.table3.get("logp_geometric_ratio")
        if entry is None or entry.value is None or entry.low is None or entry.high is None:
            return ()
        mark: Mark = "holds" if entry.low > 1 else "fails" if entry.high < 1 else "open"
        said = f"{_number(entry.value)} ({_number(entry.low)} to {_number(entry.high)})"
        return (
            Finding(f"A typical question's log p varies {said} times as much with a trace (geometric means).", mark),
        )

    def _table(self, name: str) -> ResultTable:
        published = self.published
        head = ["", "Measured", f"{self.definitions.level:.0%} interval"]
        if published:
            head.append(f"Paper, {published['model']}")
        rows = []
        for entry, cell in getattr(self, name).items():
            few = isinstance(cell, TailInterval) and cell.few
            row = [_LABELS[entry], _number(cell.value), _ends(cell) + (" (few)" if few else "")]
            if published:
                printed = published[name].get(entry)
                row.append("-" if printed is None else _number(printed))
            rows.append(tuple(row))
        return ResultTable(_TITLES[name], tuple(head), tuple(rows))

    def _spread_table(self) -> tuple[ResultTable, ...]:
        """Which questions rule the variances and their ratios."""
        if not self.spreads:  # a report of before they were kept
            return ()
        head = ("", "Mean", f"{self.definitions.level:.0%} interval", "n_eff", "Top 5%", "Alike")
        rows = []
        for what, name in _VARIES.items():
            for mode in MODES:
                spread, mean = self.spreads[mode][what], self.modes[mode][f"{what}_variance"]
                rows.append(
                    (
                        f"{name}, {MODE_NAMES[mode]}",
                        _number(mean.value),
                        _ends(mean),
                        _few(spread),
                        _percent(spread.top_share),
                        _percent(spread.even_top_share),
                    )
                )
            for kind, label in (("variance", "ratio"), ("geometric", "geometric")):
                cell = self.table3[f"{what}_{kind}_ratio"]
                rows.append((f"{name}, {label}", _number(cell.value), _ends(cell), _few(cell), "-", "-"))
        return (ResultTable(f"How few of {self.n_prompts} questions rule the mean variances", head, tuple(rows)),)

    def _notes(self) -> list[str]:
        """What the numbers mean: every choice that Appendix B leaves open, as made in this run."""
        definitions = self.definitions
        pooling = (
            "pooled over all tokens"
            if definitions.nll == "tokens"
            else "computed per question, then averaged over questions"
        )
        lines = [
            f"Model {self.model}, template {self.template}.",
            f"{self.n_samples} complete responses to {self.n_prompts} questions; {self.truncated} truncated "
            f"or unclosed responses set aside, {self.dropped_prompts} questions dropped for lack of complete "
            "responses.",
            f"Variances over the responses of a question divide by n{' - 1' if definitions.ddof else ''} (`ddof`) and "
            f"are averaged over questions; NLL is {pooling} (`nll`).",
            "Log-probabilities are the policy's own at temperature 1, whatever the sampling temperature; a trace "
            "includes its closing tag, an answer its end-of-sequence token.",
            f"Intervals: {definitions.level:.0%}, delete-one-question jackknife, paired over questions; of mean "
            "variances and their ratio its hull with one that lets them have a log-normal tail over questions.",
        ]
        if self.spreads:
            lines.append(
                "n_eff: effective number of questions behind an interval (few: so few that they rule it). Top 5%: "
                "the share of the sum of variances that 5% of the questions hold; Alike: what they would hold if every "
                "question had the same variance. The ratio of geometric means is a typical question's: no question "
                "rules it."
            )
        if self.sampling is not None:
            s = self.sampling
            lines.insert(
                1,
                f"{s.samples} samples per question and mode at temperature {s.temperature:g}, top-p {s.top_p:g}, "
                f"at most {s.max_new_tokens} new tokens, seed {s.seed}.",
            )
        return lines

    def _cautions(self) -> list[str]:
        here = self.sampling is not None
        cautions = [c for mode, lost in self.lost.items() for c in lost.cautions(mode, drawn_here=here)]
        cautions += few_cautions(self.n_prompts, "questions")
        ruled = [_LABELS[name] for name, cell in self.table3.items() if cell.few]
        if ruled:
            cautions.append(
                f"Few questions rule {_listed(ruled)}: the estimate may change with the next questions, and its "
                "interval rests on a log-normal tail that these do not confirm. Read the ratio of geometric means, or "
                "give more `prompts`."
            )
        for what, count in self.without_spread.items():
            if count:
                cautions.append(
                    f"The ratio of geometric means of {_VARIES[what]} leaves out {count} of {self.n_prompts} questions "
                    "whose responses are all alike in some mode: read it as that of the others."
                )
        return cautions


def _ends(cell: Interval) -> str:
    if cell.value is None:
        return "-"
    if cell.low is None or cell.high is None:
        return "not estimable"
    return f"{_number(cell.low)} to {_number(cell.high)}"


def _few(found: Spread | TailInterval) -> str:
    """n_eff, marked where few questions rule."""
    if found.n_eff is None:
        return "-"
    return f"{found.n_eff:.1f}" + (" (few)" if found.few else "")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _listed(names: list[str]) -> str:
    lower = [name[0].lower() + name[1:] for name in names]
    return lower[0] if len(lower) == 1 else f"{', '.join(lower[:-1])} and {lower[-1]}"


def _number(value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
