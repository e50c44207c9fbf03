"""What a trainer is put together from: a trainable policy, the prompts, and alpha's estimator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.curvature import CurvatureOptions
from bvpo_stats.gradients.noise_curvature import noise_curvature
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy, wrap_model
from bvpo_stats.model.subset import Subset, lora_subset
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.training.adaptive import AdaptiveOptions
from bvpo_stats.training.config import ADAPTIVE, AUTO, BVPOConfig
from bvpo_stats.training.controllers import FixedController
from bvpo_stats.training.data import PromptSelection, TrainingPrompt, join_prompts, select_prompts
from bvpo_stats.training.estimator import AlphaEstimator, Processes, default_update_steps
from bvpo_stats.training.probe import ProbeSet
from bvpo_stats.training.step_size import StepSize

_log = logging.getLogger(__name__)


def as_policy(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Policy:
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


def needed_sets(args: BVPOConfig) -> tuple[bool, bool]:
    """Whether the loss has a trace part and an empty-trace part: alpha = 1 and alpha = 0 do without the other."""
    controller = args.controller()
    only = controller.alpha if isinstance(controller, FixedController) else None
    return only != 0, only != 1


def select_for(args: BVPOConfig, pairs: Sequence[PreferencePair], traces: Sequence[TraceRecord]) -> PromptSelection:
    """The prompts that the settings train on, and those they hold out.

    Raises:
        UserError: As in `join_prompts` and `select_prompts`.
    """
    trace, empty = needed_sets(args)
    unmatched: Any = args.unmatched_prompts
    joined = join_prompts(pairs, trace=trace, empty=empty, unmatched=unmatched)
    probe = 0
    if args.alpha == ADAPTIVE:
        spare = len(joined[0]) - global_batch(args) if args.dataloader_drop_last else len(joined[0]) // 2
        probe = max(0, min(args.alpha_probe_prompts, spare))
    selection = select_prompts(joined, max_length=args.max_length, probe=probe, traces=traces, seed=args.seed)
    if args.alpha == ADAPTIVE and len(selection.probe) < AdaptiveOptions().min_prompts:
        # Of no use to the estimate: train on them.
        selection = select_prompts(joined, max_length=args.max_length)
    return selection


def check_batch(args: BVPOConfig, prompts: int) -> None:
    """Refuses a batch that the prompts cannot fill once.

    Raises:
        UserError: They cannot.
    """
    if args.dataloader_drop_last and prompts < global_batch(args):
        raise UserError(
            f"There are {prompts} prompts to train on, fewer than one batch of {global_batch(args)}; lower the batch "
            "size (or the probe set), or give more pairs."
        )


def global_batch(args: BVPOConfig) -> int:
    """Prompts per optimizer step, over all processes."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def make_estimator(
    args: BVPOConfig,
    policy: Policy,
    selection: PromptSelection,
    traces: Sequence[TraceRecord],
    processes: Processes,
) -> tuple[AlphaEstimator, Subset | None]:
    """Alpha's estimator, and the weights whose gradients it needs prompt by prompt.

    Raises:
        UserError: Weights or records that cannot be estimated from.
    """
    step_size = StepSize(eta_l=1.0 if args.eta_l == AUTO else float(args.eta_l), peak=args.learning_rate)
    common = (args.controller(), step_size, global_batch(args), processes)
    if args.alpha != ADAPTIVE:
        return AlphaEstimator(*common), None
    if not selection.probe:
        estimator = AlphaEstimator(*common)
        estimator.mu = (
            f"the probe set would be smaller than {AdaptiveOptions().min_prompts} prompts, too small for an interval: "
            f"alpha is held at the prior {args.alpha_prior:g}"
        )
        _say(estimator.mu)
        return estimator, None
    if not hasattr(policy.model, "disable_adapter"):
        raise UserError(
            "alpha = adaptive needs every prompt's own gradient, which is formed for LoRA adapters only; train one "
            "(LoRA, with `r` of at least 1), or give alpha as a number."
        )
    subset = lora_subset(policy.model)
    held_out = {prompt.prompt_id for prompt in selection.probe}
    probe = ProbeSet(
        policy,
        subset,
        [pair for prompt in selection.probe for pair in prompt.pairs],
        [trace for trace in traces if trace.prompt_id in held_out],
        StreamOptions(
            objective=args.objective(),
            traces_per_answer=args.alpha_traces_per_answer,
            allow_mismatch=args.allow_mismatch,
            seed=args.seed,
            max_tokens=args.max_tokens,
        ),
    )
    steps = args.alpha_update_steps or default_update_steps(probe.tokens(), _step_tokens(args, selection.train))
    estimator = AlphaEstimator(
        *common,
        probe=probe,
        update_steps=steps,
        sums_steps=args.alpha_sums_steps,
        measure=_smoothness(args, policy, subset, selection.probe),
    )
    if not probe.has_traces:
        _say(
            "there is no trace bank: mu = E g_t is taken at the reference point, before the first step, where it holds "
            "for DPO on pairs sampled at temperature 1 without top-p, and is not renewed"
        )
    return estimator, subset


def _smoothness(
    args: BVPOConfig, policy: Policy, subset: Subset, prompts: Sequence[TrainingPrompt]
) -> Callable[[], float] | None:
    if args.eta_l != AUTO:
        return None
    pairs = [pair for prompt in prompts for pair in prompt.pairs]
    options = CurvatureOptions(args.learning_rate, n_pairs=len(prompts), seed=args.seed)
    return lambda: noise_curvature(policy, subset, pairs, args.objective(), options)


def _step_tokens(args: BVPOConfig, prompts: Sequence[TrainingPrompt]) -> float:
    tokens = [2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for row in prompts for p in row.pairs]
    return global_batch(args) * sum(tokens) / len(prompts)


def _say(sentence: str) -> None:
    _log.warning("alpha: %s.", sentence)
