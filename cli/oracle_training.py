"""``bvpo-stats oracle-training``: proof on the enumerable model that an estimated alpha pays."""

from __future__ import annotations

from pathlib import Path

from bvpo_stats.lab.oracle_training.config import OracleTrainingConfig

EXAMPLES = """Examples:

bvpo-stats oracle-training

bvpo-stats oracle-training --optimizers adamw --horizons 25,75 --seeds 3 --output runs/oracle-quick

bvpo-stats oracle-training --models 4 --draw-seed 1 --output runs/oracle-other"""


def oracle_training(config: OracleTrainingConfig, output: Path) -> None:
    """Train the enumerable model with fixed, estimated and exact alphas and compare the exact gradient norms.

    Results are kept after each method and step size; the same command goes on where it stopped.
    """
    from bvpo_stats.lab.oracle_training.run import run_oracle_training

    run_oracle_training(config, output).print(output)
