"""The responses of every model of an evaluation to every benchmark: one ordinary sampling run for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from bvpo_stats.embedded.assets import EMBEDDED
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy, model_source, with_adapter
from bvpo_stats.progress import say
from bvpo_stats.store.jsonl import encode_row, write_atomic
from bvpo_stats.store.sample_index import SampleIndex, open_sample_index
from bvpo_stats.studies.evaluate.benchmarks import Benchmark, prompt_rows
from bvpo_stats.studies.evaluate.config import Contestant, EvaluateConfig
from bvpo_stats.studies.sample.config import SampleConfig
from bvpo_stats.studies.sample.report import SampleReport
from bvpo_stats.studies.sample.run import run_sample

Draw = Callable[[Contestant, Policy | None], None]


def draw_responses(
    config: EvaluateConfig, entrants: Sequence[Contestant], benchmarks: Sequence[Benchmark], folder: Path
) -> dict[str, SampleReport]:
    """Draws (or completes) all responses, model by model; each lands in a folder of its own, see :func:`run_of`.

    The base model is loaded once and its adapters are put on it in turn. All of them are tried on before the first
    response is drawn, so that one that does not fit is found at once.

    Returns:
        The report of each model's last sampling run, by label.

    Raises:
        UserError: Anything wrong with a model or its responses. What was drawn is kept.
    """
    reports: dict[str, SampleReport] = {}
    if folder.exists():
        count = sum(len(b.problems) * b.samples for b in benchmarks) * len(config.modes)
        say(
            f"Evaluation: {len(entrants)} models, {len(benchmarks)} benchmarks: {len(entrants) * count:,} responses of "
            f"at most {config.tokens:,} tokens, those of earlier runs included."
        )
    problems = {benchmark.name: _problems_file(benchmark, config, folder) for benchmark in benchmarks}

    def draw(entrant: Contestant, policy: Policy | None) -> None:
        for benchmark in benchmarks:
            settings = _settings(config, entrant, benchmark, problems[benchmark.name])
            target = run_of(folder, entrant, benchmark)
            target.parent.mkdir(parents=True, exist_ok=True)
            reports[entrant.label] = run_sample(settings, target, policy)

    if config.engine == "transformers":
        assert config.policy is not None
        _with_policies(config.policy, entrants, draw)
    else:
        if config.server is not None:
            from bvpo_stats.sampling.engines.openai_engine import check_served

            check_served(config.server, [e.served_model for e in entrants if e.served_model is not None])
        for entrant in entrants:
            draw(entrant, None)
    return reports


def run_of(folder: Path, entrant: Contestant, benchmark: Benchmark) -> Path:
    """Folder of the sampling run of one model on one benchmark."""
    return folder / "samples" / entrant.label / benchmark.name


@contextmanager
def open_responses(
    config: EvaluateConfig, folder: Path, entrant: Contestant, benchmark: Benchmark
) -> Iterator[SampleIndex]:
    """The responses of one model to one benchmark, by prompt."""
    database = folder / ".responses.sqlite"
    with open_sample_index(run_of(folder, entrant, benchmark), database, config.modes) as index:
        yield index


def _with_policies(options: PolicyOptions, entrants: Sequence[Contestant], draw: Draw) -> None:
    adapters = [entrant for entrant in entrants if entrant.adapter is not None]
    others = [entrant for entrant in entrants if entrant.model is not None]
    for entrant in others:
        model_source(entrant.model or "")
    base: Policy | None = load_policy(options)
    assert base is not None
    for entrant in adapters:
        with with_adapter(base, entrant.adapter or ""):
            pass
    for entrant in entrants:
        if entrant.model is None:
            with ExitStack() as stack:
                adapter = entrant.adapter
                draw(entrant, base if adapter is None else stack.enter_context(with_adapter(base, adapter)))
    base = None  # a fully fine-tuned model needs its room
    for entrant in others:
        draw(entrant, load_policy(replace(options, model=entrant.model or "")))


def _problems_file(benchmark: Benchmark, config: EvaluateConfig, folder: Path) -> Path:
    path = config.shard.file(folder / "problems", f"{benchmark.name}.jsonl")
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, "".join(encode_row(row) + "\n" for row in prompt_rows(benchmark.problems)))
    return path


def _settings(config: EvaluateConfig, entrant: Contestant, benchmark: Benchmark, problems: Path) -> SampleConfig:
    server = config.server
    if server is not None and entrant.served_model is not None:
        server = replace(server, served_model=entrant.served_model)
    return SampleConfig(
        policy=config.policy,
        samples=benchmark.samples,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.tokens,
        seed=config.seed,
        engine=config.engine,
        modes=config.modes,
        prompts=EMBEDDED if config.engine == "file" else str(problems),
        batch_size=config.batch_size,
        server=server,
        samples_from=entrant.samples_from,
        shard=config.shard,
    )


def check_all_answered(index: SampleIndex, benchmark: Benchmark, entrant: Contestant) -> None:
    """Raises UserError where the responses are to other problems than the benchmark's."""
    known = {problem.prompt_id for problem in benchmark.problems}
    if not any(prompt_id in known for prompt_id in index.prompt_ids()):
        raise UserError(
            f"{entrant.source}: no answers to the problems of {benchmark.name}. The field `prompt_id` of a response "
            f"must be the problem's id, e.g. {benchmark.problems[0].prompt_id}."
        )
