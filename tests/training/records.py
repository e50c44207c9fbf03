"""Made-up pairs and runs for the trainer's tests: any token ids will do for losses and gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.exact import replace_norms
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy
from bvpo_stats.model.scores import completion_logprobs
from bvpo_stats.model.subset import LoraOptions
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.studies.alpha_star.config import AlphaInputs
from bvpo_stats.studies.alpha_star.run import prepare_subset
from bvpo_stats.studies.train.config import TrainConfig
from bvpo_stats.training.config import BVPOConfig
from bvpo_stats.training.trainer import BVPOTrainer
from tests.studies.alpha_inputs import write_rows
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
    policy = prepare_subset(policy, lora=LORA)[0]
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


def step_of(trainer: BVPOTrainer, rows: int) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient of a step on the first prompts."""
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, {"rows": torch.arange(rows)})
    return float(loss), gradients(trainer.model)


def banks(policy: Policy, pairs: list[PreferencePair], traces: int = 3) -> list[TraceRecord]:
    """A trace bank of made-up traces, declared posterior draws, with the reference's log-probabilities."""
    records = []
    for pair in pairs:
        if pair.mode != "thinking":
            continue
        for side in ("chosen", "rejected"):
            own, start = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_answer_start")
            closing = policy.template.empty_trace_ids(pair.prompt)[1]
            rng = np.random.default_rng([int(pair.prompt_id[1:]), side == "chosen", 7])
            for index in range(traces + 1):
                trace = tuple(rng.integers(10, 40, size=int(rng.integers(2, 9))).tolist())
                completion = (*trace, *closing, *own[start:]) if index else own
                records.append(
                    TraceRecord(
                        prompt_id=pair.prompt_id,
                        side=side,
                        source="same-answer" if index else "anchor",
                        index=max(0, index - 1),
                        prompt_ids=pair.prompt_ids,
                        completion_ids=completion,
                        answer_start=len(completion) - len(own[start:]),
                        trace_logp=0.0,
                        joint_logp=0.0,
                        temperature=1.0,
                        model=policy.identity,
                        template=policy.template.name,
                    )
                )
    sequences = [TokenSequence(record.prompt_ids, record.completion_ids) for record in records]
    with policy.reference():
        found = completion_logprobs(policy, sequences, [str(i) for i in range(len(sequences))])
    return [
        replace(r, joint_logp=float(v.sum()), trace_logp=float(v[0, : r.answer_start].sum()))
        for r, v in zip(records, found, strict=True)
    ]


def write_run(model: Path, folder: Path, prompts: int) -> Path:
    """Pairs and traces of a model folder as the files that ``bvpo-stats train`` reads."""
    policy = load_policy(PolicyOptions(model=str(model)))
    pairs = both_sets(policy, prompts)
    folder.mkdir(parents=True, exist_ok=True)
    for mode in ("thinking", "nothinking"):
        write_rows(folder / f"{mode}.jsonl", [pair for pair in pairs if pair.mode == mode])
    write_rows(folder / "traces.jsonl", banks(policy, pairs))
    return folder


def run_config(model: Path, pairs: Path, **changes: Any) -> TrainConfig:
    """A short run on such files."""
    common: dict[str, Any] = {
        "alpha": "adaptive", "alpha_rule": "theorem4", "alpha_update_steps": 2, "max_steps": 9, "learning_rate": 3e-2,
        "save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
        "lora_r": LORA.r, "lora_alpha": LORA.alpha, "target_modules": LORA.targets,
    }  # fmt: skip
    return TrainConfig(
        policy=PolicyOptions(model=str(model), device="cpu"),
        inputs=AlphaInputs(pairs=str(pairs), traces=str(pairs)),
        batch_size=8,
        **(common | changes),
    )
