"""``bvpo-stats pairs``: preference data from samples."""

from __future__ import annotations

from pathlib import Path

from bvpo_stats.studies.pairs.config import PairsConfig

EXAMPLES = """Examples:

bvpo-stats pairs --samples runs/sample --reward embedded --output runs/pairs

bvpo-stats pairs --samples runs/r1 --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --reward model:PATH --ref-logps

bvpo-stats pairs --samples runs/maths --reward math-verify --mode thinking"""


def pairs(config: PairsConfig, output: Path) -> None:
    """Pair the best and the worst response of each prompt, by the final answer alone (Sections 3.3, 5.1, C.3)."""
    from bvpo_stats.studies.pairs.run import run_pairs

    from .following import show

    show(run_pairs(config, output), output)
