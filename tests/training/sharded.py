"""Short runs of one process or of several, and what they did to the weights; ``python -m tests.training.sharded``.

``MODEL FOLDER KIND-CASE ...`` makes these runs one after the other in this process, ``KIND`` being ``plain``, ``ddp``,
``fsdp2``, ``zero2`` or ``zero3`` (`benchmarks/zero.py`); the launcher's variables (``RANK``, ``WORLD_SIZE``, ...) say
which of several it is. The first process leaves ``KIND-CASE.pt``: the gradient of the first step, all weights after the
last, the log, and how the weights were held. A run that finds a checkpoint in its folder goes on from it.

On a CPU accelerate drops FSDP and runs DistributedDataParallel instead, without a word; `fsdp_on_cpu` lets it shard.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from bvpo_stats.distributed import whole_size
from bvpo_stats.model.exact import replace_norms, use_plain_attention
from bvpo_stats.model.head import causal_lm_of
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy
from bvpo_stats.training.trainer import BVPOTrainer
from tests.training.records import adapted, banks, both_sets, settings

PROMPTS = 16
COMMON = {"max_tokens": 200, "learning_rate": 1e-3, "max_steps": 4, "lr_scheduler_type": "constant", "warmup_steps": 0}
ADAPTIVE = {"alpha": "adaptive", "alpha_rule": "theorem4", "alpha_update_steps": 2, "batch": 4, "max_steps": 7}
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "float32": {"untied": True, "dtype": "float32"},
    "checkpointed": {"untied": True, "gradient_checkpointing": True},
    "accumulated": {"lora": True, "accumulated": 2},
    "adaptive-all": {"untied": True, **ADAPTIVE},
    "resumed-lora": {"lora": True, **ADAPTIVE, "resumed": True},
    "killed": {"untied": True, "dies": 1, "save_strategy": "steps", "save_steps": 2},
    "differs": {"differs": 1},
    "tied32": {"dtype": "float32"},
    "checkpointed32": {"untied": True, "dtype": "float32", "gradient_checkpointing": True},
    "lora32": {"lora": True, "dtype": "float32", "accumulated": 2},
    "scheduled32": {"lora": True, "dtype": "float32", "alpha": "0:0.2,2:0.7"},
    "resumed32": {"untied": True, "dtype": "float32", "resumed": True},
    "odd": {"lora": True, "batch": 6, "dataloader_drop_last": False, "max_steps": 3},
}
"""Settings of the trainer, and the case's own: ``lora``, ``untied``, ``dtype``, ``accumulated``, ``batch``;
``resumed``, for a run that stops after two steps and goes on in a trainer of its own; ``dies``, the process of several
that is killed after three steps unless the run goes on from a checkpoint; ``differs``, that with other settings."""


def fsdp_on_cpu() -> None:
    """Lets accelerate shard by FSDP on a CPU too, in processes that gloo joins."""
    state: Any = accelerate_state.AcceleratorState
    before = state.__init__

    def init(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        before(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    state.__init__ = init


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.found:
            grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
            self.found = {name: whole(gradient) for name, gradient in grads.items()}


def whole(tensor: Any) -> torch.Tensor:
    """All of a weight that FSDP2 or ZeRO-3 may have sharded."""
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def policy_of(model: Path, *, lora: bool, untied: bool, dtype: str) -> Policy:
    if lora:
        policy = adapted(model, dtype, drift=0.3)
    else:
        policy = load_policy(PolicyOptions(model=str(model), dtype=dtype))
        if dtype == "float64":
            replace_norms(policy.model)
    use_plain_attention(policy.model)
    if untied:
        causal_lm = causal_lm_of(policy.model)
        causal_lm.lm_head.weight = nn.Parameter(1.1 * causal_lm.lm_head.weight.detach())
        causal_lm.config.tie_word_embeddings = False
    return policy


def trainer_of(model: Path, folder: Path, kind: str, case: dict[str, Any], world: int) -> BVPOTrainer:
    case, rank = COMMON | case, int(os.environ.get("RANK", "0"))
    if case.pop("differs", None) == rank:
        case["learning_rate"] = 2e-3
    own = {name: case.pop(name, False) for name in ("lora", "untied")}
    dtype, batch, parts = case.pop("dtype", "float64"), case.pop("batch", 8), case.pop("accumulated", 1)
    policy = policy_of(model, dtype=dtype, **own)
    pairs = both_sets(policy, PROMPTS)
    bank = banks(policy, pairs) if own["lora"] and "alpha" in case else []
    pairs = [  # D_t of very unequal lengths, so that processes have unequally many microbatches
        replace(p, chosen_ids=(*p.chosen_ids[:1] * (3 * int(p.prompt_id[1:])), *p.chosen_ids),
                chosen_answer_start=p.chosen_answer_start + 3 * int(p.prompt_id[1:]))
        if p.mode == "thinking" and not bank else p for p in pairs
    ]  # fmt: skip
    if kind == "fsdp2":
        case |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    if kind.startswith("zero"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first; gloo will do
        os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=kind[-1],
                          ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true")  # fmt: skip
        case |= {"use_cpu": False, "ddp_backend": "gloo"}
    args = settings(
        folder, per_device_train_batch_size=batch // world // parts, gradient_accumulation_steps=parts, **case
    )
    trainer = BVPOTrainer(policy, args, pairs, traces=bank)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(model: Path, folder: Path, kind: str, name: str, world: int) -> dict[str, Any]:
    """One case; what the first process leaves of it."""
    case = dict(CASES[name])
    output = folder / f"{kind}-{name}"
    if case.pop("resumed", False):
        case |= {"save_strategy": "steps", "save_steps": 2}
        stopped = trainer_of(model, output, kind, case, world)
        stopped.add_callback(StopAfter(2))
        stopped.train()
        forget()
    dies = case.pop("dies", None) == int(os.environ.get("RANK", "-1"))
    begun = any(output.glob("checkpoint-*"))
    trainer = trainer_of(model, output, kind, case, world)
    if dies and not begun:
        trainer.add_callback(DieAfter(3))
    grab = FirstGradient()
    trainer.add_callback(grab)
    trainer.train(resume_from_checkpoint=begun)
    named = dict(trainer.model.named_parameters())
    trained = [weight for weight in named.values() if weight.requires_grad]
    trainer.save_model(str(output / "model"))
    found = {
        "gradient": grab.found,
        "weights": {key: whole(weight) for key, weight in named.items()},
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "after": trainer.same_pairs(),
        "before": trainer.before,
        "wrapper": type(trainer.model_wrapped).__name__,
        "types": sorted({type(weight.data).__name__ for weight in trained}),
        "parts": sum((w.to_local() if hasattr(w, "to_local") else w).numel() for w in trained),
        "size": sum(map(whole_size, trained)),
        "type": trainer.accelerator.distributed_type.value,
        "lag": trainer.estimator.vectors(),
    }
    forget()
    return found


class StopAfter(TrainerCallback):
    """Stops a run early, as if it had been killed behind a checkpoint."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self._steps


class DieAfter(TrainerCallback):
    """Ends its process by SIGKILL after some steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self._steps:
            os.kill(os.getpid(), signal.SIGKILL)


def forget() -> None:
    """Lets accelerate make another kind of run in this process."""
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate_state.GradientState._reset_state()
    unset_hf_deepspeed_config()


def main() -> None:
    """See the module."""
    model, folder, *runs = sys.argv[1:]
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage at each start: not among all that was imported
    fsdp_on_cpu()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for kind, _, name in (words.partition("-") for words in runs):
        found = run(Path(model), Path(folder), kind, name, world)
        if rank == 0:
            torch.save(found, Path(folder) / f"{kind}-{name}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
