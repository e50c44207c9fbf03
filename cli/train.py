"""``bvpo-stats train``: BVPO, DPO and SimPO on preference pairs."""

from __future__ import annotations

from pathlib import Path

from bvpo_stats.studies.train.config import TrainConfig

EXAMPLES = """Examples:

bvpo-stats train --max-steps 50

bvpo-stats train --method bvpo --alpha adaptive --output runs/adaptive

bvpo-stats train --method dpo --output runs/dpo

bvpo-stats train --preset r1-qwen-1.5b --pairs runs/pairs --report-to tensorboard --output runs/paper

bvpo-stats train --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --pairs runs/pairs --traces runs/traces
--alpha adaptive --lora-r 16 --learning-rate 1e-5 --output runs/adaptive

torchrun --nproc-per-node 4 -m bvpo_stats.cli.main train --model ... --pairs runs/pairs"""


def train(config: TrainConfig, output: Path, given: frozenset[str]) -> None:
    """Train on preference pairs with L_c = alpha L_t + (1 - alpha) L_e: BVPO, or DPO and SimPO on D_t.

    Writes the adapter (or model), checkpoints, a report and figures. Killed at any step, the same command goes on from
    the newest checkpoint, and the trajectory is that of an uninterrupted run.
    """
    from bvpo_stats.studies.train.run import run_train

    from .following import show

    report = run_train(config if "model" in given else config.with_preset_model(), output)
    if report is not None:
        if config.push_to_hub is not None:
            from bvpo_stats.store.hub import push_folder
            from bvpo_stats.studies.train.config import MODEL

            print(f"Pushed: {push_folder(output / MODEL, config.push_to_hub, 'model', ['*'])}")
        show(report, output)
