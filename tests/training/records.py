"""Made-up pairs and runs for the trainer's tests: any token ids will do for losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bvpo_stats.data.records import PreferencePair
from bvpo_stats.model.exact import replace_norms
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy
from bvpo_stats.model.subset import LoraOptions
from bvpo_stats.studies.alpha_star_inputs import SubsetOptions, prepare_subset
from bvpo_stats.training.config import BVPOConfig
from tests.studies.test_alpha_star_runs import make_pair

LORA = LoraOptions(r=2, targets=("q_proj", "v_proj", "down_proj"))


def both_sets(policy: Policy, prompts: int) -> list[PreferencePair]:
    """D_t and D_e of some prompts."""
    return [make_pair(policy, number, mode) for mode in ("thinking", "nothinking") for number in range(prompts)]


def adapted(model: Path, dtype: str = "float32", drift: float = 1.0) -> Policy:
    """A policy with a LoRA adapter off the reference point."""
    policy = load_policy(PolicyOptions(model=str(model), dtype=dtype))
    if dtype == "float64":
        replace_norms(policy.model)  # theirs round to float32
    policy = prepare_subset(policy, SubsetOptions(lora=LORA))[0]
    generator = torch.Generator().manual_seed(5)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            weight.data = drift * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
    return policy


def settings(folder: Path, **changes: Any) -> BVPOConfig:
    """Quiet settings for short runs."""
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return BVPOConfig(**(common | changes))


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """What backward left on the trained weights."""
    return {
        name: np.zeros(weight.shape) if weight.grad is None else weight.grad.double().numpy().copy()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
