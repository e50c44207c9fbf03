"""``bvpo-stats evaluate``: the paper's evaluation protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from bvpo_stats.cli import options as o

from bvpo_stats.errors import UserError

if TYPE_CHECKING:
    from bvpo_stats.studies.evaluate.config import JudgeOptions

EXAMPLES = """Examples:

bvpo-stats evaluate

bvpo-stats evaluate --adapter runs/train/adapter --adapter half=runs/half/adapter --output runs/compared

bvpo-stats evaluate --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --adapter runs/bvpo --data paper

bvpo-stats evaluate --model MODEL --data problems.jsonl --samples 8 --mode thinking

bvpo-stats evaluate --task alpaca-eval --model MODEL --adapter runs/bvpo --judge reward --reward model:REWARD-MODEL
--baseline gpt4_turbo.json

bvpo-stats evaluate --engine openai --base-url http://localhost:8000/v1 --model MODEL --data aime24 --data aime25"""


def evaluate(
    context: typer.Context,
    task: Annotated[str, typer.Option(help="math, alpaca-eval or arena-hard.")] = "math",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Problems: embedded, aime24, aime25, amc, math-500, minerva, olympiadbench, paper (these six), or a "
            "file or dataset with the fields `problem` and `answer`. Repeatable. Alignment: a file or dataset of "
            "prompts (`instruction`, `prompt`).",
            show_default="embedded; alignment: the benchmark's own prompts",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset given as --data.", show_default="test")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub id; for a server, the model that it serves.", show_default="embedded"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="PEFT adapter (or a fully fine-tuned model) to compare with the model: folder or hub id, NAME=PATH to "
            "name it; for a server, its name there. Repeatable."
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="thinking, nothinking or both.")] = "both",
    samples: Annotated[
        int | None,
        typer.Option(help="k, responses per problem and mode.", show_default="32 for AIME and AMC, 8 embedded, else 1"),
    ] = None,
    temperature: o.Temperature = 0.6,
    top_p: o.TopP = 1.0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Cut responses at this many tokens.",
            show_default="32768 math, 8192 alignment, 256 for the embedded model",
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="Put under each problem; '' for nothing.",
            show_default="to reason step by step and answer in a box; nothing for the embedded model",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Judge alignment answers here: `reward` compares rewards with --baseline.",
            show_default="the benchmark's own tools judge the answer files",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="For --judge reward: model:PATH, embedded, file:SCORES.jsonl or module:function."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="For --judge reward: answers to beat, in AlpacaEval's or Arena-Hard's form."),
    ] = None,
    level: Annotated[float, typer.Option(help="Confidence level of the intervals.")] = 0.95,
    engine: Annotated[str, typer.Option(help="transformers, openai (any compatible server) or file.")] = "transformers",
    base_url: o.BaseUrl = None,
    api_key_env: o.ApiKeyEnv = None,
    served_model: o.ServedModel = None,
    endpoint: o.Endpoint = "auto",
    concurrency: o.Concurrency = 16,
    timeout: o.Timeout = 600.0,
    retries: o.Retries = 6,
    samples_from: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL file of responses generated elsewhere (file engine); further ones are compared."),
    ] = None,
    shard: o.ShardOption = "1/1",
    batch_size: o.BatchSize = "auto",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    template: o.Template = None,
    empty_trace: o.EmptyTrace = None,
    trust_remote_code: o.TrustRemoteCode = False,
    limit: o.Limit = None,
    output: o.Output = Path("runs/evaluate"),
    config: o.Config = None,
) -> None:
    """Evaluate a model, and adapters beside it, as the paper does: with and without a trace, intervals by problem.

    Run again after an interruption, it goes on where it stopped.
    """
    from bvpo_stats.store.run_folder import parse_shard
    from bvpo_stats.studies.evaluate.run import EvaluateConfig
    from bvpo_stats.studies.evaluate.run import evaluate as run

    base = replace(o.policy_options(context), adapter=None)  # here --adapter lists those to compare
    if engine == "openai" and model is None:
        raise UserError("--engine openai needs --model: the model that the server serves, for its tokenizer.")
    settings = EvaluateConfig(
        policy=base if model is not None or engine != "file" else None,
        adapters=tuple(adapter or ()),
        task=task,  # type: ignore[arg-type]
        data=tuple(data or ()),
        split=split,
        instruction=instruction,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        modes=o.modes(mode),
        limit=limit,
        level=level,
        engine=engine,
        server=o.server_options(context),
        samples_from=tuple(samples_from or ()),
        batch_size=o.batch_size(batch_size),
        shard=parse_shard(shard),
        judge=_judge(judge, reward, baseline),
    )
    report = run(settings, output)
    if report is None:
        print(f"Shard {shard} is drawn. When all are, the same command without --shard reports.")
    else:
        report.print(output)


def _judge(judge: str | None, reward: str | None, baseline: Path | None) -> JudgeOptions | None:
    from bvpo_stats.studies.evaluate.config import JudgeOptions

    if judge is None:
        if reward is not None or baseline is not None:
            raise UserError("--reward and --baseline are for --judge reward; add it.")
        return None
    if judge != "reward":
        raise UserError(f"--judge {judge}: unknown. Choose reward, or leave it out: then the answer files are all.")
    if reward is None or baseline is None:
        raise UserError("--judge reward needs --reward (who scores) and --baseline (the answers to beat).")
    return JudgeOptions(reward, baseline)
