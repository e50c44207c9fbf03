"""``bvpo-stats variance``: Appendix B's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from bvpo_stats.cli import options as o

EXAMPLES = """Examples:

bvpo-stats variance

bvpo-stats variance --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --prompts questions.jsonl --output runs/r1

bvpo-stats variance --samples-from samples.jsonl --output runs/elsewhere"""


def variance(
    context: typer.Context,
    model: o.Model = "embedded",
    prompts: o.Prompts = "embedded",
    split: o.PromptSplit = "train",
    samples: o.Samples = 5,
    temperature: o.Temperature = 0.8,
    top_p: o.TopP = 1.0,
    max_new_tokens: o.MaxNewTokens = None,
    batch_size: o.BatchSize = "auto",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    adapter: o.Adapter = None,
    template: o.Template = None,
    empty_trace: o.EmptyTrace = None,
    trust_remote_code: o.TrustRemoteCode = False,
    limit: o.Limit = None,
    samples_from: Annotated[
        Path | None, typer.Option(help="Analyse the responses in this samples.jsonl instead of drawing new ones.")
    ] = None,
    nll: Annotated[
        str, typer.Option(help="Per-token NLL: `tokens` pools over all tokens, `questions` averages per question.")
    ] = "tokens",
    ddof: Annotated[int, typer.Option(help="Variances divide by n - ddof.")] = 1,
    level: Annotated[float, typer.Option(help="Confidence level of the intervals.")] = 0.95,
    output: o.Output = Path("runs/variance"),
    config: o.Config = None,
) -> None:
    """Measure how much traces add to the variance of log-probabilities and lengths (the paper's Tables 3, 4 and 5)."""
    from bvpo_stats.sampling.engines.base import SamplingOptions
    from bvpo_stats.studies.variance.output import print_report
    from bvpo_stats.studies.variance.run import VarianceConfig, run_variance
    from bvpo_stats.studies.variance.tables import Definitions

    settings = VarianceConfig(
        policy=o.policy_options(context),
        sampling=SamplingOptions(
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=o.max_new_tokens(max_new_tokens, model),
            seed=seed,
        ),
        definitions=Definitions(nll=nll, ddof=ddof, level=level),  # type: ignore[arg-type]
        prompts=prompts,
        split=split,
        limit=limit,
        samples_from=samples_from,
        batch_size=o.batch_size(batch_size),
    )
    print_report(run_variance(settings, output), output)
