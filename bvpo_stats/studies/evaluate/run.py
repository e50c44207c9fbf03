"""The paper's evaluation protocol (Section 5, Appendix C.2): reasoning and alignment, with and without a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bvpo_stats.embedded.assets import EMBEDDED
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import content_identity, model_source
from bvpo_stats.sampling.engines.base import SamplingOptions
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.store.tables import fingerprint
from bvpo_stats.studies.evaluate.benchmarks import Benchmark, load_benchmarks, load_instructions
from bvpo_stats.studies.evaluate.config import BASE, Contestant, EvaluateConfig, contestants
from bvpo_stats.studies.evaluate.judge import alignment_results, load_judge
from bvpo_stats.studies.evaluate.math import math_results, unreadable_golds
from bvpo_stats.studies.evaluate.report import EvaluationReport, TaskResults
from bvpo_stats.studies.evaluate.sampling import draw_responses
from bvpo_stats.studies.published import published_name, published_scores
from bvpo_stats.studies.sample.report import SampleReport


def evaluate(config: EvaluateConfig, output: Path) -> EvaluationReport | None:
    """Runs (or resumes) an evaluation in a folder and writes its report, tables and figure.

    >>> from bvpo_stats.studies.evaluate.run import EvaluateConfig, evaluate
    >>> report = evaluate(EvaluateConfig(adapters=("runs/train/model",)), Path("runs/evaluate"))  # doctest: +SKIP
    >>> report.differences["train"]["thinking"]["embedded"]  # doctest: +SKIP
    Interval(value=0.05..., low=0.02..., high=0.08...)

    Args:
        config: The settings.
        output: Folder of the run; the same folder again resumes it.

    Returns:
        The report; None for a shard, which only draws its part of the responses. Once all shards have, the same call
        without ``shard`` finds nothing left to draw and reports.

    Raises:
        UserError: Anything wrong with the input; see the message. What was drawn is kept.
    """
    entrants = contestants(config)
    benchmarks, results = (_math if config.task == "math" else _alignment)(config, entrants)
    with open_run(output, "evaluate", _identity(config, entrants, benchmarks), shard=config.shard) as folder:
        runs = draw_responses(config, entrants, benchmarks, folder)
        if not config.shard.whole:
            return None
        report = _report(config, runs, results(folder))
        report.write(folder)
    return report


_Prepared = tuple[list[Benchmark], Callable[[Path], TaskResults]]
"""A task whose input has been checked: what to ask, and how to make results of the responses in a folder."""


def _math(config: EvaluateConfig, entrants: Sequence[Contestant]) -> _Prepared:
    sources = config.data or (EMBEDDED,)
    instruction = "" if config.instruction is None and config.model == EMBEDDED else config.instruction
    benchmarks = load_benchmarks(
        sources,
        samples=config.samples,
        split=config.split,
        instruction=instruction,
        limit=config.limit,
        config_name=config.config_name,
    )
    unreadable = {benchmark.name: unreadable_golds(benchmark) for benchmark in benchmarks}
    return benchmarks, lambda folder: math_results(config, entrants, benchmarks, unreadable, folder)


def _alignment(config: EvaluateConfig, entrants: Sequence[Contestant]) -> _Prepared:
    if len(config.data) > 1:
        raise UserError(f"`data`: {config.task} takes one set of prompts, {len(config.data)} were given.")
    source = config.data[0] if config.data else EMBEDDED if config.model == EMBEDDED else config.task
    asked = load_instructions(
        config.task, source, split=config.split, limit=config.limit, config_name=config.config_name
    )
    judge = load_judge(config, asked.benchmark, len(entrants))
    return [asked.benchmark], lambda folder: alignment_results(config, entrants, asked, judge, folder)


def _identity(
    config: EvaluateConfig, entrants: Sequence[Contestant], benchmarks: Sequence[Benchmark]
) -> dict[str, Any]:
    """What decides the numbers; the sampling runs inside check the models' contents once more when they are loaded."""
    identity: dict[str, Any] = {
        "task": config.task,
        "engine": config.engine,
        "modes": list(config.modes),
        "models": {entrant.label: _content(config, entrant) for entrant in entrants},
        "benchmarks": {b.name: {"problems": b.fingerprint, "samples": b.samples} for b in benchmarks},
    }
    if config.engine != "file":
        identity |= _sampling(config)
    return identity


def _content(config: EvaluateConfig, entrant: Contestant) -> str:
    if entrant.samples_from is not None:
        return fingerprint(entrant.samples_from, "samples_from")
    if config.engine != "transformers":
        return entrant.source
    if entrant.adapter is not None:
        return content_identity(entrant.source, entrant.adapter, None)
    model = entrant.model or config.model
    return content_identity(model, model_source(model), None)


def _sampling(config: EvaluateConfig) -> dict[str, Any]:
    """How responses are drawn, the number of them apart: each benchmark has its own."""
    options = SamplingOptions(1, config.temperature, config.top_p, config.tokens, config.seed)
    return {name: value for name, value in asdict(options).items() if name != "samples"}


def _report(config: EvaluateConfig, runs: dict[str, SampleReport], results: TaskResults) -> EvaluationReport:
    base = runs[BASE]
    rows = published_scores(base.model, config.task)
    return EvaluationReport(
        task=config.task,
        engine=config.engine,
        models={label: run.model for label, run in runs.items()},
        template=base.template,
        sampling=None if config.engine == "file" else _sampling(config),
        level=config.level,
        published={"model": published_name(base.model), "scores": rows} if rows else None,
        **vars(results),
    )
