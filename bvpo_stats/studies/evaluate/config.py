"""Settings of an evaluation, and who takes part in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from bvpo_stats import options as o
from bvpo_stats.errors import UserError
from bvpo_stats.model.options import EMBEDDED, PolicyOptions
from bvpo_stats.records import MODES
from bvpo_stats.sampling.engines.base import ServerOptions
from bvpo_stats.store.run_folder import WHOLE
from bvpo_stats.studies.sample.config import ShardOption
from bvpo_stats.studies.train.config import MODEL

Task = Literal["math", "alpaca-eval", "arena-hard"]
BASE = "base"
"""Label of the model that the others are compared with."""

_BasePolicy = Annotated[
    PolicyOptions | None,
    o.Group(
        {
            "model": o.Option("Model folder or hub id; for a server, the model that it serves.", shown="embedded"),
            "adapter": None,  # `adapters` lists those to compare
        }
    ),
]

# Appendix C.2: 32,768 tokens for mathematics, 8,192 for the alignment benchmarks.
_MAX_NEW_TOKENS: dict[Task, int] = {"math": 32_768, "alpaca-eval": 8_192, "arena-hard": 8_192}
_EMBEDDED_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation; the defaults are the paper's protocol on the embedded model and task.

    Attributes:
        policy: The base model; for ``openai`` its tokenizer, for ``file`` needed only where token ids are missing.
        adapters: Adapters (or fully fine-tuned models) to compare with it: folders or hub ids, ``NAME=PATH`` to name
            one; for ``openai``, the server's names of them.
        task: ``math``, ``alpaca-eval`` or ``arena-hard``.
        data: Problems or instructions; empty for the task's own.
        split: Split of a dataset.
        config_name: Configuration of a dataset that has several.
        instruction: Added to each problem; None for the usual one.
        samples: k, responses per problem and mode; None for the benchmark's own.
        temperature: Sampling temperature (Section 5.1: 0.6).
        top_p: Nucleus mass; 1 is off.
        max_new_tokens: Cut-off; None for the task's own.
        seed: Decides every draw.
        modes: Which of Thinking and NoThinking.
        limit: Only the first so many problems of each benchmark.
        level: Confidence level.
        engine: ``transformers``, ``openai`` or ``file``.
        server: The server of the ``openai`` engine.
        samples_from: The files of the ``file`` engine; the first is the base, the others are compared with it.
        batch_size: Responses drawn at once, None for automatic.
        shard: Which part of the sampling this process does.
        judge: ``reward`` judges the answers of the alignment tasks; None leaves that to the benchmarks' own tools.
        reward: What scores them, see :func:`~bvpo_stats.sampling.rewards.load_reward`.
        baseline: File of the answers to beat: AlpacaEval's or Arena-Hard's format.
    """

    policy: _BasePolicy = field(default_factory=PolicyOptions)
    adapters: Annotated[
        tuple[str, ...],
        o.Option(
            "PEFT adapter (or a fully fine-tuned model) to compare with the model: folder or hub id, NAME=PATH to name "
            "it; for a server, its name there. Repeatable.",
            name="adapter",
            shown="without `model`: the last one trained on the embedded model, beside `output`",
        ),
    ] = ()
    task: Annotated[Task, o.Option("math, alpaca-eval or arena-hard.")] = "math"
    data: Annotated[
        tuple[str, ...],
        o.Option(
            "Problems: embedded, aime24, aime25, amc, math-500, minerva, olympiadbench, paper (these six), or a file "
            "or dataset with the fields `problem` and `answer`. Repeatable. Alignment: a file or dataset of prompts "
            '("instruction", "prompt").',
            shown="embedded; alignment: the benchmark's own prompts",
        ),
    ] = ()
    split: Annotated[str | None, o.Option("Split of a dataset given as `data`.", shown="test")] = None
    config_name: o.ConfigName = None
    instruction: Annotated[
        str | None,
        o.Option(
            "Put under each problem; '' for nothing.",
            blank=True,
            shown="to reason step by step and answer in a box; nothing for the embedded model",
        ),
    ] = None
    samples: Annotated[
        int | None,
        o.Option(
            "k, responses per problem and mode.",
            low=1,
            high=10**6,
            shown="32 for AIME and AMC, 8 embedded, else 1",
        ),
    ] = None
    temperature: o.Temperature = 0.6
    top_p: o.TopP = 1.0
    max_new_tokens: Annotated[
        int | None,
        o.Option(
            "Cut responses at this many tokens.",
            low=1,
            high=10**8,
            shown="32768 math, 8192 alignment, 256 for the embedded model",
        ),
    ] = None
    seed: o.Seed = 0
    modes: o.Modes = MODES
    limit: o.Limit = None
    level: o.Level = 0.95
    engine: Annotated[
        Literal["transformers", "openai", "file"], o.Option("transformers, openai (any compatible server) or file.")
    ] = "transformers"
    server: ServerOptions | None = None
    samples_from: Annotated[
        tuple[Path, ...],
        o.Option("JSONL file of responses generated elsewhere (file engine); further ones are compared."),
    ] = ()
    batch_size: o.BatchSize = None
    shard: ShardOption = WHOLE
    judge: Annotated[
        Literal["reward"] | None,
        o.Option(
            "Judge alignment answers here: reward compares rewards with `baseline`.",
            shown="the benchmark's own tools judge the answer files",
        ),
    ] = None
    reward: Annotated[
        str | None,
        o.Option("For `judge='reward'`: model:PATH, embedded, embedded-judge, file:SCORES.jsonl or module:function."),
    ] = None
    baseline: Annotated[
        Path | None,
        o.Option("For `judge='reward'`: answers to beat, in AlpacaEval's or Arena-Hard's form."),
    ] = None

    def __post_init__(self) -> None:
        o.check_options(self)
        if self.judge is None:
            if self.reward is not None or self.baseline is not None:
                raise UserError("`reward` and `baseline` are for `judge='reward'`; add it.")
        elif self.reward is None or self.baseline is None:
            raise UserError("`judge='reward'` needs `reward` (who scores) and `baseline` (the answers to beat).")
        if self.policy is None and self.engine != "file":
            raise UserError(f"`engine={self.engine!r}` needs `model`: whose answers, or whose tokenizer.")
        if self.policy is not None and self.policy.adapter is not None:
            raise UserError("The base of an evaluation is a model without an adapter; list adapters as `adapters`.")
        if self.engine == "file":
            self._check_files()
        elif self.samples_from:
            raise UserError("`samples_from` is for `engine='file'`.")
        if self.task == "math":
            if self.judge is not None:
                raise UserError("`judge` is for alpaca-eval and arena-hard; math answers are checked, not judged.")
        elif self.samples not in (None, 1):
            raise UserError(f"`samples={self.samples}`: {self.task} reads one answer per prompt; leave it out.")

    def _check_files(self) -> None:
        if not self.samples_from:
            raise UserError("`engine='file'` needs the responses: `samples_from`.")
        if self.adapters:
            raise UserError("`engine='file'` loads no adapters; give their responses as further `samples_from`.")

    @property
    def model(self) -> str:
        """Name of the base model as it was asked for."""
        if self.engine == "file":
            return str(self.samples_from[0])
        assert self.policy is not None
        return self.policy.model

    @property
    def tokens(self) -> int:
        """The cut-off: as asked for, else the task's own (256 for the embedded model's short responses)."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return _EMBEDDED_MAX_NEW_TOKENS if self.model == EMBEDDED else _MAX_NEW_TOKENS[self.task]


@dataclass(frozen=True)
class Contestant:
    """One model of an evaluation.

    Attributes:
        label: ``base``, or the name of an adapter.
        source: What was asked for, for the records.
        adapter: Adapter on top of the base model.
        model: Another model in the base model's place (a fully fine-tuned one).
        served_model: The server's name for it.
        samples_from: File of its responses.
    """

    label: str
    source: str
    adapter: str | None = None
    model: str | None = None
    served_model: str | None = None
    samples_from: Path | None = None


def contestants(config: EvaluateConfig) -> list[Contestant]:
    """The base model and those compared with it, in that order.

    Raises:
        UserError: A folder that holds neither an adapter nor a model, or a name used twice.
    """
    if config.engine == "file":
        found = [Contestant(path.stem, str(path), samples_from=path) for path in config.samples_from]
        found[0] = replace(found[0], label=BASE)
    else:
        served = config.server.served_model if config.server else None
        found = [Contestant(BASE, config.model, served_model=served)]
        found += [_contestant(*_split_name(entry), engine=config.engine) for entry in config.adapters]
    return _distinct_labels(found)


def _split_name(entry: str) -> tuple[str | None, str]:
    name, equals, path = entry.partition("=")
    return (name, path) if equals and "/" not in name else (None, entry)


def _contestant(name: str | None, source: str, *, engine: str) -> Contestant:
    if engine == "openai":
        return Contestant(name or source, source, served_model=source)
    folder = Path(source).expanduser()
    # what train writes is RUN/model: the run's name says which
    label = name or (folder.absolute().parent.name if folder.name == MODEL else folder.name)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            return Contestant(label, source, adapter=str(folder))
        if (folder / "config.json").is_file():
            return Contestant(label, source, model=str(folder))
        raise UserError(f"`adapters={source!r}`: the folder holds neither an adapter_config.json nor a config.json.")
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"`adapters={source!r}`: no such folder. Give the folder or the hub id of an adapter.")
    return Contestant(label, source, adapter=source)


def _distinct_labels(found: Sequence[Contestant]) -> list[Contestant]:
    """Labels name folders: anything unusual is replaced, and a label met before is lengthened by the parent folder."""
    result: list[Contestant] = []
    for contestant in found:
        label = _tidy(contestant.label)
        taken = {other.label for other in result}
        if label in taken:
            label = f"{_tidy(Path(contestant.source).expanduser().resolve().parent.name)}-{label}"
        if label in taken:
            raise UserError(f"Two models are called {label}. Name one of them: `adapters='NAME={contestant.source}'`.")
        result.append(replace(contestant, label=label))
    return result


def _tidy(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", label).strip("-.") or "model"
