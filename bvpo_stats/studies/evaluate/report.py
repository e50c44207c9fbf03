"""What an evaluation found: the report that tables, figures and files are made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bvpo_stats.statistics.proportions import Interval

BASE = "base"
"""Label of the model that the others are compared with."""

Scores = dict[str, dict[str, dict[str, Interval]]]
"""By label of the model, mode and name of the column."""


@dataclass(frozen=True)
class Column:
    """One figure of merit.

    Attributes:
        name: Key in the report: a benchmark's name, ``average``, ``win_rate``, ...
        title: Column heading.
        metric: What the number is: ``avg@32``, ``pass@1``, ``mean reward``, ``win rate``, ...
        percent: Whether it is a share (written in percent).
    """

    name: str
    title: str
    metric: str
    percent: bool = True


@dataclass(frozen=True)
class BenchmarkFacts:
    """What was asked.

    Attributes:
        name: Name of the benchmark.
        source: Where its problems come from.
        problems: How many.
        samples: Responses per problem and mode.
        verifier: What decided.
        duplicates: Repeated rows left out.
        unreadable_gold: Problems set aside because math-verify cannot read their gold answer.
    """

    name: str
    source: str
    problems: int
    samples: int
    verifier: str
    duplicates: int
    unreadable_gold: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResponseCounts:
    """What became of the responses of one model to one benchmark in one mode.

    Attributes:
        responses: Responses on record.
        truncated: Cut at the token limit (math: wrong; alignment: passed on where there is an answer).
        unclosed: Ended without closing the trace, so without an answer (wrong; an empty answer in answer files).
        empty: Finished with an empty answer.
        timeouts: Comparisons cut off by math-verify's time limit (wrong).
        missing: Responses that were asked for and are not on record (set aside by a server, absent from a file).
        solved: Problems with at least one correct response (math), None elsewhere.
        mean_tokens: Mean length in tokens, trace and answer.
        mean_answer_characters: Mean length of the final answers in characters, 0 for none.
    """

    responses: int
    truncated: int
    unclosed: int
    empty: int
    timeouts: int
    missing: int
    solved: int | None
    mean_tokens: float | None
    mean_answer_characters: float | None


@dataclass(frozen=True)
class TaskResults:
    """The part of a report that the task decides; see :class:`EvaluationReport`."""

    benchmarks: tuple[BenchmarkFacts, ...]
    columns: tuple[Column, ...]
    scores: Scores
    differences: Scores
    counts: dict[str, dict[str, dict[str, ResponseCounts]]]
    answer_files: dict[str, dict[str, str]] = field(default_factory=dict)
    reward: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationReport:
    """One evaluation.

    Attributes:
        task: ``math``, ``alpaca-eval`` or ``arena-hard``.
        engine: Name of the sampling engine.
        models: Identity of each model by label; ``base`` first.
        template: Name of the prompt protocol.
        sampling: Temperature, top-p, cut-off and seed; None for responses from elsewhere.
        level: Confidence level of the intervals.
        benchmarks: What was asked.
        columns: The figures of merit, in order; none where judging is left to others.
        scores: Value and interval by model, mode and column.
        differences: The same for each model minus ``base``, paired by problem.
        counts: What became of the responses, by model, mode and benchmark.
        answer_files: Answer files written, by model and mode (alignment tasks).
        reward: Identity of the reward behind a judgement.
        published: The paper's rows, where the base model is one of its three.
        notes: What a reader should know.
        versions: Software versions.
    """

    task: str
    engine: str
    models: dict[str, str]
    template: str
    sampling: dict[str, float] | None
    level: float
    benchmarks: tuple[BenchmarkFacts, ...]
    columns: tuple[Column, ...]
    scores: Scores
    differences: Scores
    counts: dict[str, dict[str, dict[str, ResponseCounts]]]
    answer_files: dict[str, dict[str, str]]
    reward: str | None
    published: dict[str, Any] | None
    notes: tuple[str, ...]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as it stands in ``report.json``."""
        return {"study": "evaluate", **asdict(self)}

    def _repr_html_(self) -> str:
        """The tables, for notebooks."""
        from bvpo_stats.studies.evaluate.output import present

        return present(self.to_dict()).html()
