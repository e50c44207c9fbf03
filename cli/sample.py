"""``bvpo-stats sample``: responses on record, from any engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from bvpo_stats.cli import options as o

from bvpo_stats.errors import UserError

if TYPE_CHECKING:
    from bvpo_stats.data.records import Mode

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
    base_url: Annotated[
        str | None, typer.Option(help="Address of the server, e.g. http://localhost:8000/v1 (openai engine).")
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable that holds the server's API key.", show_default="no key is sent"),
    ] = None,
    served_model: Annotated[
        str | None,
        typer.Option(help="The server's name for the model.", show_default="the one model that it lists"),
    ] = None,
    endpoint: Annotated[
        str, typer.Option(help="auto, completions or chat (chat only where it gives exact prompts).")
    ] = "auto",
    concurrency: Annotated[int, typer.Option(help="Requests to the server in flight at once.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer of the server.")] = 600.0,
    retries: Annotated[int, typer.Option(help="Repetitions of a failed request before the run gives up.")] = 6,
    samples_from: Annotated[
        Path | None, typer.Option(help="JSONL file of responses generated elsewhere (file engine).")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="Draw part i of n only, e.g. 1/4; the same --output holds all of them.")
    ] = "1/1",
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
    from bvpo_stats.data.engines.base import SamplingOptions
    from bvpo_stats.data.engines.server import ServerOptions
    from bvpo_stats.data.shards import parse_shard
    from bvpo_stats.studies.sample import SampleConfig, run_sample
    from bvpo_stats.studies.sample_output import print_summary

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
        modes=_modes(mode),
        prompts=prompts,
        split=split,
        limit=limit,
        batch_size=o.batch_size(batch_size),
        server=None
        if base_url is None
        else ServerOptions(
            base_url=base_url,
            api_key_env=api_key_env,
            served_model=served_model,
            endpoint=endpoint,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
        ),
        samples_from=samples_from,
        shard=parse_shard(shard),
        parquet=parquet,
    )
    print_summary(run_sample(settings, output), output)


def _modes(mode: str) -> tuple[Mode, ...]:
    from bvpo_stats.data.records import MODES

    if mode == "both":
        return MODES
    if mode not in MODES:
        raise UserError(f"--mode {mode}: choose thinking, nothinking or both.")
    return tuple(known for known in MODES if known == mode)
