"""``bvpo-stats evaluate``: the paper's evaluation protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bvpo_stats.studies.evaluate.config import EvaluateConfig

EXAMPLES = """Examples:

bvpo-stats evaluate

bvpo-stats evaluate --adapter runs/train/model --adapter half=runs/half/model --output runs/compared

bvpo-stats evaluate --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --adapter runs/bvpo/model --data paper

bvpo-stats evaluate --model MODEL --data problems.jsonl --samples 8 --mode thinking

bvpo-stats evaluate --task alpaca-eval --model MODEL --adapter runs/bvpo/model --judge reward
--reward model:REWARD-MODEL --baseline gpt4_turbo.json

bvpo-stats evaluate --engine openai --base-url http://localhost:8000/v1 --model MODEL --data aime24 --data aime25"""


def evaluate(config: EvaluateConfig, output: Path, given: frozenset[str]) -> None:
    """Evaluate a model, and adapters beside it, as the paper does: with and without a trace, intervals by problem.

    Run again after an interruption, it goes on where it stopped.
    """
    from bvpo_stats.studies.evaluate.run import evaluate as run

    from .following import show

    if config.engine != "transformers" and "model" not in given:
        config = replace(config, policy=None)
    report = run(config, output)
    if report is None:
        shard = f"{config.shard.index}/{config.shard.count}"
        print(f"Shard {shard} is drawn. When all are, the same command without --shard reports.")
    else:
        show(report, output)
