"""What a checkpoint holds beside transformers' own files: alpha's state, and which run it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Example
from bvpo_stats.model.policy import Policy
from bvpo_stats.progress import say
from bvpo_stats.records import to_dict
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.store.run_folder import SEAL, differences, folder_damage
from bvpo_stats.training.config import BVPOConfig

STATE_FILE = "alpha_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
VECTORS_FILE = "alpha_vectors.safetensors"
"""Earlier mean gradients, where alpha is estimated."""
_DECISIVE = (
    "beta", "loss_type", "simpo_gamma", "max_length", "alpha", "alpha_rule", "alpha_prior", "alpha_update_steps",
    "alpha_traces_per_answer", "alpha_level", "eta_l", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "num_train_epochs", "max_steps", "optim", "optim_args", "lr_scheduler_kwargs", "neftune_noise_alpha", "seed",
    "data_seed", "dataloader_drop_last", "precompute_ref_log_probs",
)  # fmt: skip
"""Settings that decide the trajectory; what only decides speed, memory or logging is left out."""


def run_identity(args: BVPOConfig, policy: Policy, prompts: Sequence[Example]) -> dict[str, Any]:
    """What two runs must share for one to go on from the other's checkpoint.

    Args:
        args: The settings.
        policy: The policy, its trainable weights marked.
        prompts: All prompts, with their traces.
    """
    named: Any = policy.model.named_parameters()
    weights = {name: tuple(w.shape) for name, w in named if w.requires_grad}
    settings = {name: getattr(args, name, None) for name in _DECISIVE}
    return json.loads(
        json.dumps(
            {
                "model": policy.identity,
                "template": policy.template.name,
                "dtype": str(policy.model.dtype),
                "trained weights": _digest(sorted(weights.items())),
                "adapter": _adapter_scaling(policy.model),
                "pairs": _digest(to_dict(pair) for prompt in prompts for pair in prompt.pairs),
                "traces": _digest(to_dict(trace) for prompt in prompts for trace in prompt.traces),
                "batch size": args.prompts_per_step,
                **settings,
                **({"arithmetic": "bfloat16"} if args.bf16 else {}),
            },
            default=str,
        )
    )


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()


def _adapter_scaling(model: Any) -> dict[str, Any] | None:
    """What decides an adapter's function beside its weights; None where there is none."""
    configurations: dict[str, Any] = getattr(model, "peft_config", None) or {}
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
    found = {
        adapter: {name: getattr(configuration, name) for name in names if hasattr(configuration, name)}
        for adapter, configuration in configurations.items()
    }
    return next(iter(found.values())) if len(found) == 1 else found or None


def save_state(
    folder: Path, identity: dict[str, Any], state: dict[str, Any], vectors: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the files; the vectors first, so that who finds the state finds them too."""
    if vectors:
        save_file({name: vector.cpu() for name, vector in vectors.items()}, folder / VECTORS_FILE)
    write_atomic(
        folder / STATE_FILE,
        json.dumps({"run": identity, "alpha": state, "vectors": sorted(vectors or ())}, indent=1) + "\n",
    )


def load_state(folder: Path, identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads alpha's state and its vectors from a checkpoint of this run.

    Raises:
        UserError: No checkpoint of this trainer, a damaged one, or one of another configuration; what differs is named.
    """
    path = folder / STATE_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, state = stored["run"], stored["alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no checkpoint to resume from: cannot read {STATE_FILE} ({error}).") from error
    differing = differences(found, identity)
    if differing:
        raise UserError(
            f"The checkpoint {folder} is of another configuration ({differing}). Repeat its settings to "
            "resume, or start in a new folder."
        )
    vectors: dict[str, Tensor] = {}
    if stored.get("vectors"):
        try:
            vectors = load_file(folder / VECTORS_FILE)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folder} is no checkpoint to resume from: cannot read {VECTORS_FILE} ({error})."
            ) from error
    return dict(state), vectors


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where none was ever finished.

    A kill can leave a checkpoint half-written; its checksums, which come last, are then missing. What is passed over is
    said, and why.

    Raises:
        UserError: There are finished checkpoints, but all of them are damaged: training anew would write over them.
    """
    numbers = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    damaged: dict[str, str] = {}
    for path in sorted((path for path, number in numbers.items() if number.isdigit()), key=lambda p: -int(numbers[p])):
        problem = folder_damage(path)
        if problem is None:
            for name, reason in damaged.items():
                say(f"{name} is passed over: {reason}. Training goes on from {path.name}.")
            return path
        damaged[path.name] = problem
    finished = [f"{name}: {reason}" for name, reason in damaged.items() if (folder / name / SEAL).exists()]
    if finished:
        raise UserError(
            f"No checkpoint in {folder} is whole ({'; '.join(finished)}). Put the files back, or delete that folder to "
            "train anew."
        )
    for name, reason in damaged.items():
        say(f"{name} is passed over: {reason}. Training starts anew.")
    return None
