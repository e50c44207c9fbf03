"""Scores: every sequence's own gradient of its log-probability, from one forward and one backward of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import Batch
from bvpo_stats.model.capture import Tape, captured
from bvpo_stats.model.head import sequence_logprobs, token_logprobs
from bvpo_stats.model.mixing import Mixture
from bvpo_stats.model.sinks import Sink
from bvpo_stats.model.subset import Subset

Mix = Callable[[Tensor], Tensor]
"""From sequence log-probabilities [sequences] to the map of sequences to rows [rows, sequences]."""


@dataclass(frozen=True)
class ScoreOptions:
    """How a pass is run.

    Attributes:
        token_weights: Weight of each target in its sequence's sum [sequences, targets]; None for 1 on the completion.
            (Answer tokens only, or 1/length for averages.) Zero weight at prompts and padding is implied.
        mix: Turns scores into linear combinations of them before the sinks see them; None for one row per sequence. It
            is called once, between forward and backward, so that the weights may depend on the log-probabilities: a
            preference gradient needs no second pass.
        weigh: From sequence log-probabilities [sequences] to the weight of each in the objective, so that the sinks
            receive weight_i * s_i; called once, between forward and backward, like ``mix``. For sums over scores that
            a sink forms itself.
        names: How errors name the records; their index where not given.
        chunk_tokens: Positions per chunk of the head.
    """

    token_weights: Float[Tensor, "sequences targets"] | None = None
    mix: Mix | None = None
    weigh: Callable[[Tensor], Tensor] | None = None
    names: Sequence[str] | None = None
    chunk_tokens: int | None = None


def score_pass(
    model: nn.Module, subset: Subset, batch: Batch, sinks: Sequence[Sink], options: ScoreOptions | None = None
) -> Float[Tensor, "sequences targets"]:
    """Hands the sinks the scores s_i = grad_theta sum_j w_ij log pi_theta(token_ij | before), weight by weight.

    One forward and one backward; only one weight's scores [sequences, *shape] are alive at a time unless a sink keeps
    them. The parameters' ``requires_grad`` and ``.grad`` are neither used nor changed.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not, with dropout off (``model.eval()``).
        subset: The parameters theta.
        batch: The sequences, on the model's device.
        sinks: Receivers, called in the order of backward.
        options: How to run it.

    Returns:
        Token log-probabilities, 0 outside completions, detached.

    Raises:
        UserError: NaN or infinite log-probabilities (the record is named), active dropout, reentrant checkpointing,
            autocast, or a model part that is not supported.
    """
    options = options or ScoreOptions()
    check_deterministic(model)
    device = batch.input_ids.device
    tape = Tape(len(batch), torch.empty(0, device=device, requires_grad=True), sinks)
    with torch.enable_grad(), captured(subset, tape):
        token_logps = token_logprobs(model, batch, chunk_tokens=options.chunk_tokens)
        logps = sequence_logprobs(token_logps)
        check_finite(logps, options.names)
        tape.counting = False
        if options.mix is not None:
            tape.mix = Mixture.of(options.mix(logps.detach()))
        objective = logps if options.token_weights is None else sequence_logprobs(token_logps * options.token_weights)
        if options.weigh is not None:
            objective = objective * options.weigh(logps.detach())
        if objective.requires_grad:
            torch.autograd.grad(objective.sum(), [tape.anchor], allow_unused=True)
        tape.finish()
    return token_logps.detach()


def log_probabilities(
    model: nn.Module, batch: Batch, *, names: Sequence[str] | None = None
) -> Float[Tensor, "sequences targets"]:
    """Token log-probabilities without gradients, by the same code path as :func:`score_pass`.

    Args:
        model: The policy, or the reference (the policy with its adapter disabled).
        batch: The sequences, on the model's device.
        names: How errors name the records.

    Raises:
        UserError: As in :func:`score_pass`.
    """
    check_deterministic(model)
    with torch.no_grad():
        token_logps = token_logprobs(model, batch)
    check_finite(sequence_logprobs(token_logps), names)
    return token_logps


def check_finite(logps: Float[Tensor, " sequences"], names: Sequence[str] | None = None) -> None:
    """Refuses NaN and infinite log-probabilities.

    Args:
        logps: Sequence log-probabilities.
        names: How to name the records; their index where not given.

    Raises:
        UserError: Names the records.
    """
    finite = torch.isfinite(logps)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten().tolist()
        listed = ", ".join(f"record {i}" if names is None else names[i] for i in bad[:5])
        raise UserError(
            f"NaN or infinite log-probability in {listed}{' and others' if len(bad) > 5 else ''}; check the model's "
            "weights and dtype (float16 overflows: try bfloat16 or float32)."
        )


def check_deterministic(model: nn.Module) -> None:
    """Refuses what makes a second forward differ from the first, or hides layers from the capture.

    Raises:
        UserError: Active dropout, reentrant gradient checkpointing, or autocast.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise UserError("Scores under torch.autocast are not supported; load the model in the dtype you want.")
    for name, module in _training_modules(model):
        if _dropout_rate(module) > 0:
            raise UserError(f"{name}: dropout is active ({_dropout_rate(module)}); call model.eval() first.")
        if getattr(module, "gradient_checkpointing", False) and _is_reentrant(module):
            raise UserError(
                f"{name}: reentrant gradient checkpointing is not supported; use "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )


def _training_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules in training mode, with their names: looked for before every pass, so without spelling all names out."""
    found, stack = False, [model]
    while stack and not found:
        module = stack.pop()
        found = module.training
        stack.extend(child for child in module._modules.values() if child is not None)
    return [(name, module) for name, module in model.named_modules() if module.training] if found else []


def _dropout_rate(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return float(module.p)
    # Attention modules pass a rate to the kernel instead of owning a Dropout.
    rate = module.__dict__.get("attention_dropout", 0.0)
    return float(rate) if isinstance(rate, (int, float)) else 0.0


def _is_reentrant(module: Any) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", False))
