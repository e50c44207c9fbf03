"""The variance study: sample in both modes, score with the policy, tabulate (Appendix B of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, load_policy, load_template
from bvpo_stats.model.precision import offer_bfloat16
from bvpo_stats.records import MODES, UNKNOWN, Completion, Prompt, Truncation
from bvpo_stats.sampling.engines.base import SamplingOptions
from bvpo_stats.sampling.engines.file_engine import Unusable, adopt_completions
from bvpo_stats.sampling.prompts import begin_with, load_prompts, survey_prompts
from bvpo_stats.sampling.sample import (
    SAMPLES_FILE,
    check_one_source,
    local_run,
    sample_into,
)
from bvpo_stats.sampling.scoring import LOGPROBS_FILE, read_logprobs, score_into
from bvpo_stats.store.run_folder import grow, open_run
from bvpo_stats.store.tables import fingerprint, read_records
from bvpo_stats.studies.published import APPENDIX_B, published_name
from bvpo_stats.studies.variance.config import VarianceConfig
from bvpo_stats.studies.variance.report import (
    PositionProfile,
    ScoredSample,
    VarianceReport,
    histogram,
    reduce_sample,
    variance_tables,
)


def run_variance(config: VarianceConfig, output: Path) -> VarianceReport:
    """Runs (or resumes) a variance study in a folder and writes its report and figures.

    Raises:
        UserError: Anything wrong with the input; see the message.
    """
    if config.samples_from is None and config.samples < 2:
        raise UserError(f"`samples={config.samples}`: a variance needs at least 2 responses per prompt (the paper: 5).")
    report = _from_elsewhere(config, output) if config.samples_from else _from_policy(config, output)
    return report


def _from_policy(config: VarianceConfig, output: Path) -> VarianceReport:
    prompts = list(load_prompts(config.prompts, limit=config.limit, split=config.split, config_name=config.config_name))
    policy = load_policy(config.policy)
    offer_bfloat16(policy)
    survey = survey_prompts(prompts)
    identity = {
        "model": policy.identity,
        "template": policy.template.name,
        "dtype": str(policy.model.dtype),
        **survey.identity,
        **asdict(config.sampling),
    }
    with open_run(output, "variance", identity, growing=survey.identity) as folder:
        grow(folder, identity, survey.identity, lambda stored: begin_with(prompts, stored))
        samples_path = folder / SAMPLES_FILE
        sample_both_modes(policy, prompts, config.sampling, samples_path, config.batch_size)
        order = {prompt.prompt_id: place for place, prompt in enumerate(prompts)}
        completions = sorted(
            read_records(samples_path, Completion),
            key=lambda c: (order[c.prompt_id], MODES.index(c.mode), c.sample_index),
        )
        score_into(folder / LOGPROBS_FILE, completions, policy)
        report = _analyse(config, completions, folder / LOGPROBS_FILE, policy.identity)
        report.write(folder)
    return report


def sample_both_modes(
    policy: Policy, prompts: list[Prompt], sampling: SamplingOptions, path: Path, batch_size: int | None = None
) -> None:
    """Draws responses with and without a trace, as far as the file does not hold them yet.

    Args:
        policy: The model.
        prompts: The questions.
        sampling: How to draw.
        path: ``samples.jsonl`` of the run's folder.
        batch_size: Responses drawn at once, None for automatic.
    """
    run = local_run(policy, sampling, MODES, [prompt.question for prompt in prompts], batch_size)
    sample_into(path.parent, prompts, run, n_prompts=len(prompts))


def _from_elsewhere(config: VarianceConfig, output: Path) -> VarianceReport:
    path = config.samples_from
    assert path is not None
    if not path.is_file():
        raise UserError(f"`samples_from={str(path)!r}`: no such file. Give a samples.jsonl.")
    try:
        completions = _usable(adopt_completions(path, None))
    except UserError:  # the template is needed to tokenise, or to find where the traces end
        completions = _usable(adopt_completions(path, load_template(config.policy)))
    policy: Policy | None = None
    if config.limit is not None:
        kept = set(list(dict.fromkeys(c.prompt_id for c in completions))[: config.limit])
        completions = [c for c in completions if c.prompt_id in kept]
    if not completions:
        raise UserError(f"`samples_from={str(path)!r}`: no responses in the file.")
    check_one_source(completions)
    completions.sort(key=lambda c: (c.prompt_id, MODES.index(c.mode), c.sample_index))
    unscored = [c for c in completions if c.logprobs is None]
    if unscored:
        vocabulary = load_template(config.policy).vocabulary
        for completion in unscored:
            vocabulary.checked(completion, f"{path}: response {completion.key}")
        policy = load_policy(config.policy)
    digest = fingerprint(path)
    identity = {
        "samples_from": digest,
        "limit": config.limit,
        "template": policy.template.name if policy else None,
        "scored_by": policy.identity if policy else None,
        "dtype": str(policy.model.dtype) if policy else None,
    }
    with open_run(output, "variance", identity) as folder:
        if unscored and policy is not None:
            score_into(folder / LOGPROBS_FILE, unscored, policy)
        model = policy.identity if unscored and policy is not None else completions[0].model or UNKNOWN
        report = _analyse(config, completions, folder / LOGPROBS_FILE, model)
        report.write(folder)
    return report


def _usable(responses: Iterable[Completion | Unusable]) -> list[Completion]:
    found = []
    for response in responses:
        if isinstance(response, Unusable):
            raise UserError(
                f"{response.where}: {response.outcome.detail}. `engine='file'` of `sample` sets such responses "
                "aside: give the samples.jsonl that it writes."
            )
        found.append(response)
    return found


def _scored(completions: list[Completion], logprobs_path: Path, profile: PositionProfile) -> Iterator[ScoredSample]:
    known = dict(read_logprobs(logprobs_path)) if logprobs_path.exists() else {}
    for completion in completions:
        values = np.asarray(completion.logprobs if completion.logprobs is not None else known[completion.key])
        sample = reduce_sample(completion, values)
        if completion.complete:
            start = completion.answer_start or 0
            if completion.mode == "thinking":
                profile.add(completion.prompt_id, "trace", values[:start])
                profile.add(completion.prompt_id, "answer", values[start:])
            else:
                profile.add(completion.prompt_id, "no-trace answer", values)
        yield sample


def _analyse(config: VarianceConfig, completions: list[Completion], logprobs_path: Path, model: str) -> VarianceReport:
    profile = PositionProfile()
    samples = list(_scored(completions, logprobs_path, profile))
    lost = Truncation.by_mode(completions)
    try:
        tables = variance_tables(samples, config.definitions)
    except UserError as error:
        here = not config.samples_from
        causes = (caution for mode, found in lost.items() for caution in found.cautions(mode, drawn_here=here))
        raise UserError(" ".join((str(error), *causes))) from error
    name = published_name(config.policy.model)
    return VarianceReport(
        model=model,
        seed=None if config.samples_from else config.sampling.seed,
        **vars(tables),
        definitions=config.definitions,
        sampling=None if config.samples_from else config.sampling,
        template=completions[0].template or UNKNOWN,
        published={"model": name, **APPENDIX_B[name]} if name else None,
        lengths=histogram(samples, "length"),
        logps=histogram(samples, "logp"),
        positions=profile.bins(config.definitions.level),
        lost=lost,
    )
