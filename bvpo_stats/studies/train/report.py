"""The report of a training run as data: what was trained on, every log entry, and every decision about alpha."""

from __future__ import annotations

import math
from typing import Any

from bvpo_stats.studies.base import software_versions
from bvpo_stats.training.trainer import BVPOTrainer

_TIMING = ("train_", "total_flos", "alpha/time_share", "alpha/step")
"""Entries that differ between equal runs, or say nothing."""


def train_report(trainer: BVPOTrainer, method: str) -> dict[str, Any]:
    """``report.json``: everything that the tables and figures need, nothing that changes between equal runs.

    Args:
        trainer: After its training.
        method: ``dpo``, ``simpo`` or ``bvpo``.
    """
    args, estimator, selection = trainer.config, trainer.estimator, trainer.selection
    history = [entry for entry in map(_stable, trainer.state.log_history) if "loss" in entry]
    objective = args.objective()
    constants = {"beta": args.beta} | ({"simpo_gamma": args.simpo_gamma} if objective.name == "simpo" else {})
    trained = sum(int(w.numel()) for w in trainer.policy.model.parameters() if w.requires_grad)
    adapter = hasattr(trainer.policy.model, "disable_adapter")
    return {
        "study": "train",
        "method": method,
        "model": trainer.policy.identity,
        "template": trainer.policy.template.name,
        "loss": {"loss_type": args.loss_type, **constants},
        "trained": {"what": "LoRA adapter" if adapter else "all weights", "parameters": trained},
        "prompts": {
            "train": len(selection.train),
            "probe": len(selection.probe),
            "too_long": selection.too_long,
            "unmatched": selection.unmatched,
        },
        "batch_size": args.prompts_per_step,
        "steps": trainer.state.global_step,
        "learning_rate": args.learning_rate,
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "alpha": _alpha(trainer, history),
        "eta_l": {"at_peak": estimator.step_size.at(args.learning_rate), "smoothness": estimator.step_size.smoothness},
        "first": _mean(history[: _tenth(history)]),
        "last": _mean(history[-_tenth(history) :]),
        "history": history,
        "settings": trainer.identity,
        "seed": args.seed,
        "versions": software_versions(),
    }


def _alpha(trainer: BVPOTrainer, history: list[dict[str, Any]]) -> dict[str, Any]:
    estimator, args = trainer.estimator, trainer.config
    updates = [{key: value for key, value in update.items() if key != "time_share"} for update in estimator.updates]
    return {
        "setting": args.alpha,
        "prior": args.alpha_prior,
        "level": args.alpha_level,
        "final": estimator.alpha,
        "mu": estimator.mu if estimator.controller.wants_data else None,
        "update_steps": estimator.update_steps if estimator.wants_sums else None,
        "trajectory": [
            {
                "step": entry["step"],
                "alpha": entry["alpha"],
                "estimate": entry.get("alpha/estimate"),
                "low": entry.get("alpha/low"),
                "high": entry.get("alpha/high"),
            }
            for entry in history
        ],
        "updates": updates,
    }


def _stable(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry without its times, in an order that a checkpoint (which sorts) does not change."""
    return {key: value for key, value in sorted(entry.items()) if not key.startswith(_TIMING)}


def _tenth(history: list[dict[str, Any]]) -> int:
    return max(1, len(history) // 10)


def _mean(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the metrics over some log entries."""
    names = [name for name in (entries[0] if entries else {}) if name not in ("step", "epoch", "learning_rate")]
    found = {}
    for name in names:
        values = [entry[name] for entry in entries if isinstance(entry.get(name), (int, float))]
        if values and not name.startswith("alpha"):
            found[name] = math.fsum(values) / len(values)
    return found
