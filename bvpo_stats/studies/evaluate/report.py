"""What an evaluation found: scores and paired differences from one number per problem, and the report of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from bvpo_stats.records import MOST_LOST, more_tokens
from bvpo_stats.statistics.proportions import (
    Interval,
    average_interval,
    difference_interval,
    mean_interval,
    proportion_interval,
)
from bvpo_stats.studies.base import MODE_NAMES, REPORT_FILE, Finding, Mark, Presentation, Report, ResultTable
from bvpo_stats.studies.evaluate.benchmarks import PRESETS
from bvpo_stats.studies.evaluate.config import BASE

_COUNTS = {"responses": "Responses", "truncated": "Cut", "unclosed": "Unclosed", "empty": "Empty",
           "timeouts": "Timeouts", "missing": "Missing", "solved": "Solved"}  # fmt: skip
_ALWAYS = ("responses", "truncated")
_DASH = "-"
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


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """The part of a report that the task decides.

    Attributes:
        benchmarks: What was asked.
        columns: The figures of merit, in order; none where judging is left to others.
        scores: Value and interval by model, mode and column.
        differences: The same for each model minus ``base``, paired by problem.
        counts: What became of the responses, by model, mode and benchmark.
        answer_files: Answer files written, by model and mode (alignment tasks).
        reward: Identity of the reward behind a judgement.
        notes: What a reader should know.
    """

    benchmarks: tuple[BenchmarkFacts, ...]
    columns: tuple[Column, ...]
    scores: Scores
    differences: Scores
    counts: dict[str, dict[str, dict[str, ResponseCounts]]]
    answer_files: dict[str, dict[str, str]] = field(default_factory=dict)
    reward: str | None = None
    notes: tuple[str, ...] = ()


Series = Float[np.ndarray, " problems"]
AVERAGE = "average"


@dataclass(frozen=True)
class ColumnValues:
    """One figure of merit before it is averaged over problems.

    Attributes:
        column: What it is.
        values: By model and mode: one number per problem, NaN where there is none.
        trials: Responses behind each number.
    """

    column: Column
    values: Mapping[str, Mapping[str, Series]]
    trials: float = 1.0


def scores_of(columns: Sequence[ColumnValues], level: float) -> Scores:
    """Every figure of merit with its interval, by model and mode, clustered by problem."""

    def score(column: ColumnValues, label: str, mode: str) -> Interval:
        values = _known(column.values[label][mode])
        if column.column.percent:
            return proportion_interval(values, trials=column.trials, level=level)
        return mean_interval(values, level=level)

    return _each(columns, score, _labels(columns))


def differences_of(columns: Sequence[ColumnValues], level: float) -> Scores:
    """Each model minus ``base``, over the problems that both have, paired by problem."""

    def difference(column: ColumnValues, label: str, mode: str) -> Interval:
        new, old = _paired(column, label, mode)
        return difference_interval(new, old, level=level)

    return _each(columns, difference, [label for label in _labels(columns) if label != BASE])


def add_average(columns: Sequence[ColumnValues], scores: Scores, differences: Scores, level: float) -> Column | None:
    """Puts the plain average over benchmarks (Table 2's Avg.) beside them; None where there is one benchmark only."""
    shares = [column for column in columns if column.column.percent]
    if len(shares) < 2:
        return None
    for label, modes in scores.items():
        for mode, entries in modes.items():
            entries[AVERAGE] = average_interval([_known(c.values[label][mode]) for c in shares], level=level)
    for label, modes in differences.items():
        for mode, entries in modes.items():
            pairs = [_paired(column, label, mode) for column in shares]
            entries[AVERAGE] = average_interval([new - old for new, old in pairs], level=level)
    return Column(AVERAGE, "Avg.", "mean")


def _each(
    columns: Sequence[ColumnValues], entry: Callable[[ColumnValues, str, str], Interval], labels: Sequence[str]
) -> Scores:
    return {
        label: {
            mode: {column.column.name: entry(column, label, mode) for column in columns}
            for mode in columns[0].values[label]
        }
        for label in labels
    }


def _labels(columns: Sequence[ColumnValues]) -> list[str]:
    return list(columns[0].values) if columns else []


def _known(values: Series) -> Float[np.ndarray, " known"]:
    return values[np.isfinite(values)]


def _paired(column: ColumnValues, label: str, mode: str) -> tuple[Series, Series]:
    new, old = column.values[label][mode], column.values[BASE][mode]
    both = np.isfinite(new) & np.isfinite(old)
    return new[both], old[both]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(TaskResults, Report):
    """One evaluation: the results of its task, and how they came about.

    Attributes:
        task: ``math``, ``alpaca-eval`` or ``arena-hard``.
        engine: Name of the sampling engine.
        models: Identity of each model by label; ``base`` first.
        template: Name of the prompt protocol.
        sampling: Temperature, top-p, cut-off and seed; None for responses from elsewhere.
        level: Confidence level of the intervals.
        published: The paper's rows, where the base model is one of its three.
    """

    study: ClassVar[str] = "evaluate"
    drawn_by: ClassVar[str | None] = "bvpo_stats.studies.evaluate.figures"

    task: str
    engine: str
    models: dict[str, str]
    template: str
    sampling: dict[str, float] | None
    level: float
    published: dict[str, Any] | None

    def present(self) -> Presentation:
        """Tables like the paper's Tables 1 and 2, differences from the base, and what became of the responses."""
        return Presentation(
            title="How well does the model answer?" if self.task == "math" else "How good are the answers?",
            findings=tuple(self._findings()),
            tables=(*map(self._score_table, self.scores[BASE] if self.columns else ()), self._count_table()),
            notes=tuple(self._notes()),
            cautions=tuple(self._cautions()),
        )

    def written(self, folder: Path) -> str:
        """The report and the answer files."""
        answers = [str(folder / path) for modes in self.answer_files.values() for path in modes.values()]
        return ", ".join([str(folder / REPORT_FILE), "report.md", *answers])

    def _findings(self) -> Iterator[Finding]:
        """What each compared model gained or lost, as far as the intervals tell."""
        columns = [column for column in self.columns if column.percent]
        chosen = [column for column in columns if column.name == "average"] or columns
        for label, modes in self.differences.items():
            for mode, entries in modes.items():
                for column in chosen:
                    yield _finding(f"{label}, {MODE_NAMES[mode]}, {column.title}", entries[column.name])

    def _score_table(self, mode: str) -> ResultTable:
        """The models in one mode, their differences from the base, and the paper's rows."""
        columns = self.columns
        base = self.models[BASE].partition("@")[0]
        rows = [
            (f"{label} ({base})" if label == BASE else label, *(_entry(modes[mode][c.name], c) for c in columns))
            for label, modes in self.scores.items()
        ]
        rows += [
            (f"{label} - {BASE}", *(_entry(modes[mode][c.name], c, sign="+") for c in columns))
            for label, modes in self.differences.items()
        ]
        head = ("", *(f"{c.title}, {c.metric}{' (%)' if c.percent else ''}" for c in columns))
        return ResultTable(MODE_NAMES[mode], head, (*rows, *self._published_rows(mode)))

    def _published_rows(self, mode: str) -> Iterator[tuple[str, ...]]:
        published = self.published or {"scores": {}}
        names = [column.name for column in self.columns]
        for method, modes in published["scores"].items():
            printed = modes.get(mode, {})
            if any(name in printed for name in names):
                row = published["model"] if method == BASE else f"{published['model']} {method}"
                yield (f"{row} (paper)", *(f"{printed[name]:.1f}" if name in printed else _DASH for name in names))

    def _count_table(self) -> ResultTable:
        """What became of the responses; counts that are 0 throughout are left out, the truncated ones never."""
        every = list(self._each_count())
        shown = [name for name in _COUNTS if name in _ALWAYS or any(getattr(counts, name) for _, counts in every)]
        rows = []
        for where, counts in every:
            mean = counts.mean_tokens
            numbers = (_DASH if getattr(counts, name) is None else str(getattr(counts, name)) for name in shown)
            rows.append((where, *numbers, _DASH if mean is None else f"{mean:.1f}"))
        head = ("", *(_COUNTS[name] for name in shown), "Tokens")
        return ResultTable("Responses; mean length in tokens", head, tuple(rows))

    def _each_count(self) -> Iterator[tuple[str, ResponseCounts]]:
        for label, modes in self.counts.items():
            for mode, benchmarks in modes.items():
                for name, counts in benchmarks.items():
                    which = f", {name}" if len(benchmarks) > 1 else ""
                    yield f"{label}, {MODE_NAMES[mode]}{which}", counts

    def _notes(self) -> Iterator[str]:
        yield f"Base model {self.models[BASE]}, template {self.template}, engine {self.engine}."
        if self.sampling is not None:
            s = self.sampling
            yield (
                f"Temperature {s['temperature']:g}, top-p {s['top_p']:g}, at most {s['max_new_tokens']} new tokens, "
                f"seed {s['seed']}."
            )
        for facts in self.benchmarks:
            responses = "1 response" if facts.samples == 1 else f"{facts.samples} responses"
            yield (
                f"{facts.name}: {facts.problems} prompts from {facts.source}, {responses} to each in a mode, "
                f"decided by {facts.verifier}."
            )
            if facts.duplicates:
                yield f"{facts.name}: {facts.duplicates} repeated problems were left out."
        if self.task == "math":
            yield from self._math_notes()
        yield from self.notes

    def _math_notes(self) -> Iterator[str]:
        yield (
            "avg@k is the share of correct responses among a problem's k, averaged over problems: it estimates pass@1. "
            "A response that was cut or never closed its trace is wrong; only what follows the trace is checked."
        )
        yield (
            f"Intervals: {self.level:.0%}, clustered by problem (Wilson's with the effective number of trials; "
            "Student's for means, averages and differences, the latter paired by problem)."
        )
        if not all(column.percent for column in self.columns):
            yield "Reward: the embedded task's grade in [0, 1]; a response without an answer counts 0."
        if self.published:
            yield "The paper does not say in which mode Table 2 was measured; its rows stand under Thinking."

    def _cautions(self) -> Iterator[str]:
        for facts in self.benchmarks:
            preset = PRESETS.get(facts.name)
            unreadable = facts.unreadable_gold
            if unreadable:
                yield (
                    f"math-verify cannot read the gold answer of {len(unreadable)} problems of {facts.name} "
                    f"({', '.join(unreadable[:5])}); they are left out."
                )
            if preset is not None and facts.problems + facts.duplicates < preset.size:
                yield f"{facts.name} has {preset.size} problems, {facts.problems} were evaluated."
        for where, counts in self._each_count():
            cut, unclosed = (
                count / counts.responses if counts.responses else 0.0 for count in (counts.truncated, counts.unclosed)
            )
            if cut > MOST_LOST:
                fate = (
                    "count as wrong, whatever they would have become"
                    if self.task == "math"
                    else "are judged by what is left of them: nothing, where the trace was cut"
                )
                yield (
                    f"{cut:.1%} of the responses of {where} were cut at the token limit and {fate}. "
                    f"{more_tokens(self.sampling is not None)}"
                )
            if unclosed > MOST_LOST:
                yield (
                    f"{unclosed:.1%} of the responses of {where} ended by themselves without closing their trace, so "
                    "that they have no answer. More tokens do not help: check `template`, and that the model was "
                    "trained to close it."
                )
            if counts.missing:
                yield f"{counts.missing} responses of {where} are missing; they count neither way."
            if counts.timeouts:
                yield f"{counts.timeouts} comparisons of {where} ran into the time limit and count as wrong."


def _finding(what: str, entry: Interval) -> Finding:
    if entry.value is None or entry.low is None or entry.high is None:
        return Finding(f"{what}: no difference from the base model was seen.", "open")
    said = f"{100 * entry.value:+.1f} points ({100 * entry.low:+.1f} to {100 * entry.high:+.1f})"
    mark: Mark = "holds" if entry.low > 0 else "fails" if entry.high < 0 else "open"
    verdict = {"holds": "better than", "fails": "worse than", "open": "not told apart from"}[mark]
    return Finding(f"{what}: {said}, {verdict} the base model.", mark)


def _entry(entry: Interval, column: Column, sign: str = "") -> str:
    if entry.value is None:
        return _DASH
    scale, digits = (100, 1) if column.percent else (1, 3)
    value, low, high = (
        None if end is None else f"{scale * end:{sign}.{digits}f}" for end in (entry.value, entry.low, entry.high)
    )
    return f"{value}" if low is None else f"{value} ({low} to {high})"
