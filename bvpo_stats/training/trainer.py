"""The trainer: `transformers.Trainer` with the loss L_c = alpha L_t + (1 - alpha) L_e on pairs of the same prompts."""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput

from bvpo_stats.distributed import World, among_peers, whole_size
from bvpo_stats.embedded.assets import EMBEDDED
from bvpo_stats.errors import UserError, rows_of
from bvpo_stats.gradients.examples import Example, Joined, join
from bvpo_stats.gradients.reference import Reference, fill_reference, pair_sequences, without_reference
from bvpo_stats.model.head import sequence_logprobs
from bvpo_stats.model.policy import Policy, gradient_checkpointing, load_policy, with_tokenizer
from bvpo_stats.model.scores import check_alone, log_probabilities
from bvpo_stats.model.subset import check_adapter_config, sharing_copy
from bvpo_stats.progress import within
from bvpo_stats.records import MODES, Mode, PreferencePair, TraceRecord
from bvpo_stats.sampling.layouts import read_pairs
from bvpo_stats.store.jsonl import write_atomic, writing
from bvpo_stats.store.run_folder import SEAL, differences, folder_damage, seal_folder
from bvpo_stats.store.tables import Source, is_saved_dataset, read_records
from bvpo_stats.training.alpha.estimator import make_estimator
from bvpo_stats.training.card import model_card
from bvpo_stats.training.config import BVPOConfig, check_distribution, check_zero, is_sharded
from bvpo_stats.training.data import PromptRows, collate_rows, deal, join_for, select
from bvpo_stats.training.gradient import (
    Backward,
    PairModel,
    Shards,
    add_gradient,
    add_parted_gradient,
    check_gradient,
    curvature_along,
    gather_anew,
    moving_share,
    shares,
    zero_gradients,
)
from bvpo_stats.training.metrics import PREFIXES, PairMetrics, evaluation_metrics, pair_values
from bvpo_stats.training.state import TRAINER_STATE_FILE, last_checkpoint, load_state, run_identity, save_state

_SETS = {"trace", "empty"}
_LEAST_MOVING = 0.5  # share of 16-bit weights that a step must move; in bfloat16 a rate that moves few is common

SAME_PROMPTS = 64
"""Prompts whose losses are taken before and after training."""


