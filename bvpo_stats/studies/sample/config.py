"""Settings of a sampling run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from bvpo_stats import options as o
from bvpo_stats.errors import UserError
from bvpo_stats.model.options import EMBEDDED, PolicyOptions
from bvpo_stats.records import MODES
from bvpo_stats.sampling.engines.base import SamplingOptions, ServerOptions, VllmOptions
from bvpo_stats.store.run_folder import WHOLE, Shard, parse_shard

EngineName = Literal["transformers", "vllm", "openai", "file"]
ServedPolicy = Annotated[
    PolicyOptions | None,
    o.Group({"model": o.Option("Model folder or hub id; for a server, the model that it serves.", shown="embedded")}),
]
ShardOption = Annotated[
    Shard,
    o.Option("Draw part i of n only, e.g. 1/4; the same `output` holds all of them.", read=parse_shard, spelled="1/1"),
]


@dataclass(frozen=True)
class SampleConfig:
    """Settings of a sampling run.

    Attributes:
        policy: Which model; for ``openai`` its tokenizer, for ``file`` needed only where token ids are missing (else
            None).
        prompts: Source of the prompts.
        split: Split, where the prompts are a dataset.
        config_name: Configuration, where the dataset has several.
        samples: Responses per prompt and mode.
        temperature: Softmax temperature of the draw.
        top_p: Nucleus mass; 1 samples the whole distribution.
        max_new_tokens: Cut-off in tokens; None for 256 with the embedded model, else 4096.
        modes: Which of Thinking and NoThinking.
        engine: ``transformers``, ``vllm``, ``openai`` or ``file``.
        server: The servers of the ``openai`` engine.
        vllm: How the ``vllm`` engine is run.
        samples_from: The file of the ``file`` engine.
        shard: Which part of the run this process does.
        parquet: Whether to write the completions as Parquet, too.
        batch_size: Responses drawn at once (``transformers``), None for automatic.
        seed: Decides every draw.
        limit: Use only the first so many prompts.
    """

    policy: ServedPolicy = field(default_factory=PolicyOptions)
    prompts: o.Prompts = EMBEDDED
    split: o.PromptSplit = "train"
    config_name: o.ConfigName = None
    samples: o.Samples = 5
    temperature: o.Temperature = 0.8
    top_p: o.TopP = 1.0
    max_new_tokens: o.MaxNewTokens = None
    modes: o.Modes = MODES
    engine: Annotated[
        EngineName, o.Option("transformers, vllm (in this process), openai (any compatible server) or file.")
    ] = "transformers"
    server: ServerOptions | None = None
    vllm: VllmOptions = field(default_factory=VllmOptions)
    samples_from: Annotated[Path | None, o.Option("JSONL file of responses generated elsewhere (file engine).")] = None
    shard: ShardOption = WHOLE
    parquet: Annotated[bool, o.Option("Write the responses as Parquet, too.")] = False
    batch_size: o.BatchSize = None
    seed: o.Seed = 0
    limit: o.Limit = None

    def __post_init__(self) -> None:
        o.check_options(self)
        if self.engine == "openai":
            self._check_openai()
        elif self.server is not None:
            raise UserError("`base_url` is for `engine='openai'`.")
        if self.engine == "vllm":
            if self.policy is None:
                raise UserError("`engine='vllm'` needs `model`: the model that vLLM loads.")
            if self.policy.adapter is not None:
                raise UserError("`adapter` is not loaded by `engine='vllm'`. Merge it into the model, or serve both.")
        elif self.vllm != VllmOptions():
            raise UserError("`tensor_parallel` and `gpu_memory` are for `engine='vllm'`.")
        if self.engine == "file":
            if self.samples_from is None:
                raise UserError("`engine='file'` needs the responses: `samples_from`.")
            if not self.shard.whole:
                raise UserError("`engine='file'` has nothing to share out; leave out `shard`.")
            if self.prompts != EMBEDDED:
                raise UserError("`engine='file'` takes its prompts from the responses; leave out `prompts`.")
        elif self.samples_from is not None:
            raise UserError("`samples_from` is for `engine='file'`.")

    def _check_openai(self) -> None:
        if self.server is None:
            raise UserError("`engine='openai'` needs a server: `base_url`, e.g. http://localhost:8000/v1.")
        if self.policy is None:
            raise UserError("`engine='openai'` needs `model`: the model that the server serves, for its tokenizer.")
        if self.policy.adapter is not None:
            raise UserError("`adapter` cannot be put on a served model. Let the server load it.")

    @property
    def sampling(self) -> SamplingOptions:
        """How responses are drawn."""
        tokens = o.max_new_tokens(self.max_new_tokens, EMBEDDED if self.policy is None else self.policy.model)
        return SamplingOptions(self.samples, self.temperature, self.top_p, tokens, self.seed)
