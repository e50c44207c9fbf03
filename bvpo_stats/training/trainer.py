"""The trainer: `transformers.Trainer` with the loss L_c = alpha L_t + (1 - alpha) L_e on pairs of the same prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from bvpo_stats.distributed import World
from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Joined
from bvpo_stats.model.checkpointing import gradient_checkpointing
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy, wrap_model
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.training.alpha.estimator import make_estimator
from bvpo_stats.training.config import BVPOConfig
from bvpo_stats.training.data import PromptRows, as_pairs, collate_rows, join_for, select
from bvpo_stats.training.deposit import through_wrapper, with_gradient
from bvpo_stats.training.gradient import PairModel, Reference, StepGradient, mixed_gradient
from bvpo_stats.training.metrics import PairMetrics
from bvpo_stats.training.reference import DisabledAdapter, StoredReference, precompute_reference
from bvpo_stats.training.scored import scored_gradient
from bvpo_stats.training.state import last_checkpoint, load_state, run_identity, save_state


class BVPOTrainer(Trainer):
    """Trains on preference pairs with traces (D_t) and without (D_e); DPO and SimPO are special cases.

    The model runs without dropout: policy and reference share one code path, so that all rewards are 0 at the start.

    Args:
        model: A model folder or hub id, a transformers causal LM (with a PEFT adapter or without), or a
            :class:`~bvpo_stats.model.policy.Policy`.
        args: Settings.
        train_dataset: D_t: records, or a ``datasets.Dataset`` with the columns that ``bvpo-stats pairs`` writes. May
            hold D_e too. Or all of it joined already, by `bvpo_stats.gradients.examples.join`.
        empty_dataset: D_e, likewise.
        traces: Trace bank of the prompts, for ``alpha="adaptive"`` away from the reference point.
        processing_class: The tokenizer, where ``model`` is a bare model.
        peft_config: Puts a new adapter on the model. Without an adapter all weights are trained.
        callbacks: Further callbacks.
        optimizers: Optimizer and scheduler, where not those of the settings.

    Raises:
        UserError: Anything wrong with settings or records; see the message.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | Policy,
        args: BVPOConfig,
        train_dataset: Iterable[PreferencePair | dict[str, Any]] | Joined,
        empty_dataset: Iterable[PreferencePair | dict[str, Any]] | None = None,
        *,
        traces: Sequence[TraceRecord] = (),
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if args.bf16 or args.fp16:
            raise UserError(
                "Mixed precision by autocast is not supported; load the model in bfloat16 instead (`dtype`)."
            )
        self.config = args
        self.policy = trainable_policy(_as_policy(model, processing_class), peft_config)
        if not isinstance(train_dataset, Joined):
            pairs = as_pairs(train_dataset, "train_dataset") + as_pairs(empty_dataset or (), "empty_dataset")
            train_dataset = join_for(args, pairs, traces)
        self.selection = select(args, train_dataset)
        super().__init__(
            model=self.policy.model,
            args=args,
            data_collator=collate_rows,
            train_dataset=PromptRows(len(self.selection.train)),
            processing_class=self.policy.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise UserError(
                "Several GPUs in one process are not supported; start with torchrun or accelerate launch, or make one "
                "GPU visible with CUDA_VISIBLE_DEVICES."
            )
        self.loss_is_scaled_for_ga = False
        if args.dataloader_drop_last and len(self.selection.train) < args.prompts_per_step:
            raise UserError(
                f"There are {len(self.selection.train)} prompts to train on, fewer than one batch of "
                f"{args.prompts_per_step}; lower the batch size (or the probe set), or give more pairs."
            )
        self._pair_model = PairModel(self.policy, args.objective(), self._reference(), args.max_tokens)
        self._metrics = PairMetrics()
        world = World(self.args.process_index, self.args.world_size, self.args.local_process_index)
        self.estimator, self._subset = make_estimator(
            args, self.policy, self.selection, world, self._summed if world.size > 1 else None
        )
        self._alpha_in_use = self.estimator.alpha
        self.identity = run_identity(
            args,
            self.policy.identity,
            {name: tuple(w.shape) for name, w in self.policy.model.named_parameters() if w.requires_grad},
            (*self.selection.train, *self.selection.probe),
        )
        self.add_callback(AlphaCallback(self))

    @property
    def alpha(self) -> float:
        """The weight of the trace loss in the next step."""
        return self.estimator.alpha

    def train(  # type: ignore[override]  # transformers' further arguments pass through
        self, resume_from_checkpoint: str | bool | None = None, **options: Any
    ) -> TrainOutput:
        """Trains, from the start or from a checkpoint, whose run goes on as if it had never stopped.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the newest complete one.
            options: As `transformers.Trainer.train` takes them.

        Raises:
            UserError: No checkpoint, or one of another configuration; NaN losses or gradients (see `compute_loss`).
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            found = last_checkpoint(Path(str(self.args.output_dir)))
            if found is None:
                raise UserError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
            checkpoint = str(found)
        if checkpoint is not None:
            self.estimator.restore(load_state(Path(str(checkpoint)), self.identity))
        return super().train(resume_from_checkpoint=checkpoint, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model (an adapter in PEFT's format), the tokenizer, and alpha's state beside them."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save:
            save_state(Path(str(output_dir or self.args.output_dir)), self.identity, self.estimator.to_state())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean of L_c over a batch of prompts, with its gradient attached (see `bvpo_stats.training.deposit`)."""
        prompts = [self.selection.train[row] for row in inputs["rows"].tolist()]

        def compute() -> Tensor:
            with self._evaluation_mode():
                found = self._gradient(prompts)
            return with_gradient(found.loss.float(), self._pair_model.weights, found.gradients)

        loss = through_wrapper(model, self.policy.model, compute)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last entry, averaged over processes."""
        if "train_runtime" not in logs:  # the entry at the very end sums the run up
            logs |= self._metrics.take(self._summed) | {"alpha": self._alpha_in_use} | self.estimator.log()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per parameter and token, as usual: the batch's own padding is not counted."""
        prompts = [self.selection.train[row] for row in inputs["rows"].tolist()]
        tokens = sum(
            2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for prompt in prompts for p in prompt.pairs
        )
        return 6 * tokens * sum(int(weight.numel()) for weight in self.policy.model.parameters())

    def _gradient(self, prompts: Sequence[Any]) -> StepGradient:
        self._alpha_in_use = self.alpha
        if not self.estimator.collects:
            return mixed_gradient(self._pair_model, prompts, self.alpha, self._metrics.add)
        assert self._subset is not None  # whoever wants sums has made one
        found, sums = scored_gradient(self._pair_model, self._subset, prompts, self.alpha, self._metrics.add)
        self.estimator.add(sums)
        return found

    def _reference(self) -> Reference | None:
        if not self.config.objective().needs_reference:
            return None
        adapted = hasattr(self.policy.model, "disable_adapter")
        if adapted and not self.config.precompute_ref_log_probs:
            return DisabledAdapter(self.policy)
        pairs = [pair for prompt in self.selection.train for pair in prompt.pairs]
        share = (self.args.process_index, self.args.world_size)
        mine = precompute_reference(self.policy, pairs, max_tokens=self.config.max_tokens, share=share)
        return StoredReference(pairs, dict(gather_object(list(mine.items()))))

    def _summed(self, values: Tensor) -> Tensor:
        reduced = self.accelerator.reduce(values.to(self.args.device), reduction="sum")
        assert isinstance(reduced, Tensor)
        return reduced.to(values.device)

    @contextlib.contextmanager
    def _evaluation_mode(self) -> Any:
        """Dropout off; with checkpointing, where it was asked for."""
        if self.policy.model.training:
            self.policy.model.eval()
        names = ("activation_checkpointing", "gradient_checkpointing")  # the newer name, and transformers 5.20's
        wanted = any(self.args.__dict__.get(name) for name in names)
        with gradient_checkpointing(self.policy.model) if wanted else contextlib.nullcontext():
            yield


class AlphaCallback(TrainerCallback):
    """Tells alpha's estimator about the steps; it runs before the step is logged and saved."""

    def __init__(self, trainer: BVPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first look at the probe set, unless a checkpoint has one behind it."""
        if state.global_step == 0:
            with self._trainer._evaluation_mode():
                self._trainer.estimator.begin(self._learning_rate())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The alpha of the next step."""
        with self._trainer._evaluation_mode():
            self._trainer.estimator.finish_step(state.global_step - 1, self._learning_rate())

    def _learning_rate(self) -> float:
        """That of the step to come: the scheduler has moved on."""
        scheduler = self._trainer.lr_scheduler
        assert scheduler is not None
        return float(scheduler.get_last_lr()[0])


def _as_policy(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Policy:
    """A policy from what users have: a name, a loaded model with its tokenizer, or a policy."""
    if isinstance(model, Policy):
        return model
    if isinstance(model, str):
        return load_policy(PolicyOptions(model=model))
    return wrap_model(model, tokenizer)


def trainable_policy(policy: Policy, peft_config: Any) -> Policy:
    """The policy with its trainable weights marked: the adapter's where there is one, else all of them.

    Raises:
        UserError: A new adapter is asked for on top of another.
    """
    from peft import get_peft_model

    model: Any = policy.model
    if peft_config is not None:
        if hasattr(model, "disable_adapter"):
            raise UserError("The model has an adapter already; leave peft_config out, or start from the base model.")
        model = get_peft_model(model, peft_config)
    if not hasattr(model, "disable_adapter"):
        model.requires_grad_(True)
    elif not any(weight.requires_grad for weight in model.parameters()):  # loaded for inference
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_" in name)
    return replace(policy, model=model.eval())
