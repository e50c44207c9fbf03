"""The train study: pairs in, a trained model out, with the history of loss, rewards and alpha as its report."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bvpo_stats.distributed import World
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy, on_own_device, pick_device, with_lora
from bvpo_stats.model.subset import LoraOptions
from bvpo_stats.progress import progress
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.store.shards import Shard
from bvpo_stats.studies.alpha_star.inputs import AlphaInputs, load_set, load_traces
from bvpo_stats.studies.train.figures import train_figures
from bvpo_stats.studies.train.output import markdown
from bvpo_stats.studies.train.report import train_report
from bvpo_stats.training.config import BVPOConfig
from bvpo_stats.training.data import join_for
from bvpo_stats.training.presets import Method
from bvpo_stats.training.state import last_checkpoint, run_identity
from bvpo_stats.training.trainer import BVPOTrainer, trainable_policy

REPORT = "report.json"
MODEL = "model"
"""Folder of the trained adapter or model inside a run's folder."""

_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        method: ``dpo``, ``simpo`` or ``bvpo``: what the report calls it; the loss and alpha stand in ``settings``.
        policy: Which model.
        inputs: Where pairs and traces are.
        batch_size: Prompts per optimizer step, over all processes.
        lora: The new adapter; None trains all weights (or a loaded adapter's).
        settings: Fields of `bvpo_stats.training.config.BVPOConfig`.
        checkpointing: Compute activations again in backward.
        must_resume: Refuse to start anew.
    """

    method: Method = "bvpo"
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    inputs: AlphaInputs = field(default_factory=AlphaInputs)
    batch_size: int = 32
    lora: LoraOptions | None = field(default_factory=LoraOptions)
    settings: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    must_resume: bool = False


def run_train(config: TrainConfig, output: Path) -> dict[str, Any] | None:
    """Trains (or goes on training) in a folder and writes model, report and figures there; a finished run is kept.

    Started by ``torchrun`` or ``accelerate launch``, the processes share every batch.

    Returns:
        The report; None in all processes but the first.

    Raises:
        UserError: Anything wrong with the input; see the message.
    """
    args = _arguments(config, output)
    world = World(args.process_index, args.world_size, args.local_process_index)
    pairs = (pair for mode in args.needed_sets for pair in load_set(config.inputs, mode, config.policy))
    traces = load_traces(config.inputs) if args.adaptive else ()
    joined = join_for(args, pairs, traces, config.inputs.limit)
    policy = _policy(config, world)
    weights = {name: tuple(w.shape) for name, w in policy.model.named_parameters() if w.requires_grad}
    identity = {"method": config.method, "limit": config.inputs.limit}
    identity |= run_identity(args, policy.identity, weights, joined.examples)
    with open_run(output, "train", identity, shard=Shard(world.rank + 1, world.size)) as folder:
        finished = _finished_report(folder)
        if finished is not None:
            return finished if world.leads else None
        checkpoint = last_checkpoint(folder / _CHECKPOINTS)
        if config.must_resume and checkpoint is None:
            raise UserError(f"`resume=True`: {output} has no checkpoint to go on from. Leave `resume` out to start.")
        trainer = BVPOTrainer(policy, args, joined)
        _quieten(trainer)
        with progress("Training", _steps(trainer), "steps", done=_done(checkpoint)) as advance:
            trainer.add_callback(_progress_callback(advance))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(folder / MODEL))
        if not world.leads:
            return None
        report = train_report(trainer, config.method)
        _write(report, trainer, folder)
    return report


def _finished_report(folder: Path) -> dict[str, Any] | None:
    """The report of a run that is finished (it is written last); None of one that is not."""
    path = folder / REPORT
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _arguments(config: TrainConfig, output: Path) -> BVPOConfig:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size < 1 or config.batch_size % processes:
        raise UserError(
            f"`batch_size={config.batch_size}`: prompts per step over all processes, a multiple of their number "
            f"({processes})."
        )
    settings: dict[str, Any] = {
        "use_cpu": pick_device(config.policy.device).type == "cpu",  # transformers joins processes only if it knows
        "disable_tqdm": True,
        "report_to": "none",
    } | config.settings
    _check_trackers(settings["report_to"])
    if config.checkpointing:
        known = {entry.name for entry in fields(BVPOConfig)}  # transformers 5.21 gave the setting another name
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        settings[name] = True
    try:
        args = BVPOConfig(
            output_dir=str(output / _CHECKPOINTS),
            per_device_train_batch_size=config.batch_size // processes,
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


def _check_trackers(report_to: str | list[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name not in ("none", "all", *installed):
            there = ", ".join(installed) or "none"
            raise UserError(f"`report_to={name!r}`: no such tracker is installed (there: {there}).")


def _policy(config: TrainConfig, world: World) -> Policy:
    policy = load_policy(on_own_device(config.policy, world.local_rank, world.size))
    if config.lora is not None and not policy.has_adapter:
        policy = with_lora(policy, config.lora)
    return trainable_policy(policy, None)


def _steps(trainer: BVPOTrainer) -> int:
    args = trainer.config
    if args.max_steps > 0:
        return args.max_steps
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    per_epoch = len(trainer.selection.train) // batch if args.dataloader_drop_last else 1
    return max(1, int(per_epoch * args.num_train_epochs))


def _done(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _quieten(trainer: BVPOTrainer) -> None:
    """Our progress instead of a printed dictionary a step."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _progress_callback(advance: Any) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance(1)

    return Progress()


def _write(report: dict[str, Any], trainer: BVPOTrainer, folder: Path) -> None:
    from bvpo_stats.studies.base import to_json

    figures = train_figures(report, folder / "figures")
    seconds = trainer.estimator.to_state()["seconds"]
    timing = {"estimator_seconds": seconds[0], "seconds": seconds[1], "time_share": seconds[0] / max(seconds[1], 1e-9)}
    write_atomic(folder / "timing.json", to_json(timing))
    write_atomic(folder / "report.md", markdown(report, figures))
    write_atomic(folder / REPORT, to_json(report))  # the last: whoever sees it finds the rest
