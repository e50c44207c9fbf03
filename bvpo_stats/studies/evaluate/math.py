"""The math benchmarks: which responses are correct, verdicts on record, and results by problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bvpo_stats.embedded.task import grade, parse_answer
from bvpo_stats.errors import UserError
from bvpo_stats.progress import progress
from bvpo_stats.records import Completion, Mode, Prompt
from bvpo_stats.sampling.rewards import Answer, load_reward
from bvpo_stats.sampling.rewards.verifiers import MathVerifyReward
from bvpo_stats.store.jsonl import RowLog
from bvpo_stats.store.sample_index import SampleIndex
from bvpo_stats.studies.evaluate.benchmarks import Benchmark
from bvpo_stats.studies.evaluate.config import Contestant, EvaluateConfig
from bvpo_stats.studies.evaluate.report import (
    BenchmarkFacts,
    Column,
    ColumnValues,
    ResponseCounts,
    TaskResults,
    add_average,
    differences_of,
    scores_of,
)
from bvpo_stats.studies.evaluate.sampling import check_all_answered, open_responses


def math_results(
    config: EvaluateConfig,
    entrants: Sequence[Contestant],
    benchmarks: Sequence[Benchmark],
    unreadable: Mapping[str, tuple[str, ...]],
    folder: Path,
) -> TaskResults:
    """Checks every response on record and averages.

    Args:
        config: Settings.
        entrants: The models.
        benchmarks: The problems.
        unreadable: By benchmark: problems whose gold answer cannot be read.
        folder: Folder of the evaluation, with the responses in it.

    Raises:
        UserError: Responses to other problems than the benchmark's.
    """
    outcomes = {
        benchmark.name: {e.label: _outcomes(config, e, benchmark, folder) for e in entrants} for benchmark in benchmarks
    }
    asked = [_as_answered(benchmark, outcomes[benchmark.name]) for benchmark in benchmarks]
    columns = [column for benchmark in asked for column in _columns(benchmark, outcomes[benchmark.name])]
    scores, differences = scores_of(columns, config.level), differences_of(columns, config.level)
    average = add_average(columns, scores, differences, config.level)
    return TaskResults(
        benchmarks=tuple(_facts(benchmark, unreadable[benchmark.name]) for benchmark in asked),
        columns=tuple(c.column for c in columns) + (() if average is None else (average,)),
        scores=scores,
        differences=differences,
        counts={
            e.label: {
                mode: {name: by_label[e.label].counts[mode] for name, by_label in outcomes.items()}
                for mode in config.modes
            }
            for e in entrants
        },
    )


def _outcomes(config: EvaluateConfig, entrant: Contestant, benchmark: Benchmark, folder: Path) -> Outcomes:
    with open_responses(config, folder, entrant, benchmark) as index:
        check_all_answered(index, benchmark, entrant)
        log = folder / f"verdicts-{entrant.label}-{benchmark.name}.jsonl"
        outcomes = judge_responses(index, benchmark, config.modes, log, entrant.label)
    for mode in config.modes:
        if not np.isfinite(outcomes.correct[mode]).any():
            raise UserError(f"{entrant.source}: no {mode} answers to {benchmark.name}. Leave the mode out: `modes`.")
    return outcomes


def _as_answered(benchmark: Benchmark, outcomes: Mapping[str, Outcomes]) -> Benchmark:
    """The benchmark with the k that the responses have: those of a file may be more or fewer than usual."""
    return replace(benchmark, samples=max(outcome.samples for outcome in outcomes.values()))


def _columns(benchmark: Benchmark, outcomes: Mapping[str, Outcomes]) -> list[ColumnValues]:
    accuracy = Column(benchmark.name, benchmark.title, benchmark.metric)
    correct = {label: dict(outcome.correct) for label, outcome in outcomes.items()}
    columns = [ColumnValues(accuracy, correct, trials=benchmark.samples)]
    rewards = {label: dict(outcome.rewards) for label, outcome in outcomes.items() if outcome.rewards is not None}
    if rewards:
        name = f"{benchmark.name}_reward"
        columns.append(ColumnValues(Column(name, "Reward", "mean reward", percent=False), rewards))
    return columns


def _facts(benchmark: Benchmark, unreadable: tuple[str, ...]) -> BenchmarkFacts:
    return BenchmarkFacts(
        name=benchmark.name,
        source=benchmark.source,
        problems=len(benchmark.problems),
        samples=benchmark.samples,
        verifier=benchmark.verifier,
        duplicates=benchmark.duplicates,
        unreadable_gold=unreadable,
    )


_WINDOW = 8  # problems in memory at a time: 32 responses of 32k tokens each
Series = Float[np.ndarray, " problems"]


@dataclass(frozen=True)
class Outcomes:
    """Results of one model on one benchmark, one row per problem in the benchmark's order.

    Attributes:
        correct: By mode: share of correct responses, NaN where there are none or the problem is set aside.
        rewards: By mode: mean reward (embedded task), a response without an answer counting 0; else None.
        counts: By mode: what became of the responses.
        samples: Most responses that a problem has in a mode.
    """

    correct: dict[str, Series]
    rewards: dict[str, Series] | None
    counts: dict[str, ResponseCounts]
    samples: int


def unreadable_golds(benchmark: Benchmark) -> tuple[str, ...]:
    """Problems whose gold answer math-verify cannot read; found before anything is sampled.

    Raises:
        UserError: None can be read, or math-verify is not installed.
    """
    if benchmark.verifier != "math-verify":
        return ()
    probes = [Answer(p.prompt_id, "thinking", 0, p.prompt, "", p.gold) for p in benchmark.problems]
    scores = load_reward(MathVerifyReward.identity).score(probes)
    unreadable = tuple(probe.prompt_id for probe, score in zip(probes, scores, strict=True) if score is None)
    if len(unreadable) == len(probes):
        raise UserError(f"`data={benchmark.source!r}`: math-verify can read none of the gold answers. Check `answer`.")
    return unreadable


def verdict_rows(completions: Sequence[Completion], golds: Mapping[str, str], verifier: str) -> list[dict[str, Any]]:
    """What became of each response: ``correct``, ``wrong``, ``timeout``, or why it cannot be correct.

    A response that was cut is ``truncated`` whatever stands in it, one whose trace never closes is ``unclosed``, a
    finished one without any text after the trace is ``empty``. Only what follows the trace is looked at.

    Args:
        completions: The responses.
        golds: Gold answers by prompt id.
        verifier: ``math-verify`` or ``embedded``.

    Returns:
        One row per response with ``verdict`` and, for the embedded task, ``reward``.
    """
    flaws = [_flaw(completion) for completion in completions]
    answers = [
        Answer(c.prompt_id, c.mode, c.sample_index, c.prompt, c.answer or "", golds[c.prompt_id])
        for c, flaw in zip(completions, flaws, strict=True)
        if flaw is None
    ]
    judged = iter(_embedded(answers) if verifier == "embedded" else _math_verify(answers))
    lost: dict[str, Any] = {"reward": 0.0} if verifier == "embedded" else {}
    return [next(judged) if flaw is None else {"verdict": flaw, **lost} for flaw in flaws]


def _flaw(completion: Completion) -> str | None:
    if completion.finish_reason == "length":
        return "truncated"
    if completion.answer_start is None:
        return "unclosed"
    return None if completion.answer else "empty"


def _embedded(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    rows = []
    for answer in answers:
        gold = int(answer.gold or "")
        verdict = "correct" if parse_answer(answer.text) == gold else "wrong"
        rows.append({"verdict": verdict, "reward": grade(answer.text, gold)})
    return rows


def _math_verify(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [{"verdict": verdict} for verdict in MathVerifyReward().verdicts(answers)]


def judge_responses(index: SampleIndex, benchmark: Benchmark, modes: Sequence[Mode], log: Path, label: str) -> Outcomes:
    """Checks all responses of one model to one benchmark; verdicts are put on record and survive a kill.

    Args:
        index: The responses.
        benchmark: The problems.
        modes: Modes of the evaluation.
        log: JSONL file of the verdicts.
        label: Name of the model, for the progress display.
    """
    problems: dict[str, Prompt] = {problem.prompt_id: problem for problem in benchmark.problems}
    golds = {name: problem.gold or "" for name, problem in problems.items()}
    rows = RowLog(log)
    tally = _Tally(benchmark, modes)
    with progress(f"Checking {label}, {benchmark.name}", index.source.n_prompts, "problems") as advance:
        for window in index.windows(_WINDOW):
            known = [c for completions in window for c in completions if c.prompt_id in problems]
            keys = [{"prompt_id": c.prompt_id, "mode": c.mode, "sample_index": c.sample_index} for c in known]
            judged = rows.rows(keys, lambda known=known: verdict_rows(known, golds, benchmark.verifier))  # type: ignore[misc]
            for completion, row in zip(known, judged, strict=True):
                tally.add(completion, row)
            advance(len(window))
    return tally.outcomes()


class _Tally:
    """Sums by problem and mode, and counts by mode."""

    def __init__(self, benchmark: Benchmark, modes: Sequence[Mode]) -> None:
        size = len(benchmark.problems)
        self._benchmark = benchmark
        self._place = {problem.prompt_id: place for place, problem in enumerate(benchmark.problems)}
        self._correct = {mode: np.zeros(size) for mode in modes}
        self._reward = {mode: np.zeros(size) for mode in modes}
        self._number = {mode: np.zeros(size) for mode in modes}
        self._judged = {mode: np.zeros(size) for mode in modes}
        self._counts: dict[Mode, Counter[str]] = {mode: Counter() for mode in modes}

    def add(self, completion: Completion, row: dict[str, Any]) -> None:
        mode, place, verdict = completion.mode, self._place[completion.prompt_id], row["verdict"]
        self._number[mode][place] += 1
        self._judged[mode][place] += verdict != "unreadable gold"
        self._correct[mode][place] += verdict == "correct"
        self._reward[mode][place] += row.get("reward", 0.0)
        counts = self._counts[mode]
        counts[verdict] += 1
        counts["tokens"] += len(completion.completion_ids)
        counts["characters"] += len(completion.answer or "")

    def outcomes(self) -> Outcomes:
        embedded = self._benchmark.verifier == "embedded"
        with np.errstate(invalid="ignore", divide="ignore"):
            correct: dict[str, Series] = {m: self._correct[m] / self._judged[m] for m in self._correct}
            rewards: dict[str, Series] = {m: self._reward[m] / self._number[m] for m in self._reward}
        samples = max(int(number.max()) for number in self._number.values())
        counts: dict[str, ResponseCounts] = {mode: self._summary(mode, samples) for mode in self._counts}
        return Outcomes(correct, rewards if embedded else None, counts, samples)

    def _summary(self, mode: Mode, samples: int) -> ResponseCounts:
        counts, responses = self._counts[mode], int(self._number[mode].sum())
        return ResponseCounts(
            responses=responses,
            truncated=counts["truncated"],
            unclosed=counts["unclosed"],
            empty=counts["empty"],
            timeouts=counts["timeout"],
            missing=len(self._place) * samples - responses,
            solved=int((self._correct[mode] > 0).sum()),
            mean_tokens=counts["tokens"] / responses if responses else None,
            mean_answer_characters=counts["characters"] / responses if responses else None,
        )
