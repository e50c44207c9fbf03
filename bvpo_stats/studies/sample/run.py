"""Sampling as a study: prompts in, responses on record, a summary of what was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bvpo_stats.model.policy import (
    Policy,
    PolicyOptions,
    ServedPolicy,
    content_identity,
    load_policy,
    load_served_policy,
    model_source,
)
from bvpo_stats.model.precision import offer_bfloat16
from bvpo_stats.records import UNKNOWN, Completion, Prompt
from bvpo_stats.sampling.prompts import PromptSurvey, begin_with, load_prompts, survey_prompts
from bvpo_stats.sampling.sample import (
    SAMPLES_FILE,
    SET_ASIDE_FILE,
    SamplingRun,
    SamplingTally,
    count_set_aside,
    first_set_aside,
    local_run,
    longest_prompt,
    sample_into,
    summarise,
)
from bvpo_stats.store.run_folder import grow, open_run, run_files
from bvpo_stats.store.tables import fingerprint, read_records, write_records
from bvpo_stats.studies.sample.config import SampleConfig
from bvpo_stats.studies.sample.report import SampleReport


def run_sample(config: SampleConfig, output: Path, loaded: Policy | None = None) -> SampleReport:
    """Runs (or resumes) a sampling run in a folder.

    It leaves ``samples.jsonl``, ``report.json`` and, if asked for, ``samples.parquet`` there. A shard's files carry its
    number: ``samples-00001-of-00004.jsonl`` and so on.

    Args:
        config: The settings.
        output: Folder of the run.
        loaded: The policy of the ``transformers`` engine, where the caller has it in memory already.

    Raises:
        UserError: Anything wrong with the input; see the message. What was drawn is kept, and the same call resumes.
    """
    if config.engine == "file":
        return _adopt(config, output)
    survey = survey_prompts(_prompts(config))
    if config.engine == "openai":
        run, identity = _server_run(config)
    elif config.engine == "vllm":
        run, identity = _vllm_run(config, survey)
    else:
        run, identity = _local_run(config, survey, loaded)
    identity |= {**survey.identity, **asdict(config.sampling)}
    with _open(config, output, identity, survey.identity) as folder:
        grow(folder, identity, survey.identity, lambda stored: begin_with(_prompts(config), stored))
        tally = sample_into(folder, _prompts(config), run, n_prompts=survey.count, shard=config.shard)
        dialect = getattr(run.engine, "dialect", None)
        return _finish(
            config,
            folder,
            SampleReport(
                engine=config.engine,
                model=run.model,
                template=run.template.name,
                prompts=survey.fingerprint,
                shard=f"{config.shard.index}/{config.shard.count}",
                sampling=config.sampling,
                dialect=dialect.name if dialect else None,
                **_on_record(config, folder, tally),
            ),
        )


def _prompts(config: SampleConfig) -> Iterator[Prompt]:
    return load_prompts(config.prompts, limit=config.limit, split=config.split, config_name=config.config_name)


def _open(
    config: SampleConfig, output: Path, identity: dict[str, Any], growing: Iterable[str] = ()
) -> AbstractContextManager[Path]:
    identity = {"engine": config.engine, "modes": list(config.modes), **identity}
    return open_run(output, "sample", identity, shard=config.shard, growing=growing)


def _local_run(config: SampleConfig, survey: PromptSurvey, loaded: Policy | None) -> tuple[SamplingRun, dict[str, Any]]:
    policy = loaded or load_policy(config.policy or PolicyOptions())
    offer_bfloat16(policy)
    run = local_run(policy, config.sampling, config.modes, survey.longest, config.batch_size)
    return run, {"model": policy.identity, "template": policy.template.name, "dtype": str(policy.model.dtype)}


def _server_run(config: SampleConfig) -> tuple[SamplingRun, dict[str, Any]]:
    from bvpo_stats.sampling.engines.openai_engine import OpenAIEngine

    assert config.policy is not None
    assert config.server is not None
    policy = load_served_policy(config.policy)
    engine = OpenAIEngine(policy, config.server, config.modes)
    run = SamplingRun(engine, policy.template, config.sampling, engine.model, config.server.concurrency, config.modes)
    return run, {"model": engine.model, **_language(config.policy, policy)}


def _vllm_run(config: SampleConfig, survey: PromptSurvey) -> tuple[SamplingRun, dict[str, Any]]:
    from bvpo_stats.sampling.engines.vllm_engine import VllmEngine

    assert config.policy is not None
    policy = load_served_policy(config.policy)
    prompts = longest_prompt(policy.template, survey.longest, config.modes)
    engine = VllmEngine(policy, config.policy, config.vllm, prompts + config.sampling.max_new_tokens)
    run = SamplingRun(engine, policy.template, config.sampling, engine.model, config.vllm.in_flight, config.modes)
    return run, {"model": engine.model, "template": policy.template.name, "dtype": config.policy.dtype}


def _language(options: PolicyOptions | None, policy: ServedPolicy | None) -> dict[str, Any]:
    """What renders prompts and turns texts into tokens, where no weights are loaded."""
    if options is None or policy is None:
        return {"template": None, "tokenizer": None}
    content = content_identity(options.model, model_source(options.model), None)
    return {"template": policy.template.name, "tokenizer": content}


def _adopt(config: SampleConfig, output: Path) -> SampleReport:
    from bvpo_stats.sampling.engines.file_engine import adopt_into

    assert config.samples_from is not None
    policy: ServedPolicy | None = load_served_policy(config.policy) if config.policy else None
    digest = fingerprint(config.samples_from, "samples_from")
    identity = {
        "samples_from": digest,
        **_language(config.policy, policy),
        "limit": config.limit,
    }
    with _open(config, output, identity) as folder:
        tally = adopt_into(folder, config.samples_from, policy, modes=config.modes, limit=config.limit)
        first = next(read_records(folder, Completion))
        return _finish(
            config,
            folder,
            SampleReport(
                engine="file",
                model=first.model or UNKNOWN,
                template=first.template or UNKNOWN,
                prompts=digest,
                shard="1/1",
                sampling=None,
                dialect=None,
                **_on_record(config, folder, tally),
            ),
        )


def _on_record(config: SampleConfig, folder: Path, tally: SamplingTally) -> dict[str, Any]:
    samples, aside = _files(config, folder, SAMPLES_FILE), _files(config, folder, SET_ASIDE_FILE)
    return {
        "modes": summarise(completion for path in samples for completion in read_records(path, Completion)),
        "set_aside": count_set_aside(aside),
        "set_aside_first": first_set_aside(aside),
        "tally": tally,
        "tokens_per_second": tally.tokens / tally.seconds if tally.tokens and tally.seconds > 0 else None,
    }


def _files(config: SampleConfig, folder: Path, name: str) -> list[Path]:
    """A shard reports on its own file; the whole run on everything in the folder."""
    if config.shard.whole:
        return run_files(folder, name)
    path = config.shard.file(folder, name)
    return [path] if path.exists() else []


def _finish(config: SampleConfig, folder: Path, report: SampleReport) -> SampleReport:
    if config.parquet:
        paths = _files(config, folder, SAMPLES_FILE)
        rows = (completion for path in paths for completion in read_records(path, Completion))
        write_records(config.shard.file(folder, "samples.parquet"), rows, Completion)
    report.write(folder)
    return report
