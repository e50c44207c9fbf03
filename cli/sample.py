"""``bvpo-stats sample``: responses on record, from any engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bvpo_stats.studies.sample.config import SampleConfig

EXAMPLES = """Examples:

bvpo-stats sample --output runs/samples

bvpo-stats sample --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --prompts questions.jsonl --shard 1/4

bvpo-stats sample --engine openai --base-url http://localhost:8000/v1 --model Qwen/Qwen3-4B --prompts questions.jsonl

bvpo-stats sample --engine openai --base-url http://node1:8000/v1 --base-url http://node2:8000/v1 --model Qwen/Qwen3-4B

bvpo-stats sample --engine vllm --model Qwen/Qwen3-4B --prompts questions.jsonl --temperature 1

bvpo-stats sample --engine file --samples-from responses.jsonl --output runs/elsewhere"""


def sample(config: SampleConfig, output: Path, given: frozenset[str]) -> None:
    """Draw responses in Thinking and NoThinking mode; run again after an interruption, it goes on where it stopped."""
    from bvpo_stats.studies.sample.run import run_sample

    from .following import show

    if config.engine != "transformers" and "model" not in given:
        config = replace(config, policy=None)
    show(run_sample(config, output), output)
