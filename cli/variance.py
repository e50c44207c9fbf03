"""``bvpo-stats variance``: Appendix B's tables."""

from __future__ import annotations

from pathlib import Path

from bvpo_stats.studies.variance.config import VarianceConfig

EXAMPLES = """Examples:

bvpo-stats variance

bvpo-stats variance --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --prompts questions.jsonl --output runs/r1

bvpo-stats variance --samples-from samples.jsonl --output runs/elsewhere"""


def variance(config: VarianceConfig, output: Path) -> None:
    """Measure how much traces add to the variance of log-probabilities and lengths (the paper's Tables 3, 4 and 5)."""
    from bvpo_stats.studies.variance.run import run_variance

    from .following import show

    show(run_variance(config, output), output)
