"""What a checkpoint holds beside transformers' own files: alpha's state, and which run it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Example
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.training.config import BVPOConfig

STATE_FILE = "alpha_state.json"
_TRAINER_STATE = "trainer_state.json"  # the last file that transformers writes into a checkpoint
_DECISIVE = (
    "beta", "loss_type", "simpo_gamma", "max_length", "alpha", "alpha_prior", "alpha_update_steps", "alpha_ema",
    "alpha_sums_steps", "alpha_probe_prompts", "alpha_traces_per_answer", "alpha_level", "eta_l", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "num_train_epochs", "max_steps", "optim", "seed", "data_seed", "dataloader_drop_last",
)  # fmt: skip
"""Settings that decide the trajectory; what only decides speed, memory or logging is left out."""


def run_identity(
    args: BVPOConfig, model: str, weights: dict[str, tuple[int, ...]], prompts: Sequence[Example]
) -> dict[str, Any]:
    """What two runs must share for one to go on from the other's checkpoint.

    Args:
        args: The settings.
        model: Identity of the model.
        weights: Trained weights and their shapes.
        prompts: All prompts, probe set included.
    """
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        for pair in prompt.pairs:
            digest.update(json.dumps([pair.prompt_id, pair.mode, pair.chosen_ids, pair.rejected_ids]).encode())
    trained = hashlib.blake2b(json.dumps(sorted(weights.items())).encode(), digest_size=8)
    settings = {name: getattr(args, name, None) for name in _DECISIVE}
    return json.loads(
        json.dumps(
            {
                "model": model,
                "trained weights": trained.hexdigest(),
                "pairs": digest.hexdigest(),
                "batch size": args.prompts_per_step,
                **settings,
            },
            default=str,
        )
    )


def save_state(folder: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes the file."""
    write_atomic(folder / STATE_FILE, json.dumps({"run": identity, "alpha": state}, indent=1) + "\n")


def load_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Reads alpha's state from a checkpoint of this run.

    Raises:
        UserError: No checkpoint of this trainer, a damaged one, or one of another configuration; what differs is named.
    """
    path = folder / STATE_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, state = stored["run"], stored["alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no checkpoint to resume from: cannot read {STATE_FILE} ({error}).") from error
    differing = [
        f"{key}: {found.get(key)!r} there, {identity.get(key)!r} now"
        for key in sorted(set(found) | set(identity))
        if found.get(key) != identity.get(key)
    ]
    if differing:
        raise UserError(
            f"The checkpoint {folder} is of another configuration ({'; '.join(differing)}). Repeat its settings to "
            "resume, or start in a new folder."
        )
    return dict(state)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to the end; None where there is none.

    A kill can leave a checkpoint half-written; its trainer state, which comes last, is then missing or cut off.
    """
    found = [(int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*") if _complete(path)]
    return max(found)[1] if found else None


def _complete(checkpoint: Path) -> bool:
    if not checkpoint.name.rpartition("-")[2].isdigit() or not (checkpoint / STATE_FILE).is_file():
        return False
    try:
        json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
