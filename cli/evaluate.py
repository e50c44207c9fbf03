"""``bvpo-stats evaluate``: the paper's evaluation protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bvpo_stats.studies.evaluate.config import EvaluateConfig

EXAMPLES = """Examples:

bvpo-stats evaluate

bvpo-stats evaluate --adapter runs/train/model --adapter half=runs/half/model --output runs/compared

bvpo-stats evaluate --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --adapter runs/bvpo/model --data paper

bvpo-stats evaluate --model MODEL --data problems.jsonl --samples 8 --mode thinking

bvpo-stats evaluate --task alpaca-eval --model MODEL --adapter runs/bvpo/model --judge reward
--reward model:REWARD-MODEL --baseline gpt4_turbo.json

bvpo-stats evaluate --engine openai --base-url http://localhost:8000/v1 --model MODEL --data aime24 --data aime25"""


def find(given: dict[str, Any], output: Path) -> dict[str, Any]:
    """What was trained on the embedded model last, where the user named neither model nor adapter.

    Args:
        given: Values by option.
        output: The command's folder.
    """
    from bvpo_stats.pages.runs import Run
    from bvpo_stats.progress import say
    from bvpo_stats.studies.train.config import MODEL

    from .following import is_embedded, newest_run

    if given.keys() & {"model", "adapter", "engine", "task", "shard", "data", "samples_from"}:
        return {}

    def fits(run: Run) -> bool:
        files = ("adapter_config.json", "config.json")
        return is_embedded((run.report or {}).get("model")) and any(
            (run.folder / MODEL / name).is_file() for name in files
        )

    run = newest_run(output, "train", fits)
    if run is None:
        return {}
    say(f"Takes `adapters={str(run.folder / MODEL)!r}`: trained by the last finished run of `bvpo-stats train` there.")
    return {"adapter": (str(run.folder / MODEL),)}


def evaluate(config: EvaluateConfig, output: Path, given: frozenset[str]) -> None:
    """Evaluate a model, and adapters beside it, as the paper does: with and without a trace, intervals by problem.

    Without options, the embedded model, and beside it the adapter that was trained on it last.

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
