"""The trainer: `transformers.Trainer` with the loss L_c = alpha L_t + (1 - alpha) L_e on pairs of the same prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from bvpo_stats.data.records import PreferencePair, TraceRecord
from bvpo_stats.errors import UserError
from bvpo_stats.model.checkpointing import gradient_checkpointing
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy, wrap_model
from bvpo_stats.training.config import BVPOConfig
from bvpo_stats.training.data import PromptRows, PromptSelection, as_pairs, collate_rows, join_prompts, select_prompts
from bvpo_stats.training.deposit import through_wrapper, with_gradient
from bvpo_stats.training.gradient import PairModel, Reference, StepGradient, mixed_gradient
from bvpo_stats.training.metrics import PairMetrics
from bvpo_stats.training.reference import DisabledAdapter, StoredReference, precompute_reference


class BVPOTrainer(Trainer):
    """Trains on preference pairs with traces (D_t) and without (D_e); DPO and SimPO are special cases.

    The model runs without dropout: policy and reference share one code path, so that all rewards are 0 at the start.

    Args:
        model: A model folder or hub id, a transformers causal LM (with a PEFT adapter or without), or a
            :class:`~bvpo_stats.model.policy.Policy`.
        args: Settings.
        train_dataset: D_t: records, or a ``datasets.Dataset`` with the columns that ``bvpo-stats pairs`` writes. May
            hold D_e too.
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
        train_dataset: Iterable[PreferencePair | dict[str, Any]],
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
                "Mixed precision by autocast is not supported; load the model in bfloat16 instead (--dtype)."
            )
        self.config = args
        self.policy = _trainable(_as_policy(model, processing_class), peft_config)
        pairs = as_pairs(train_dataset, "train_dataset") + as_pairs(empty_dataset or (), "empty_dataset")
        self.selection = _select(pairs, traces, args)
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
        _check_batch(args, len(self.selection.train))
        self._pair_model = PairModel(self.policy, args.objective(), self._reference(), args.max_tokens)
        self._metrics = PairMetrics()

    @property
    def alpha(self) -> float:
        """The weight of the trace loss in the next step."""
        assert isinstance(self.config.alpha, float)
        return self.config.alpha

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
            logs |= self._metrics.take(self._summed) | {"alpha": self.alpha}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per parameter and token, as usual: the batch's own padding is not counted."""
        prompts = [self.selection.train[row] for row in inputs["rows"].tolist()]
        tokens = sum(
            2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for prompt in prompts for p in prompt.pairs
        )
        return 6 * tokens * sum(int(weight.numel()) for weight in self.policy.model.parameters())

    def _gradient(self, prompts: Sequence[Any]) -> StepGradient:
        return mixed_gradient(self._pair_model, prompts, self.alpha, self._metrics.add)

    def _reference(self) -> Reference | None:
        if not self.config.objective().needs_reference:
            return None
        adapted = hasattr(self.policy.model, "disable_adapter")
        if adapted and not self.config.precompute_ref_log_probs:
            return DisabledAdapter(self.policy)
        pairs = [pair for prompt in self.selection.train for pair in prompt.pairs]
        share = (self.args.process_index, self.args.world_size)
        mine = precompute_reference(self.policy, pairs, max_tokens=self.config.max_tokens, share=share)
        return StoredReference(dict(gather_object(list(mine.items()))))

    def _summed(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    @contextlib.contextmanager
    def _evaluation_mode(self) -> Any:
        """Dropout off; with checkpointing, where it was asked for."""
        self.policy.model.eval()
        names = ("activation_checkpointing", "gradient_checkpointing")  # the newer name, and transformers 5.20's
        wanted = any(self.args.__dict__.get(name) for name in names)
        with gradient_checkpointing(self.policy.model) if wanted else contextlib.nullcontext():
            yield


def _as_policy(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Policy:
    if isinstance(model, Policy):
        return model
    if isinstance(model, str):
        return load_policy(PolicyOptions(model=model))
    return wrap_model(model, tokenizer)


def _trainable(policy: Policy, peft_config: Any) -> Policy:
    """The policy with its trainable weights marked: the adapter's where there is one, else all of them."""
    from dataclasses import replace

    from peft import get_peft_model

    model: Any = policy.model
    if peft_config is not None:
        if hasattr(model, "disable_adapter"):
            raise UserError("The model has an adapter already; leave peft_config out, or start from the base model.")
        model = get_peft_model(model, peft_config)
    if hasattr(model, "disable_adapter"):
        if not any(weight.requires_grad for weight in model.parameters()):
            for name, weight in model.named_parameters():
                weight.requires_grad_("lora_" in name)
    else:
        model.requires_grad_(True)
    return replace(policy, model=model.eval())


def _select(pairs: Sequence[PreferencePair], traces: Sequence[TraceRecord], args: BVPOConfig) -> PromptSelection:
    joined = join_prompts(
        pairs,
        trace=args.alpha != 0,
        empty=args.alpha != 1,
        unmatched=args.unmatched_prompts,  # type: ignore[arg-type]
    )
    return select_prompts(joined, max_length=args.max_length)


def _check_batch(args: BVPOConfig, prompts: int) -> None:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.dataloader_drop_last and prompts < batch:
        raise UserError(
            f"There are {prompts} prompts to train on, fewer than one batch of {batch}; lower the batch size (or the "
            "probe set), or give more pairs."
        )