class BVPOTrainer(Trainer):
    """Trains on preference pairs with traces (D_t) and without (D_e); DPO and SimPO are special cases.

    The model runs without dropout: policy and reference share one code path, so that all rewards are 0 at the start.
    The reference is the model with its adapter disabled; where all weights are trained, the weights at the start.

    A dataset is a ``datasets.Dataset``, a list of records or of rows, or a path: a file (JSONL, gzipped or not, or
    Parquet) or a run's folder. Rows have TRL's columns ``prompt``, ``chosen`` and ``rejected`` as text, as messages or
    as token ids (the prompt may be implicit), or those of the records that ``bvpo-stats pairs`` writes.

    Args:
        model: ``embedded``, a model folder or hub id, a transformers causal LM (with a PEFT adapter or without), or a
            :class:`~bvpo_stats.model.policy.Policy`.
        args: Settings; None for the defaults of :class:`~bvpo_stats.training.config.BVPOConfig`.
        train_dataset: D_t. Records say themselves which set they are of, so D_e may be in it too. Or all of
            it joined already, by `bvpo_stats.gradients.examples.join`.
        empty_dataset: D_e of the same prompts; not needed for alpha = 1.
        eval_dataset: D_t of other prompts, or ``{"trace": D_t, "empty": D_e}``, or a dictionary of several such, each
            evaluated under its name.
        processing_class: The tokenizer, where ``model`` is a bare model.
        peft_config: Puts a new adapter on the model. Without an adapter all weights are trained.
        traces: Trace bank of the prompts, for ``alpha="adaptive"`` away from the reference point: records, a file, or
            the folder of a traces run.
        callbacks: Further callbacks.
        optimizers: Optimizer and scheduler, where not those of the settings.

    Raises:
        UserError: Anything wrong with settings or records; see the message.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | Policy,
        args: BVPOConfig | None = None,
        train_dataset: Source | Joined | None = None,
        empty_dataset: Source | None = None,
        eval_dataset: Source | Mapping[str, Any] | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        traces: Source = (),
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = BVPOConfig() if args is None else args
        _check_arguments(args, train_dataset, empty_dataset, eval_dataset)
        callbacks = None if callbacks is None else list(rows_of("callbacks", callbacks))
        if not isinstance(optimizers, tuple) or len(optimizers) != 2:
            raise UserError("`optimizers` must be a tuple (optimizer, scheduler); either may be None.")
        self.config = args
        dtype = weights_dtype("auto", args.bf16 and peft_config is None)
        self.policy = trainable_policy(_as_policy(model, processing_class, args, dtype), peft_config, args.seed)
        if not isinstance(train_dataset, Joined):
            pairs = self._pairs(train_dataset, empty_dataset, ("train_dataset", "empty_dataset"))
            vocabulary = self.policy.template.vocabulary
            bank = read_records(traces, TraceRecord, name="traces", vocabulary=vocabulary) if args.adaptive else ()
            train_dataset = join_for(args, pairs, bank)
        self.selection = select(train_dataset)
        self._examples = list(
            self.selection.train
        )  # rows of batches are numbers in here; evaluation puts its own behind
        evaluated = None if eval_dataset is None else self._rows_of(eval_dataset)
        super().__init__(
            model=self.policy.model,
            args=args,
            data_collator=collate_rows,
            train_dataset=PromptRows(len(self.selection.train)),
            eval_dataset=evaluated,
            processing_class=self.policy.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_distribution(args, self.accelerator.distributed_type.value)
        self._sharded = self.accelerator.distributed_type.value == "FSDP"
        self._zero = self.accelerator.distributed_type.value == "DEEPSPEED"
        if self._zero:
            _take_over(self.accelerator.state.deepspeed_plugin, args)
        if self.is_fsdp_enabled:  # autocast forms the products in bfloat16, as in one process
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        _check_trainable(self.policy.model, _step_size(args, optimizers[0]), mixed=args.bf16)
        if self.args.n_gpu > 1:
            raise UserError(
                "Several GPUs in one process are not supported; start with torchrun or accelerate launch, or make one "
                "GPU visible with CUDA_VISIBLE_DEVICES."
            )
        if args.dataloader_drop_last and len(self.selection.train) < args.prompts_per_step:
            raise UserError(
                f"There are {len(self.selection.train)} prompts to train on, fewer than one batch of "
                f"{args.prompts_per_step}; lower the batch size, or give more pairs."
            )
        self._world = world = World(self.args.process_index, self.args.world_size, self.args.local_process_index)
        self._pair_model = PairModel(
            self.policy,
            args.objective(),
            self._reference(),
            args.max_tokens,
            precision=torch.bfloat16 if args.bf16 else None,
            world=world if self._sharded or self._zero else None,
        )
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # fewer at the end of an epoch
        self._settled = False
        if not self._sharded:
            self._settle()
        self._metrics = PairMetrics()
        self.estimator = make_estimator(
            args,
            self.policy,
            self.selection.train,
            lambda: Shards(self._pair_model.weights, self._summed),
            world,
        )
        self._restored: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self._alpha_in_use = self.estimator.alpha
        self.identity = run_identity(args, self.policy, self.selection.train)
        self._check_alike()
        self.before: dict[str, float] | None = None
        """What `same_pairs` gave before the first step."""
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
            UserError: No checkpoint, or one of another configuration; another process has ended; NaN losses or
                gradients (see `training_step`).
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            found = last_checkpoint(Path(str(self.args.output_dir)))
            if found is None:
                raise UserError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
            checkpoint = str(found)
        if checkpoint is not None:
            folder = Path(str(checkpoint))
            state, vectors = load_state(folder, self.identity)
            problem = folder_damage(folder)
            if problem is not None:
                raise UserError(f"{folder} is no checkpoint to resume from: {problem}.")
            self.before, self._restored = state["before"], (state, vectors)
            trained = TrainerState.load_from_json(str(folder / TRAINER_STATE_FILE))
            if trained.global_step >= trained.max_steps:
                return self._finished(folder, trained)
        with among_peers(self._world):
            return super().train(resume_from_checkpoint=checkpoint, **options)

    def _finished(self, checkpoint: Path, state: TrainerState) -> TrainOutput:
        """Takes over a checkpoint of the last step: transformers would train one more from there."""
        if self._zero:
            optimizer, _ = deepspeed_init(self, num_training_steps=state.max_steps)
            self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
            self.deepspeed = self.model_wrapped  # type: ignore[assignment]  # declared as None
        elif self._sharded:
            self.create_optimizer()
            model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model = self.model_wrapped = model
        self._load_from_checkpoint(str(checkpoint), self.model)
        self.state = state
        self._begin()
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return TrainOutput(state.global_step, math.fsum(losses) / max(1, len(losses)), {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As transformers', after the reference was taken from the weights that are about to go."""
        self._settle()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _settle(self) -> None:
        """What the first forward passes are for, once the weights are where they will be: checks, and the reference."""
        if self._settled:
            return
        self._settled = True
        with self._evaluation_mode():
            check_alone(self.policy, pair_sequences([p for example in self._examples for p in example.pairs])[0])
            reference = self._pair_model.reference
            if reference is not None and reference.stored:
                self._fill()

    def _check_alike(self) -> None:
        """Refuses processes that would train on other data, another model or with other settings than the first."""
        everyone = self._world.broadcast(self._world.gather(self.identity))
        for rank, identity in enumerate(everyone):
            differing = differences(everyone[0], identity)
            if differing:
                raise UserError(
                    f"The processes of this run have not the same to train on: {differing} (there: process 0, now: "
                    f"process {rank}). Give all of them the same files and settings."
                )

    def _begin(self) -> None:
        """When the model is wrapped and a checkpoint was read."""
        self._settle()
        if self._restored is not None:
            self.estimator.restore(*self._restored)
            self._restored = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every process is told the whole batch, and takes its part by `deal`."""
        dataset: Any = self.train_dataset
        sampler_fn: Any = self._get_train_sampler
        loader = self._get_dataloader(
            dataset,
            "Training",
            self._train_batch_size * self._world.size,
            sampler_fn=sampler_fn,
            is_training=True,
        )
        shard: Any = getattr(loader, "batch_sampler", None)
        if self._world.size > 1:
            if shard is None or not hasattr(shard, "num_processes") or shard.split_batches:
                raise UserError("`accelerator_config`: `split_batches` and `dispatch_batches` are not supported.")
            # As transformers does where a sampler knows its rank. A last, smaller batch stays as it is.
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', with checksums written last: without them a checkpoint counts for nothing."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / SEAL).unlink(missing_ok=True)  # of a damaged checkpoint that is now written again
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
        except UserError:  # a full disk needs the room more than half a checkpoint does
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()  # each process has written a random state of its own
        if self.args.should_save and not self.args.save_only_model:
            seal_folder(folder)

    def same_pairs(self) -> dict[str, float]:
        """Mean loss and reward margin of either set on the same prompts whenever asked: at most 64, spread over all."""
        total = len(self.selection.train)
        rows = sorted({round(row) for row in np.linspace(0, total - 1, min(total, SAME_PROMPTS)).tolist()})
        with self._evaluation_mode():
            values = _evaluate(self._pair_model, [self._examples[row] for row in rows])
        return {
            name: float(value.double().mean())
            for name, value in values.items()
            if name.partition("/")[2] in ("loss", "rewards/margins")
        } | {"prompts": float(len(rows))}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model (an adapter in PEFT's format), the tokenizer, and alpha's state beside them."""
        folder, estimator = Path(str(output_dir or self.args.output_dir)), self.estimator
        with writing(folder):
            super().save_model(output_dir, _internal_call=_internal_call)
            plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
            if plugin is not None and not _internal_call and "SHARDED" in str(plugin.state_dict_type):
                # transformers leaves sharded checkpoints, which no other program can load, and no model
                self._save(str(folder), state_dict=self.accelerator.get_state_dict(self.model))
        vectors = estimator.vectors() if folder.name.startswith("checkpoint-") else {}  # to go on from
        if self.args.should_save:
            save_state(folder, self.identity, estimator.to_state() | {"before": self.before}, vectors)
            if folder.name.startswith("checkpoint-"):
                (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, with nothing in it
            else:
                write_atomic(folder / "README.md", self._card())

    def _card(self) -> str:
        return model_card(self.config, self.policy, self.selection, self.identity, self.state.log_history)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes the card of `model_card`; transformers asks for one where it pushes to the hub."""
        if self.is_world_process_zero():
            write_atomic(Path(str(self.args.output_dir)) / "README.md", self._card())

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Adds the gradient of the mean of L_c over a batch of prompts to the weights'.

        Args:
            model: The model as accelerate has wrapped it.
            inputs: The rows of the batch's prompts, those of all processes.
            num_items_in_batch: Not used.

        Returns:
            Its part of the step's loss, so that the mean over processes is the whole.

        Raises:
            UserError: A log-probability, the loss or the gradient is not finite, or no weight has one.
        """
        begin_training = getattr(self.optimizer, "train", None)
        if callable(begin_training):  # schedule-free optimizers
            begin_training()
        batch = [self._examples[row] for row in inputs["rows"].tolist()]
        share = 1 / (len(batch) * self.current_gradient_accumulation_steps)
        mine = [batch[number] for number in self._dealt(batch)]
        if not mine:  # fewer prompts than processes
            mine, share = batch[:1], 0.0
        self._alpha_in_use = alpha = self.alpha
        pairs, seen = sum(len(prompt.pairs) for prompt in mine), 0

        def observe(modes: list[Mode], *values: Any) -> None:
            nonlocal seen
            seen += len(modes)
            within(seen / pairs)  # of one step
            if share:
                self._metrics.add(modes, *values)

        backward, pair_model = Backward(self.accelerator, model), self._pair_model
        with self._evaluation_mode():
            if self.estimator.collects:
                loss, sums, passes = add_parted_gradient(pair_model, mine, alpha, share, len(batch), backward, observe)
                curvature, direction = None, self.estimator.direction
                if direction is not None:
                    curvature = curvature_along(pair_model, passes, *direction)
                    curvature = curvature if share else (0.0, 0)
                self.estimator.add(sums, batch, curvature)
            else:
                weighted = [(pair, part * share) for prompt in mine for pair, part in shares(prompt, alpha)]
                loss = add_gradient(pair_model, weighted, backward, observe)
        if not self._zero:
            gradients = [weight.grad for weight in pair_model.weights if weight.grad is not None]
            check_gradient(loss, gradients, batch, self._summed)
        elif self.accelerator.sync_gradients:
            check_gradient(loss, zero_gradients(model), batch, self._summed)
            cast(Any, model).step()
        return (loss * self._world.size).float().to(self.args.device)

    def _dealt(self, batch: Sequence[Example]) -> list[int]:
        """Which prompts of a batch are this process's."""
        tokens = [sum(pair.tokens for pair in prompt.pairs) for prompt in batch]
        return deal(tokens, self._world.size)[self._world.rank]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last entry, averaged over processes."""
        if "loss" in logs:  # a step's entry, not an evaluation's or the one at the end that sums the run up
            logs |= self._metrics.take(self._summed) | {"alpha": self._alpha_in_use} | self.estimator.log()
        super().log(logs, start_time)

    def evaluate(  # type: ignore[override]  # more kinds of datasets
        self,
        eval_dataset: Source | Mapping[str, Any] | PromptRows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss, rewards and log-probabilities on held-out pairs, under TRL's names.

        ``eval_loss`` and ``eval_rewards/*`` weigh pairs as the next step's loss would, alpha on D_t and 1 - alpha on
        D_e (all on the one set that is given alone); ``eval_trace/*`` and ``eval_empty/*`` are of one set.

        Args:
            eval_dataset: As in the constructor; None for what was given there. (transformers hands back rows.)
            ignore_keys: Not used.
            metric_key_prefix: Begins the names.

        Raises:
            UserError: There is nothing to evaluate on, or its reference cannot be had any more.
        """
        if eval_dataset is None and self.eval_dataset is None:
            raise UserError("There is nothing to evaluate on: give `eval_dataset`, here or to the trainer.")
        named: Any = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}  # transformers asks name by name
        given: Any = eval_dataset
        self._check_evaluable()
        if given is None or isinstance(given, PromptRows) or (isinstance(given, str) and given in named):
            return super().evaluate(cast(Any, given), ignore_keys, metric_key_prefix)
        with self._added(given) as rows:
            return super().evaluate(rows, ignore_keys, metric_key_prefix)

    def predict(  # type: ignore[override]
        self,
        test_dataset: Source | Mapping[str, Any],
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """The same as :meth:`evaluate`, with the values behind the means.

        Returns:
            ``predictions`` by name (``trace/rewards/chosen``, ``empty/loss``, ...), one value an example; ``metrics``.

        Raises:
            UserError: As in :meth:`evaluate`.
        """
        self._check_evaluable()
        with self._added(test_dataset) as rows:
            return super().predict(rows, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Any, None]:
        """Loss of a batch, and what is logged of each of its examples."""
        examples = [self._examples[row] for row in inputs["rows"].tolist()]
        with self._evaluation_mode():
            values = _evaluate(self._pair_model, examples)
        loss = evaluation_metrics({name: value.cpu().numpy() for name, value in values.items()}, self.alpha)["loss"]
        return torch.tensor(loss, device=self.policy.device), values, None

    def evaluation_loop(self, dataloader: Any, description: str, *arguments: Any, **options: Any) -> EvalLoopOutput:
        """As transformers', with the metrics of all pairs in its result."""
        output = super().evaluation_loop(dataloader, description, *arguments, **options)
        prefix = options.get("metric_key_prefix", "eval")
        values: Any = output.predictions
        found = evaluation_metrics(values, self.alpha)
        return output._replace(
            metrics=(output.metrics or {}) | {f"{prefix}_{name}": value for name, value in found.items()}
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """With a last, smaller batch: only training drops it."""
        with self._every_row():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """With a last, smaller batch."""
        with self._every_row():
            return super().get_test_dataloader(test_dataset)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per parameter and token, as usual: the batch's own padding is not counted."""
        batch = [self._examples[row] for row in inputs["rows"].tolist()]
        tokens = sum(pair.tokens for number in self._dealt(batch) for pair in batch[number].pairs)
        return 6 * tokens * sum(map(whole_size, self.policy.model.parameters()))

    def _check_evaluable(self) -> None:
        if (self._sharded and not self._settled) or (self._zero and self.deepspeed is None):
            raise UserError(
                "A model that is sharded over processes can be evaluated once its training has begun: give "
                "`eval_dataset` to the trainer and set `eval_strategy` or `eval_on_start`, or evaluate in one process."
            )

    def _pairs(self, trace: Source | None, empty: Source | None, names: tuple[str, str]) -> list[PreferencePair]:
        """The pairs of D_t and D_e; a folder that is given for D_t alone may hold both."""
        for source, name in zip((trace, empty), names, strict=True):
            if source is not None and not isinstance(source, (Path, Iterable)):
                raise UserError(f"`{name}` must be a dataset, a list or a path, not a {type(source).__name__}.")
        if empty is None and "nothinking" in self.config.needed_sets and _holds_both_sets(trace):
            empty = trace
        template, pairs = self.policy.template, []
        if trace is not None:
            pairs += read_pairs(trace, template, "thinking", name=names[0])
        if empty is not None:
            pairs += read_pairs(empty, template, "nothinking", name=names[1])
        return pairs

    def _rows_of(self, dataset: Source | Mapping[str, Any]) -> PromptRows | dict[str, PromptRows]:
        """Joins an evaluation's pairs and puts them behind the examples that there are."""
        if isinstance(dataset, Mapping) and not set(dataset) <= _SETS:
            return {name: self._one_set(part) for name, part in dataset.items()}
        return self._one_set(dataset)

    def _one_set(self, dataset: Source | Mapping[str, Any]) -> PromptRows:
        sets = dataset if isinstance(dataset, Mapping) else {"trace": dataset}
        pairs = self._pairs(sets.get("trace"), sets.get("empty"), ("eval_dataset", "eval_dataset"))
        if not pairs:
            raise UserError("`eval_dataset` holds no pairs.")
        joined = join(
            pairs,
            needs=[mode for mode in MODES if any(pair.mode == mode for pair in pairs)],
            unmatched=self.config.unmatched_prompts,  # type: ignore[arg-type]
            max_length=self.config.max_length,
        )
        self._examples += joined.examples
        return PromptRows(len(joined.examples), start=len(self._examples) - len(joined.examples))

    @contextlib.contextmanager
    def _added(self, dataset: Source | Mapping[str, Any]) -> Iterator[Any]:
        """An evaluation's rows for as long as it takes."""
        before = len(self._examples)
        try:
            rows = self._rows_of(dataset)
            if self._pair_model.reference is not None and self._pair_model.reference.stored:
                if self.state.global_step and not self.policy.has_adapter:
                    raise UserError(
                        "All weights were trained, so the reference is gone; give `eval_dataset` to the trainer, which "
                        "takes its log-probabilities before the first step."
                    )
                self._fill(before)
            yield rows
        finally:
            del self._examples[before:]

    @contextlib.contextmanager
    def _every_row(self) -> Iterator[None]:
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops

    def _reference(self) -> Reference | None:
        """The disabled adapter in every step; taken once, before the first, on request and where there is none."""
        if not self.config.objective().needs_reference:
            return None
        return Reference(self.policy, stored=self.config.precompute_ref_log_probs or not self.policy.has_adapter)

    def _fill(self, start: int = 0) -> None:
        """Takes log pi_ref of the examples from a row on: in the arithmetic of the loss, or it would not begin at 0."""
        examples = self._examples[start:]
        if self._pair_model.precision is not None:
            examples = [without_reference(example) for example in examples]  # stored ones were taken in another
        with self._pair_model.arithmetic():
            self._examples[start:] = fill_reference(
                self.policy, examples, max_tokens=self.config.max_tokens, world=self._world, sharded=self._sharded
            )

    def _summed(self, values: Tensor) -> Tensor:
        if self._world.size == 1:
            return values
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
        if self._sharded:
            gather_anew(self.policy.model)  # a forward without gradients leaves some weights gathered


class AlphaCallback(TrainerCallback):
    """Tells alpha's estimator about the steps; it runs before the step is logged and saved."""

    def __init__(self, trainer: BVPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Losses before the first step, unless a checkpoint has them."""
        self._trainer._begin()
        if state.global_step == 0:
            self._trainer.before = self._trainer.same_pairs()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The alpha of the next step."""
        with self._trainer._evaluation_mode():
            self._trainer.estimator.finish_step(
                state.global_step - 1,
                self._learning_rate(),
                epoch=max(0, math.ceil(float(state.epoch or 0.0) - 1e-9) - 1),
                progress=state.global_step / state.max_steps if state.max_steps > 0 else None,
                optimizer=self._trainer.optimizer,
            )

    def _learning_rate(self) -> float:
        """That of the step to come: the scheduler has moved on."""
        scheduler = self._trainer.lr_scheduler
        assert scheduler is not None
        return float(scheduler.get_last_lr()[0])


def _evaluate(pair_model: PairModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    """What is logged of pairs, ``trace/loss``, ``empty/rewards/chosen``, ..., one value an example."""
    found: dict[str, Tensor] = {}
    for mode, prefix in PREFIXES.items():
        pairs = [pair for example in examples for pair in example.pairs if pair.mode == mode]
        for micro in pair_model.plan(pairs)[0]:
            with pair_model.arithmetic():
                policy = log_probabilities(pair_model.policy.model, micro.batch, names=micro.names)
            for name, values in pair_values(*pair_model.terms(micro, sequence_logprobs(policy))).items():
                place = found.setdefault(f"{prefix}/{name}", values.new_zeros(len(pairs)))
                place[micro.members] = values
    return found


def _holds_both_sets(source: Any) -> bool:
    """Whether a dataset is the folder of a pairs run, or the pairs that ship with the package."""
    if not isinstance(source, (str, Path)):
        return False
    folder = Path(source).expanduser()
    return str(source) == EMBEDDED or (folder.is_dir() and not is_saved_dataset(folder))


def _check_arguments(args: Any, train_dataset: Any, empty_dataset: Any, eval_dataset: Any) -> None:
    if not isinstance(args, BVPOConfig):
        raise UserError(f"`args` must be a BVPOConfig, not a {type(args).__name__}: alpha and beta stand in it.")
    if args.fp16:
        raise UserError("`fp16=True`: not supported; float16 overflows. Take `bf16=True`, or neither.")
    check_distribution(args)
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optimizer:
        raise UserError(f"`optim={optimizer!r}`: not supported; it steps inside each backward, and a step has several.")
    if train_dataset is None and empty_dataset is None:
        raise UserError("There is nothing to train on: give D_t as `train_dataset`, and D_e as `empty_dataset`.")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise UserError(f"`eval_strategy={str(args.eval_strategy)!r}` needs an `eval_dataset`.")


def _as_policy(model: Any, tokenizer: PreTrainedTokenizerBase | None, args: BVPOConfig, dtype: str) -> Policy:
    """A policy from what users have: a name, a loaded model with its tokenizer, or a policy."""
    if isinstance(model, Policy):
        return model
    if isinstance(model, nn.Module):
        return load_policy(cast(PreTrainedModel, model), tokenizer)
    if not isinstance(model, (str, Path)):
        raise UserError(f"`model` must be a name, a transformers model or a Policy, not a {type(model).__name__}.")
    policy = load_policy(str(model), device="cpu" if is_sharded(args) else str(args.device), dtype=dtype)
    return policy if tokenizer is None else with_tokenizer(policy, tokenizer)


def _take_over(plugin: Any, args: BVPOConfig) -> None:
    """Has DeepSpeed keep weights and arithmetic as they are."""
    check_zero(args, plugin.deepspeed_config)
    for config in (plugin.deepspeed_config, plugin.hf_ds_config.config):
        config["bf16"] = config["fp16"] = {"enabled": False}


def _step_size(args: BVPOConfig, optimizer: Any) -> float:
    """The largest step that Adam takes in a weight, its learning rate; 0 (unknown) for an optimizer of another kind."""
    if optimizer is None:
        return float(args.learning_rate)
    if not type(optimizer).__module__.startswith("torch.optim"):
        return 0.0  # it may keep float32 copies of the weights, or round at random
    return max(float(group["lr"]) for group in optimizer.param_groups)


def weights_dtype(asked: str, mixed: bool) -> str:
    """The dtype to load weights in: float32 where all of them are trained with bfloat16 arithmetic.

    Args:
        asked: What the user asked for; anything but ``auto`` stands.
        mixed: Whether all weights are trained with ``bf16=True``.
    """
    return "float32" if mixed and asked == "auto" else asked


def _check_trainable(model: nn.Module, step: float, *, mixed: bool = False) -> None:
    """Refuses to train no weight at all, or 16-bit weights that most steps would leave where they are.

    Raises:
        UserError: Nothing is trainable, weights are sharded, a step rounds away in most of the weights, or weights are
            no float32 where bfloat16 is for the arithmetic alone.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise UserError("No weight of the model is trainable (`requires_grad`), so there is nothing to train.")
    if any(type(weight.data).__name__ == "DTensor" for weight in weights):
        raise UserError(
            "The model's weights are sharded (DTensor: FSDP2 or tensor parallelism), which is not supported here; give "
            "the whole model to each process."
        )
    if any(hasattr(weight, "ds_id") for weight in weights):
        raise UserError(
            "The model was loaded in ZeRO-3's parts (zero.Init); load it before the BVPOConfig is made, or leave "
            "`deepspeed` out of that and start with accelerate launch and `zero3_init_flag: false`."
        )
    odd = sorted({str(w.dtype).removeprefix("torch.") for w in weights if w.dtype != torch.float32})
    if mixed and odd:
        raise UserError(
            f"`bf16=True` forms products in bfloat16 and keeps the trained weights in float32, but they are "
            f"{' and '.join(odd)}. Load the model with `dtype='float32'`, or leave `bf16` out."
        )
    share = moving_share(weights, step)
    if step <= 0 or share >= _LEAST_MOVING:
        return
    low = [weight for weight in weights if weight.dtype.itemsize < 4]
    rate = step
    while moving_share(weights, rate) < _LEAST_MOVING:
        rate *= 2
    dtype = str(low[0].dtype).removeprefix("torch.")
    raise UserError(
        f"`learning_rate={step:g}` rounds away: the trained weights are {dtype}, and a step of that size would move "
        f"only {100 * share:.2g}% of them (of {sum(w.numel() for w in low):,}): the others' next number is more than "
        f"twice as far away. Train float32 weights (`dtype='float32'`; `bf16=True` still computes in bfloat16), or "
        f"take a larger rate (at {rate:.1g} half of them move)."
    )


def trainable_policy(policy: Policy, peft_config: Any = None, seed: int = 0) -> Policy:
    """The policy with its trainable weights marked: the adapter's where there is one, else all of them.

    Args:
        policy: The policy.
        peft_config: A new adapter to put on it.
        seed: Decides the new adapter's random start.

    Raises:
        UserError: A new adapter is asked for on top of another, or it does not fit the model.
    """
    from peft import PeftConfig, get_peft_model

    model: Any = policy.model
    if peft_config is not None:
        if policy.has_adapter:
            raise UserError("The model has an adapter already; leave `peft_config` out, or start from the base model.")
        if not isinstance(peft_config, PeftConfig):
            raise UserError(f"`peft_config` must be a PEFT configuration, not a {type(peft_config).__name__}.")
        check_adapter_config(peft_config, "The adapter of `peft_config`")
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT asks transformers by a name that is going out of use; nothing a user could do about it.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            torch.manual_seed(seed)
            adapted: Any = sharing_copy(model)  # what the caller holds goes on without the adapter
            try:
                model = get_peft_model(adapted, peft_config)
            except ValueError as error:  # target modules that the model does not have
                raise UserError(f"`peft_config`: {str(error).splitlines()[0]}") from error
    policy = replace(policy, model=model.eval())
    if not policy.has_adapter:
        if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
            raise UserError(
                "The model is quantised, so its weights cannot be trained: put a LoRA adapter on it, or load it in "
                "`dtype='float32'` without quantisation."
            )
        model.requires_grad_(True)
    elif not any(weight.requires_grad for weight in model.parameters()):  # loaded for inference
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_" in name)
    return policy
