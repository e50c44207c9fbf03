"""The paper's evaluation protocol (Section 5, Appendix C.2): reasoning and alignment, with and without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bvpo_stats.data.benchmarks import Benchmark, load_benchmarks
from bvpo_stats.data.engines.base import SamplingOptions
from bvpo_stats.data.jsonl import write_atomic
from bvpo_stats.data.prompts import EMBEDDED
from bvpo_stats.data.run_folder import open_run
from bvpo_stats.model.policy import content_identity, model_source
from bvpo_stats.studies.evaluate_config import Contestant, EvaluateConfig, contestants
from bvpo_stats.studies.evaluate_math import math_results
from bvpo_stats.studies.evaluate_output import markdown
from bvpo_stats.studies.evaluate_report import BASE, EvaluationReport
from bvpo_stats.studies.evaluate_sampling import draw_responses
from bvpo_stats.studies.evaluate_verdicts import unreadable_golds
from bvpo_stats.studies.published import published_name, published_scores
from bvpo_stats.studies.report_file import to_json, versions
from bvpo_stats.studies.sample import SampleReport


def evaluate(config: EvaluateConfig, output: Path) -> EvaluationReport | None:
    """Runs (or resumes) an evaluation in a folder and writes its report, tables and figure.

    >>> from bvpo_stats.studies.evaluate import EvaluateConfig, evaluate
    >>> report = evaluate(EvaluateConfig(adapters=("runs/train/adapter",)), Path("runs/evaluate"))  # doctest: +SKIP
    >>> report.differences["adapter"]["thinking"]["embedded"]  # doctest: +SKIP
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
    benchmarks = _benchmarks(config)
    unreadable = {benchmark.name: unreadable_golds(benchmark) for benchmark in benchmarks}
    with open_run(output, "evaluate", _identity(config, entrants, benchmarks), shard=config.shard) as folder:
        runs = draw_responses(config, entrants, benchmarks, folder)
        if not config.shard.whole:
            return None
        results = math_results(config, entrants, benchmarks, unreadable, folder)
        report = _report(config, runs, **{name: getattr(results, name) for name in results.__dataclass_fields__})
        _write(report, folder)
    return report


def _benchmarks(config: EvaluateConfig) -> list[Benchmark]:
    sources = config.data or (EMBEDDED,)
    instruction = "" if config.instruction is None and config.model == EMBEDDED else config.instruction
    return load_benchmarks(
        sources, samples=config.samples, split=config.split, instruction=instruction, limit=config.limit
    )


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
        identity |= {
            name: value for name, value in asdict(_sampling(config)).items() if name != "samples"
        }  # each benchmark has its own k
    return identity


def _content(config: EvaluateConfig, entrant: Contestant) -> str:
    if config.engine != "transformers":
        return entrant.source
    if entrant.adapter is not None:
        return content_identity(entrant.source, entrant.adapter, None)
    model = entrant.model or config.model
    return content_identity(model, model_source(model), None)


def _sampling(config: EvaluateConfig) -> SamplingOptions:
    return SamplingOptions(
        samples=1,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.tokens,
        seed=config.seed,
    )


def _report(config: EvaluateConfig, runs: dict[str, SampleReport], **results: Any) -> EvaluationReport:
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
        versions=versions(),
        **({"answer_files": {}, "reward": None, "notes": ()} | results),
    )


def _write(report: EvaluationReport, folder: Path) -> None:
    from bvpo_stats.plots.evaluate import evaluation_figures

    plain = report.to_dict()
    write_atomic(folder / "report.json", to_json(plain))
    figures = evaluation_figures(plain, folder / "figures")
    write_atomic(folder / "report.md", markdown(report, figures))
