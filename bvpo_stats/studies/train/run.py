"""The train study: pairs in, a trained model out, with the history of loss, rewards and alpha as its report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations  # type: ignore[attr-defined]
from transformers.trainer_callback import PrinterCallback

from bvpo_stats.distributed import World, whole_size
from bvpo_stats.embedded.assets import EMBEDDED
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import load_policy, load_template, on_own_device, pick_device, with_lora
from bvpo_stats.progress import progress, say, spoken_bytes
from bvpo_stats.store.jsonl import is_altered, write_atomic
from bvpo_stats.store.run_folder import Shard, check_room, folder_damage, open_run, seal_folder
from bvpo_stats.studies.alpha_star.run import load_set, load_traces
from bvpo_stats.studies.base import REPORT_FILE, to_json
from bvpo_stats.studies.train.config import MODEL, TrainConfig
from bvpo_stats.studies.train.report import TrainReport
from bvpo_stats.training.config import BVPOConfig, check_distribution, is_sharded
from bvpo_stats.training.data import join_for
from bvpo_stats.training.presets import Method
from bvpo_stats.training.state import last_checkpoint, run_identity
from bvpo_stats.training.trainer import BVPOTrainer, trainable_policy, weights_dtype

_CHECKPOINTS = "checkpoints"


def run_train(config: TrainConfig, output: Path) -> TrainReport | None:
    """Trains (or goes on training) in a folder and writes model, report and figures there; a finished run is kept.

    Started by ``torchrun`` or ``accelerate launch``, the processes share every batch.

    Returns:
        The report; None in all processes but the first.

    Raises:
        UserError: Anything wrong with the input; see the message.
    """
    args = _arguments(config, output)
    check_distribution(args)  # before anything is loaded
    if config.simpo_gamma is not None and args.objective().name != "simpo":
        raise UserError(f"`simpo_gamma={config.simpo_gamma:g}` belongs to `loss_type='simpo'`; leave it out.")
    if config.inputs.traces is not None and not args.adaptive:
        say(f"`traces={config.inputs.traces!r}` is not used: `alpha={args.alpha!r}` is not adaptive.")
    world = World(args.process_index, args.world_size, args.local_process_index)
    template = load_template(config.policy)
    pairs = (pair for mode in args.needed_sets for pair in load_set(config.inputs, mode, template))
    traces = load_traces(config.inputs, template) if args.adaptive else ()
    joined = join_for(args, pairs, traces, config.inputs.limit)
    options = replace(config.policy, dtype=weights_dtype(config.policy.dtype, args.bf16 and config.trains_all_weights))
    if is_sharded(args):
        options = replace(options, device="cpu")
    policy = load_policy(on_own_device(options, world.local_rank, world.size))
    if config.lora is not None and not policy.has_adapter:
        policy = with_lora(policy, config.lora)
    policy = trainable_policy(policy, None)
    identity = {"method": config.method, "limit": config.inputs.limit, "logging steps": config.logging_steps}
    identity |= run_identity(args, policy, joined.examples)
    with open_run(output, "train", identity, shard=Shard(world.rank + 1, world.size)) as folder:
        finished = _finished_report(folder)
        if finished is not None:
            return finished if world.leads else None
        checkpoint = last_checkpoint(folder / _CHECKPOINTS)
        if config.resume and checkpoint is None:
            raise UserError(f"`resume=True`: {output} has no checkpoint to go on from. Leave `resume` out to start.")
        trainer = BVPOTrainer(policy, args, joined)
        trainer.remove_callback(PrinterCallback)  # our progress instead of a printed dictionary a step
        done = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        if done < _steps(trainer):
            say(_estimated(trainer, done, folder))
        with progress("Training", _steps(trainer), "steps", done=done) as advance:
            trainer.add_callback(_Progress(advance))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(folder / MODEL))
        if world.leads:
            seal_folder(folder / MODEL)
        report = train_report(trainer, config.method)  # all run its forwards, which a sharded model needs
        if not world.leads:
            return None
        seconds, total = trainer.estimator.to_state()["seconds"]
        timing = {"estimator_seconds": seconds, "seconds": total, "time_share": seconds / max(total, 1e-9)}
        write_atomic(folder / "timing.json", to_json(timing))
        report.write(folder)
    return report


_KEPT = 2  # checkpoints, and one more while it is written


def _estimated(trainer: BVPOTrainer, done: int, folder: Path) -> str:
    """What the steps to come take, in words.

    Raises:
        UserError: The checkpoints do not fit the disk.
    """
    args, train = trainer.config, trainer.selection.train
    tokens = sum(pair.tokens for prompt in train for pair in prompt.pairs)
    steps = _steps(trainer) - done
    trained = sum(w.numel() * w.element_size() for w in trainer.policy.model.parameters() if w.requires_grad)
    checkpoint = 3 * trained  # weights, and two moments of Adam
    there = sum(path.stat().st_size for path in (folder / _CHECKPOINTS).rglob("*") if path.is_file())
    size = (_KEPT + 1) * checkpoint + trained
    return (
        f"Training: {steps:,} steps of {args.prompts_per_step} prompts, about "
        f"{round(tokens / max(1, len(train)) * args.prompts_per_step):,} tokens each. Weights, gradients and Adam's "
        f"state take about {spoken_bytes(4 * trained)} of memory beside the model's forward pass; checkpoints and "
        f"model {check_room(folder, max(0, size - there))}."
    )


def _finished_report(folder: Path) -> TrainReport | None:
    """The report of a run that is finished (it is written last); None of one that is not.

    A damaged model is written again from the last checkpoint. One that is gone altogether was taken elsewhere.
    """
    path, model = folder / REPORT_FILE, folder / MODEL
    if not path.is_file():
        return None
    problem = folder_damage(model) if model.is_dir() else None
    if is_altered(path):
        if last_checkpoint(folder / _CHECKPOINTS) is None:
            raise UserError(
                f"{path} is not as it was written (its checksum differs), and there is no checkpoint to make it again "
                "from. Put the file back, or delete it to train anew."
            )
        say(f"{path} is not as it was written (its checksum differs); it is made again from the last checkpoint.")
        return None
    if problem is None:
        return TrainReport.from_json(path.read_text(encoding="utf-8"))
    if last_checkpoint(folder / _CHECKPOINTS) is None:
        raise UserError(
            f"The model in {model} is damaged ({problem}), and there is no checkpoint to write it again from. Put the "
            f"file back, or delete {path} to train anew."
        )
    say(f"{model} is damaged ({problem}); it is written again from the last checkpoint.")
    return None


def _arguments(config: TrainConfig, output: Path) -> BVPOConfig:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch_size = config.named.batch_size if config.batch_size is None else config.batch_size
    if batch_size % processes:
        raise UserError(
            f"`batch_size={batch_size}`: prompts per step over all processes, a multiple of their number ({processes})."
        )
    _check_trackers(config.report_to)
    known = {entry.name for entry in fields(BVPOConfig)}
    own = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name in known}
    settings = config.named.settings(**own) | {
        "report_to": list(config.report_to),
        "save_total_limit": _KEPT,
        "use_cpu": pick_device(config.policy.device).type == "cpu",  # transformers joins processes only if it knows
        "disable_tqdm": True,
    }
    settings.setdefault("unmatched_prompts", "drop" if config.inputs.pairs == EMBEDDED else "error")
    checkpointing = settings.pop("gradient_checkpointing", False)
    if checkpointing:  # transformers 5.21 gave the setting another name
        settings["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    try:
        args = BVPOConfig(
            output_dir=str(output / _CHECKPOINTS),
            per_device_train_batch_size=batch_size // processes,
            **settings,
        )
    except (ValueError, ImportError, RuntimeError) as error:  # transformers' own complaints about a setting
        raise UserError(f"These settings do not go together: {str(error).splitlines()[0]}") from error
    if args.world_size != processes:  # each would train a model of its own, on a part of every batch
        raise UserError(
            f"{processes} processes were started, but transformers sees {args.world_size} of them (device "
            f"{args.device}). Give `device` as cpu or cuda, or start fewer processes than there are GPUs."
        )
    return args


def _check_trackers(report_to: Sequence[str]) -> None:
    installed = get_available_reporting_integrations()
    for name in report_to:
        if name not in ("none", "all", *installed):
            there = ", ".join(installed) or "none"
            raise UserError(f"`report_to={name!r}`: no such tracker is installed (there: {there}).")


def _steps(trainer: BVPOTrainer) -> int:
    args = trainer.config
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = len(trainer.selection.train) // args.prompts_per_step if args.dataloader_drop_last else 1
    return max(1, int(per_epoch * args.num_train_epochs))


class _Progress(TrainerCallback):
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(1)


_TIMING = ("train_", "total_flos", "alpha/time_share", "alpha/step")
"""Entries that differ between equal runs, or say nothing."""


def train_report(trainer: BVPOTrainer, method: Method) -> TrainReport:
    """Everything that the tables and figures need, nothing that changes between equal runs.

    Args:
        trainer: After its training.
        method: ``dpo``, ``simpo`` or ``bvpo``.
    """
    args, estimator, selection = trainer.config, trainer.estimator, trainer.selection
    history = [entry for entry in map(_stable, trainer.state.log_history) if "loss" in entry]
    objective = args.objective()
    constants = {"beta": args.beta} | ({"simpo_gamma": args.simpo_gamma} if objective.name == "simpo" else {})
    trained = sum(whole_size(w) for w in trainer.policy.model.parameters() if w.requires_grad)
    adapter = trainer.policy.has_adapter
    return TrainReport(
        method=method,
        model=trainer.policy.identity,
        template=trainer.policy.template.name,
        loss={"loss_type": args.loss_type, **constants},
        trained={"what": "LoRA adapter" if adapter else "all weights", "parameters": trained},
        prompts={
            "train": len(selection.train),
            "too_long": selection.too_long,
            "unmatched": selection.unmatched,
        },
        batch_size=args.prompts_per_step,
        steps=trainer.state.global_step,
        learning_rate=args.learning_rate,
        scheduler=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        alpha=_alpha(trainer, history),
        eta_l={
            "at_peak": float(estimator.step_size.at(args.learning_rate)),
            "smoothness": None if (L := estimator.step_size.smoothness) is None else float(L),
            "measurements": estimator.step_size.measurements,
            "metric": estimator.metric if estimator.collects else None,
        },
        before=trainer.before,
        after=trainer.same_pairs(),
        first=_mean(history[: _tenth(history)]),
        last=_mean(history[-_tenth(history) :]),
        history=history,
        settings=trainer.identity,
        seed=args.seed,
    )


def _alpha(trainer: BVPOTrainer, history: list[dict[str, Any]]) -> dict[str, Any]:
    estimator, args = trainer.estimator, trainer.config
    updates = [{key: value for key, value in update.items() if key != "time_share"} for update in estimator.updates]
    return {
        "setting": args.alpha,
        "prior": args.alpha_prior,
        "level": args.alpha_level,
        "final": estimator.alpha,
        "rule": args.alpha_rule if args.adaptive else None,
        "mu": estimator.mu if estimator.collects else None,
        "update_steps": estimator.look_steps if estimator.looks is not None else None,
        "trajectory": [
            {
                "step": entry["step"],
                "alpha": entry["alpha"],
                "estimate": entry.get("alpha/estimate"),
                "low": entry.get("alpha/low"),
                "n_eff": entry.get("alpha/n_eff"),
                "largest": entry.get("alpha/largest"),
                "high": entry.get("alpha/high"),
                "eta_l": entry.get("alpha/eta_l"),
                "prompts": entry.get("alpha/prompts"),
                "bias_prompts": entry.get("alpha/bias_prompts"),
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
