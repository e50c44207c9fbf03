"""What a training run is set to: TRL's names where the meaning is the same, and alpha's own."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from bvpo_stats.errors import UserError, check_choice, check_number, check_whole
from bvpo_stats.gradients.examples import Unmatched
from bvpo_stats.gradients.objectives import LOSSES, Objective
from bvpo_stats.records import MODES, Mode
from bvpo_stats.training.alpha import (
    ADAPTIVE,
    DEFAULT_RULE,
    AdaptiveOptions,
    Controller,
    FixedController,
    make_controller,
)

AUTO = "auto"


@dataclass
class BVPOConfig(TrainingArguments):
    """Settings of :class:`~bvpo_stats.training.trainer.BVPOTrainer`; everything else is transformers' own.

    ``per_device_train_batch_size`` counts prompts: each brings its pair of D_t and its pair of D_e. A last, smaller
    batch is dropped unless ``dataloader_drop_last`` says otherwise, because alpha belongs to a batch size.

    Attributes:
        beta: Inverse temperature of the implicit reward.
        loss_type: ``sigmoid`` (DPO), ``simpo`` or ``ipo``.
        simpo_gamma: Target margin of SimPO, -log sigmoid(beta * (difference of averages) - gamma); others ignore it.
        max_length: Pairs with a longer sequence are set aside and counted, never cut: a cut trace has no answer.
        unmatched_prompts: What to do about prompts that only one of D_t and D_e has: ``error`` or ``drop``.
        allow_mismatch: Take pairs and traces of another model or template.
        precompute_ref_log_probs: Take log pi_ref of all pairs before the first step (stored values of the records where
            there are any), instead of running the disabled adapter in every step. Full fine-tuning always does.
        max_tokens: Padded tokens per forward: the microbatches inside a step. Bounds memory, changes no result.
        alpha: Weight of the trace loss: a number in [0, 1] (1 is DPO on D_t, 0 on D_e), ``adaptive``, or a schedule
            ``step:alpha,step:alpha,...``.
        alpha_rule: What ``adaptive`` does with its estimates, a name in `bvpo_stats.training.alpha.RULES`.
        alpha_prior: What estimates are shrunk toward, and alpha before there are any (`rising` has its own start).
        alpha_update_steps: Optimizer steps between two looks at the trace gradient's bias, where there are traces; None
            spends 1% of the tokens on them.
        alpha_traces_per_answer: K, traces behind each answer of a look.
        alpha_level: Confidence level of alpha's interval.
        bf16: Form the products of the model's forward and backward in bfloat16 (autocast), the reference's too; the
            trained weights and their gradients stay float32. Looks at the bias and at the curvature stay in float32.
        eta_l: Learning rate times smoothness at the peak learning rate: a number (1 is the paper's), or ``auto``, which
            measures it in the optimizer's metric during training (`bvpo_stats.training.alpha.stream`). Either follows
            the learning rate's schedule.
    """

    # Defaults that differ from transformers'.
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log entries."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Batches hold prompts, not columns."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop a last, smaller batch."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Batches hold a few numbers only."})

    beta: float = field(default=0.1, metadata={"help": "Inverse temperature of the implicit reward."})
    loss_type: str = field(default="sigmoid", metadata={"help": "sigmoid (DPO), simpo or ipo."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin of SimPO."})
    max_length: int | None = field(default=4096, metadata={"help": "Longest sequence; longer pairs are set aside."})
    unmatched_prompts: str = field(default="error", metadata={"help": "Prompts in one set only: error or drop."})
    allow_mismatch: bool = field(default=False, metadata={"help": "Take records of another model or template."})
    precompute_ref_log_probs: bool = field(default=False, metadata={"help": "Take log pi_ref before the first step."})
    max_tokens: int = field(default=16_384, metadata={"help": "Padded tokens per forward."})
    alpha: float | str = field(default=0.5, metadata={"help": "Weight of the trace loss, or adaptive."})
    alpha_rule: str = field(default=DEFAULT_RULE, metadata={"help": "What is done with the estimates of alpha."})
    alpha_prior: float = field(default=0.5, metadata={"help": "What estimates of alpha are shrunk toward."})
    alpha_update_steps: int | None = field(default=None, metadata={"help": "Steps between two looks at the bias."})
    alpha_traces_per_answer: int = field(default=4, metadata={"help": "Traces behind each answer of a look."})
    alpha_level: float = field(default=0.95, metadata={"help": "Confidence level of alpha's interval."})
    eta_l: float | str = field(default=AUTO, metadata={"help": "Learning rate times smoothness, or auto."})

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except (TypeError, ValueError, AttributeError, ImportError) as error:  # ways to say that a setting cannot be
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"transformers refuses these settings: {reason}") from error
        unset_hf_deepspeed_config()  # or a model loaded from now on would come in ZeRO-3's parts
        self._check_inherited()
        if isinstance(self.loss_type, (list, tuple)) and len(self.loss_type) == 1:
            (self.loss_type,) = self.loss_type  # as TRL spells a single loss
        if self.eta_l != AUTO:
            self.eta_l = _positive("eta_l", self.eta_l)
        for name in ("alpha_traces_per_answer", "max_tokens", "alpha_update_steps", "max_length"):
            value = getattr(self, name)
            if value is not None or name not in ("alpha_update_steps", "max_length"):
                check_whole(name, value)
        check_choice("unmatched_prompts", self.unmatched_prompts, get_args(Unmatched))
        for name in ("beta", "simpo_gamma", "alpha_prior", "alpha_level"):
            check_number(name, getattr(self, name))
        AdaptiveOptions(**self._adaptive_options())  # complains even where alpha is fixed
        self.objective(), self.controller()  # complain about their own settings

    @property
    def adaptive(self) -> bool:
        """Whether alpha is estimated during the run."""
        return self.alpha == ADAPTIVE

    @property
    def needed_sets(self) -> tuple[Mode, ...]:
        """The sets that the loss has a part of: alpha = 1 does without D_e, alpha = 0 without D_t."""
        controller = self.controller()
        only = controller.constant if isinstance(controller, FixedController) else None
        return ("nothinking",) if only == 0 else ("thinking",) if only == 1 else MODES

    @property
    def prompts_per_step(self) -> int:
        """Prompts per optimizer step, over all processes."""
        return int(self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size)

    def controller(self) -> Controller:
        """The controller of alpha, before the first step.

        Raises:
            UserError: An alpha that is no weight, or settings the controller cannot have.
        """
        return make_controller(self.alpha, **self._adaptive_options())

    def _adaptive_options(self) -> dict[str, Any]:
        return {"rule": self.alpha_rule, "prior": self.alpha_prior, "level": self.alpha_level}

    def _check_inherited(self) -> None:
        """Refuses transformers' settings that would be ignored or fail later."""
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_whole(name, getattr(self, name))
        check_whole("seed", self.seed, low=0)
        check_number("learning_rate", self.learning_rate)
        check_number("num_train_epochs", self.num_train_epochs)
        check_whole("max_steps", self.max_steps, low=-1)
        if not self.eval_do_concat_batches:
            raise UserError("`eval_do_concat_batches=False`: not supported; the metrics are of all pairs together.")
        if self.label_smoothing_factor:
            raise UserError(
                f"`label_smoothing_factor={self.label_smoothing_factor}`: not supported; the losses have no labels."
            )

    def objective(self) -> Objective:
        """The loss of one pair.

        Raises:
            UserError: An unknown loss, or constants it cannot have.
        """
        if not isinstance(self.loss_type, str) or self.loss_type not in LOSSES:
            raise UserError(f"`loss_type={self.loss_type!r}`: choose {', '.join(LOSSES)}.")
        name = LOSSES[self.loss_type]
        return Objective(name, self.beta, self.simpo_gamma if name == "simpo" else 0.0)


def _positive(field: str, value: float | str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"`{field}={value}`: give a positive number, or auto.")
    return number


_REFUSED = {
    "parallelism_config": ("tensor and context parallelism", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    "": ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM"),
}
_INSTEAD = "Take FSDP2, DeepSpeed's ZeRO-2 or -3, or the whole model in each process (DistributedDataParallel)."


def check_distribution(args: TrainingArguments, kind: str | None = None) -> None:
    """Refuses ways to spread a model over processes under which its gradients would be missing or wrong.

    What was asked for counts, not only what accelerate made of it: on a CPU it drops FSDP without a word.

    Args:
        args: The settings; a launcher adds its own by environment variables.
        kind: accelerate's ``distributed_type``, once it is known.

    Raises:
        UserError: Anything but one process, DistributedDataParallel, FSDP2, or DeepSpeed's ZeRO-2 and ZeRO-3.
    """
    for setting, (name, variable) in _REFUSED.items():
        if (setting and getattr(args, setting, None)) or _is_on(variable):
            raise UserError(f"{name} is not supported in training. {_INSTEAD}")
    zero = bool(args.deepspeed) or _is_on("ACCELERATE_USE_DEEPSPEED")
    if zero and importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed was asked for and is not installed: `pip install 'bvpo-stats[deepspeed]'`.")
    if zero and (started := int(os.environ.get("WORLD_SIZE", "1"))) != args.world_size:
        raise UserError(
            f"DeepSpeed was asked for in {started} processes, but accelerate sees {args.world_size}: each would train "
            "a model of its own. On a CPU give `ddp_backend='gloo'` and leave `deepspeed` to accelerate launch."
        )
    if is_sharded(args):
        given: dict[str, Any] = getattr(args, "fsdp_plugin_args", None) or {}
        if args.fsdp and not given:
            raise UserError(f"FSDP of PyTorch/XLA is not supported in training. {_INSTEAD}")
        version = int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
        if version != 2:
            raise UserError(
                "FSDP1 is not supported in training: set `fsdp_version: 2` in accelerate's configuration, or "
                "`fsdp_config={'version': 2}`."
            )
        if given.get("cpu_offload") or _is_on("FSDP_OFFLOAD_PARAMS"):
            raise UserError("FSDP2 with parameters offloaded to the CPU is not supported in training; leave that out.")
        if args.fsdp and args.parallel_mode.value != "distributed":
            raise UserError("FSDP2 was asked for in a single process; start with torchrun or accelerate launch.")
        if args.torch_compile:
            raise UserError("`torch_compile=True` is not supported together with FSDP2.")
    if kind is None:
        return
    if kind != "NO" and not kind.startswith("MULTI_") and kind not in ("FSDP", "DEEPSPEED"):
        raise UserError(f"{kind} is not supported in training. {_INSTEAD}")
    if zero and kind != "DEEPSPEED":
        raise UserError(
            f"DeepSpeed was asked for, but accelerate makes {kind} of it, without a word: it leaves DeepSpeed out on a "
            "CPU (`use_cpu`) and in processes that neither torchrun nor accelerate launch has started."
        )
    if is_sharded(args) and kind != "FSDP":
        raise UserError(
            f"FSDP was asked for, but accelerate makes {kind} of it, without a word. It shards on accelerators "
            "only, and only in processes that torchrun or accelerate launch has started."
        )


def check_zero(args: BVPOConfig, zero: Mapping[str, Any]) -> None:
    """Refuses what DeepSpeed would do to the weights, or keep from us.

    Args:
        args: The settings.
        zero: DeepSpeed's configuration, as accelerate has it.

    Raises:
        UserError: Another stage than ZeRO-2 and -3, offloading, an optimizer or schedule of DeepSpeed's own, a model
            that could not be saved, an alpha that is estimated, or products in bfloat16.
    """
    part: Mapping[str, Any] = zero.get("zero_optimization") or {}
    stage = part.get("stage", 0)
    if stage not in (2, 3):
        raise UserError(f"DeepSpeed's ZeRO stage {stage} is not supported in training: set `zero_stage` to 2 or 3.")
    for name in ("offload_optimizer", "offload_param"):
        if str((part.get(name) or {}).get("device", "none")).lower() != "none":
            raise UserError(f"DeepSpeed's `{name}` is not supported in training; set its device to none.")
    for name in ("optimizer", "scheduler"):
        if name in zero:
            raise UserError(
                f"DeepSpeed's own `{name}` is not supported: leave it out of its configuration; `optim` and "
                "`lr_scheduler_type` say what is used."
            )
    if stage == 3 and not part.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "Under ZeRO-3 no model could be saved: set `zero3_save_16bit_model: true` (in DeepSpeed's own "
            "configuration `stage3_gather_16bit_weights_on_model_save`; float32 weights are saved as such)."
        )
    if args.adaptive:
        raise UserError(
            "`alpha='adaptive'` is not supported under DeepSpeed, which gives no process the gradients of D_t and D_e "
            "apart. Take FSDP2 or DistributedDataParallel, or a fixed or scheduled alpha."
        )
    if args.bf16:
        raise UserError(
            "`bf16=True` is not supported under DeepSpeed, whose engine turns autocast off: the loss would be in "
            "another precision than its reference. Give `bf16=False`, or take FSDP2."
        )
    if args.torch_compile:
        raise UserError("`torch_compile=True` is not supported together with DeepSpeed.")


def is_sharded(args: TrainingArguments) -> bool:
    """Whether the weights are asked to be spread over processes, so that none of them should load all onto its GPU."""
    return bool(args.fsdp) or _is_on("ACCELERATE_USE_FSDP")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
