"""``bvpo-stats alpha-star``: the optimal mixing weight."""

from __future__ import annotations

from pathlib import Path

from bvpo_stats.studies.alpha_star.config import AlphaConfig

EXAMPLES = """Examples:

bvpo-stats alpha-star

bvpo-stats alpha-star --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --pairs runs/pairs --batch-size 128

bvpo-stats alpha-star --model base --adapter checkpoint-200 --pairs runs/pairs --traces runs/traces --eta-l auto
--learning-rate 1e-5 --optimizer-state checkpoint-200

bvpo-stats alpha-star --model base --pairs runs/pairs --optimizer adamw --learning-rate 1e-5

bvpo-stats alpha-star --model base --pairs runs/pairs --theta probe --probe-rank 8

accelerate launch --num-processes 4 -m bvpo_stats.cli.main alpha-star --model ... --pairs runs/pairs

torchrun --nproc-per-node 4 -m bvpo_stats.cli.main alpha-star --model ... --pairs runs/pairs"""


def alpha_star(config: AlphaConfig, output: Path) -> None:
    """Find the optimal weight of the trace gradient for a model, a batch size and a step size, with its interval.

    With an optimizer and a learning rate, eta L of its steps is measured in its own metric, and alpha* is said at eta L
    = 1 (Theorem 4), at the measured value, and for direction only. The last table says what would help most.

    Batch size, step size and level may change from call to call: the same folder answers at once.

    Started by torchrun or accelerate launch, the processes (on one GPU each) share the prompts and one reports.
    """
    from bvpo_stats.studies.alpha_star.run import run_alpha_star

    from .following import show

    report = run_alpha_star(config, output)
    if report is not None:
        show(report, output)
