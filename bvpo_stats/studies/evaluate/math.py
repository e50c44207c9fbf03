"""Accuracy on math benchmarks: verdicts of all models, and the columns made of them (Table 2 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.studies.evaluate.benchmarks import Benchmark
from bvpo_stats.studies.evaluate.config import Contestant, EvaluateConfig
from bvpo_stats.studies.evaluate.report import (
    BenchmarkFacts,
    Column,
    ColumnValues,
    TaskResults,
    add_average,
    differences_of,
    scores_of,
)
from bvpo_stats.studies.evaluate.sampling import check_all_answered, open_responses
from bvpo_stats.studies.evaluate.verdicts import Outcomes, judge_responses


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
