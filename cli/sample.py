"""``bvpo-stats sample``: responses on record, from any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from bvpo_stats.cli import options as o

from bvpo_stats.errors import UserError

EXAMPLES = """Examples:

bvpo-stats sample --output runs/samples

bvpo-stats sample --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --prompts questions.jsonl --shard 1/4

bvpo-stats sample --engine openai --base-url http://localhost:8000/v1 --model Qwen/Qwen3-4B --prompts questions.jsonl

bvpo-stats sample --engine file --samples-from responses.jsonl --output runs/elsewhere"""


def sample(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub id; for a server, the model that it serves.", show_default="embedded"),
    ] = None,
    prompts: o.Prompts = "embedded",
    split: o.PromptSplit = "train",
    samples: o.Samples = 5,
    temperature: o.Temperature = 0.8,
    top_p: o.TopP = 1.0,
    max_new_tokens: o.MaxNewTokens = None,
    mode: Annotated[str, typer.Option(help="thinking, nothinking or both.")] = "both",
    engine: Annotated[str, typer.Option(help="transformers, openai (any compatible server) or file.")] = "transformers",
    base_url: o.BaseUrl = None,
    api_key_env: o.ApiKeyEnv = None,
    served_model: o.ServedModel = None,
    endpoint: o.Endpoint = "auto",
    concurrency: o.Concurrency = 16,
    timeout: o.Timeout = 600.0,
    retries: o.Retries = 6,
    samples_from: Annotated[
        Path | None, typer.Option(help="JSONL file of responses generated elsewhere (file engine).")
    ] = None,
    shard: o.ShardOption = "1/1",
    parquet: Annotated[bool, typer.Option("--parquet", help="Write the responses as Parquet, too.")] = False,
    batch_size: o.BatchSize = "auto",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    adapter: o.Adapter = None,
    template: o.Template = None,
    empty_trace: o.EmptyTrace = None,
    trust_remote_code: o.TrustRemoteCode = False,
    limit: o.Limit = None,
    output: o.Output = Path("runs/samples"),
    config: o.Config = None,
) -> None:
    """Draw responses in Thinking and NoThinking mode; run again after an interruption, it goes on where it stopped."""
    from bvpo_stats.sampling.engines.base import SamplingOptions
    from bvpo_stats.store.shards import parse_shard
    from bvpo_stats.studies.sample.run import SampleConfig, run_sample

    if engine == "file" and prompts != "embedded":
        raise UserError("--engine file takes its prompts from the responses; leave out --prompts.")
    named = o.policy_options(context)
    settings = SampleConfig(
        policy=named if model is not None or engine == "transformers" else None,
        sampling=SamplingOptions(
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=o.max_new_tokens(max_new_tokens, named.model),
            seed=seed,
        ),
        engine=engine,
        modes=o.modes(mode),
        prompts=prompts,
        split=split,
        limit=limit,
        batch_size=o.batch_size(batch_size),
        server=o.server_options(context),
        samples_from=samples_from,
        shard=parse_shard(shard),
        parquet=parquet,
    )
    run_sample(settings, output).print(output)
