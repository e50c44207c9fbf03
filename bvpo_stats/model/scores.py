"""Scores: every sequence's own gradient of its log-probability, from one forward and one backward of the batch."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bvpo_stats.distributed import World
from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import Batch, TokenSequence, collate, length_batches
from bvpo_stats.model.capture import Tape, captured
from bvpo_stats.model.head import (
    Head,
    causal_lm_of,
    completion_scores,
    foreign_autocast,
    head_logprobs,
    sequence_logprobs,
    token_logprobs,
)
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.sinks import Keep, Mixture, Sink, Sum
from bvpo_stats.model.subset import Subset
from bvpo_stats.progress import stages

Mix = Callable[[Tensor], Tensor | Mixture]
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
    if torch.is_autocast_enabled(batch.input_ids.device.type):
        raise UserError("Scores under torch.autocast are not supported; load the model in the dtype you want.")
    check_deterministic(model)
    device = batch.input_ids.device
    tape = Tape(len(batch), torch.empty(0, device=device, requires_grad=True), sinks, model=model)
    with torch.enable_grad(), captured(subset, tape):
        token_logps = token_logprobs(model, batch, chunk_tokens=options.chunk_tokens)
        logps = sequence_logprobs(token_logps)
        check_finite(logps, options.names)
        tape.counting = False
        if options.mix is not None:
            found = options.mix(logps.detach())
            tape.mix = found if isinstance(found, Mixture) else Mixture.of(found)
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
    if foreign_autocast():
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


def batch_of(policy: Policy, sequences: Sequence[TokenSequence], names: Sequence[str]) -> Batch:
    """Sequences as one padded batch of the policy's."""
    return collate(
        sequences,
        pad_id=policy.pad_id,
        max_positions=policy.max_positions,
        positions_end=policy.positions_end,
        names=names,
        device=policy.device,
    )


@torch.no_grad()
def completion_logprobs(
    policy: Policy,
    sequences: Sequence[TokenSequence],
    names: Sequence[str],
    *,
    temperatures: Sequence[float] = (1.0,),
    max_tokens: int | None = None,
    world: World | None = None,
) -> list[Float[np.ndarray, "temperatures tokens"]]:
    """Log softmax(logits / T)[token] of every completion token, for each temperature T, in nats.

    One forward pass serves all temperatures; the head is chunked and its log-softmax is in float32 or better.

    Args:
        policy: Who scores, as it stands (an adapter that is enabled counts).
        sequences: What to score, in any order; they are batched by length.
        names: How to name each of them in an error.
        temperatures: The temperatures.
        max_tokens: Padded tokens per batch; None for 8k on a CPU and 32k on an accelerator.
        world: Processes that hold shards of the weights: all of them run equally many batches, by repeating the last.

    Returns:
        One float64 array per sequence, in the order given.

    Raises:
        UserError: A sequence is empty or longer than the model's positions, or a log-probability is NaN or infinite.
    """
    budget = max_tokens or (8_192 if policy.device.type == "cpu" else 32_768)
    if sequences:
        check_alone(policy, sequences)
    results: list[Float[np.ndarray, "temperatures tokens"] | None] = [None] * len(sequences)
    batches = length_batches([len(sequence) for sequence in sequences], max_tokens=budget)
    batches += batches[-1:] * ((world or World()).most(len(batches)) - len(batches))
    for rows in stages(batches):
        batch = batch_of(policy, [sequences[row] for row in rows], [names[row] for row in rows])
        for row, values in zip(rows, _batch(policy, batch, temperatures), strict=True):
            if not np.isfinite(values).all():
                raise UserError(
                    f"The model gives a NaN or infinite log-probability to {names[row]}. Check its weights, or load it "
                    "in a wider type (`dtype='float32'`)."
                )
            results[row] = values
    return [values for values in results if values is not None]


def _batch(
    policy: Policy, batch: Batch, temperatures: Sequence[float]
) -> list[Float[np.ndarray, "temperatures tokens"]]:
    def at_all(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        return torch.stack([_at_temperature(hidden, head, targets, temperature) for temperature in temperatures])

    table = completion_scores(policy.model, batch, at_all).double().cpu().numpy()
    return np.split(table, np.cumsum(batch.completion_mask.sum(dim=1).cpu().numpy())[:-1], axis=1)


def _at_temperature(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> Tensor:
    if (
        temperature != 1.0
    ):  # logits / T = (hidden / T) @ weight.T + bias / T: scales the small factor, not the large one
        hidden = hidden / temperature
        head = Head(head.weight, None if head.bias is None else head.bias / temperature)
    return head_logprobs(hidden, head, targets)


# Two orders of the same sums: rounding differs, and by how much depends on the coarsest precision on the way. A layer
# that was missed, or counted twice, is off by 1.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 5e-2}

_CHECKED_TARGETS = 8  # targets per sequence whose full logits are formed to check the chunked head


class ScoreMismatchError(RuntimeError):
    """The engine disagrees with autograd: a fault of this package or an unsupported model, never of the data."""


def check_scores(model: nn.Module, subset: Subset, batch: Batch, *, tolerance: float | None = None) -> float:
    """Compares the sum of a batch's scores with autograd's gradient of the summed log-probabilities.

    It catches what capture can miss: a layer that the model bypasses, a weight used elsewhere, padding that leaks. The
    chunked head is compared with the model's own logits at a few positions.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not, with dropout off.
        subset: The parameters theta.
        batch: A small batch, on the model's device.
        tolerance: Largest norm(ours - autograd's) per weight, relative to the larger of norm(autograd's) and a
            hundredth of the largest weight's gradient norm; None for :data:`TOLERANCES` of the coarsest dtype.

    Returns:
        The largest relative difference found; 0 for weights that FSDP2 has sharded, which are not compared.

    Raises:
        ScoreMismatchError: Names the first weight that differs by more than the tolerance.
        UserError: As in :func:`~bvpo_stats.model.scores.score_pass`.
    """
    if any(hasattr(weight, "to_local") for weight in model.parameters()):
        return 0.0  # autograd knows no gradient by a shard, and the model's parts cannot be run on their own
    if tolerance is None:
        tolerance = max(TOLERANCES.get(p.dtype, 0.0) for p in model.parameters())
    check_log_probabilities(model, batch, tolerance=tolerance)
    total = Sum()
    score_pass(model, subset, batch, [total])
    weights = list(subset.parameters.values())
    with _requiring_gradients(weights):
        logps = sequence_logprobs(token_logprobs(model, batch))
        found = torch.autograd.grad(logps.sum(), weights, allow_unused=True)
    truth = {
        name: subset.seen(name, torch.zeros_like(weight) if gradient is None else gradient)
        for (name, weight), gradient in zip(subset.parameters.items(), found, strict=True)
    }
    floor = 0.01 * max(float(gradient.norm()) for gradient in truth.values())
    worst = 0.0
    for name, gradient in truth.items():
        ours = total.totals.get(name, torch.zeros_like(gradient))
        scale = max(float(gradient.norm()), floor)
        difference = float((ours - gradient).norm()) / scale if scale > 0 else float(ours.norm())
        if not difference <= tolerance:
            raise ScoreMismatchError(
                f"{name}: captured scores differ from autograd's gradient by {difference:.1e} of its norm "
                f"(allowed: {tolerance:.0e}). The model uses this weight in a way the engine does not see."
            )
        worst = max(worst, difference)
    return worst


def check_log_probabilities(model: nn.Module, batch: Batch, *, tolerance: float) -> None:
    """Compares the chunked head with the logits of the model's own forward, at the last targets of every sequence.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not.
        batch: A small batch, on the model's device.
        tolerance: Largest difference per token, in nats.

    Raises:
        ScoreMismatchError: The model does something to its logits that the chunked head does not.
    """
    last = torch.zeros_like(batch.completion_mask)
    for row in range(len(batch)):
        last[row, torch.nonzero(batch.completion_mask[row]).flatten()[-_CHECKED_TARGETS:]] = True
    positions = torch.nonzero(last.any(0)).flatten()
    with torch.no_grad():
        ours = token_logprobs(model, batch)[last]
        output = causal_lm_of(model)(
            input_ids=batch.input_ids[:, :-1], logits_to_keep=positions, use_cache=False, return_dict=True
        )
        logits = output.logits.to(ours.dtype)
        targets = batch.input_ids[:, 1:][:, positions, None]
        truth = torch.log_softmax(logits, dim=-1).gather(2, targets).squeeze(2)[last[:, positions]]
    difference = float((ours - truth).abs().max())
    if not difference <= tolerance * max(1.0, float(truth.abs().max())):
        raise ScoreMismatchError(
            f"Log-probabilities of the chunked head differ from the model's own logits by {difference:.1e} nats; the "
            f"output layer of {type(causal_lm_of(model)).__name__} is not supported."
        )


_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_ALONE_TOLERANCES = {
    torch.float64: 1e-5,
    torch.float32: 1e-3,
}  # nats a token; parts of a model may be float32


def check_alone(policy: Policy, sequences: Sequence[TokenSequence]) -> None:
    """Refuses a model that gives a sequence other log-probabilities beside a longer one than alone.

    What is compared is the shortest sequence, alone and in one batch with the longest; once for each model. Positions,
    routing or a recurrent state that depend on the batch would change every number with the size of the batches, and a
    check inside one batch does not see it.

    Args:
        policy: Who scores.
        sequences: What it will score.

    Raises:
        UserError: It depends on the batch by more than rounding.
    """
    shortest, longest = min(sequences, key=len), max(sequences, key=len)
    model, most = policy.model, policy.max_positions
    if len(shortest) == len(longest) or model in _CHECKED:
        return
    if not shortest.completion_ids or not shortest.prompt_ids or (most is not None and len(longest) > most):
        return  # is refused, with its name, when its turn comes
    check_deterministic(model)
    with torch.no_grad():
        single, pair = (
            token_logprobs(model, collate(some, pad_id=policy.pad_id, device=policy.device))[0]
            for some in ([shortest], [shortest, longest])
        )
    if not (single.isfinite().all() and pair.isfinite().all()):
        return  # likewise
    tokens = len(shortest.completion_ids)
    difference = float((pair[: len(single)] - single).abs().sum() / tokens)
    if not difference <= _ALONE_TOLERANCES.get(model.dtype, 0.1):
        raise UserError(
            f"{type(causal_lm_of(model)).__name__} gives a sequence of {len(shortest)} tokens other log-probabilities "
            f"beside one of {len(longest)} than alone (by {difference:.1g} nats a token), so every number would depend "
            "on how sequences are batched; this model is not supported."
        )
    _CHECKED.add(model)


def batch_variation(model: nn.Module, subset: Subset, batch: Batch) -> Float[Tensor, " sequences"]:
    """How much a sequence's score depends on the batch it is scored in: norm(s_batch - s_alone) / norm(s_alone).

    Fused kernels and low precision round differently at different batch sizes and widths. The difference enters every
    variance of gradients, where it should be far below 1. Memory: sequences x parameters numbers.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not, with dropout off.
        subset: The parameters theta.
        batch: The sequences, on the model's device.
    """
    keep = Keep()
    score_pass(model, subset, batch, [keep])
    together = keep.flat(subset, len(batch))
    variation = together.new_zeros(len(batch))
    for row in range(len(batch)):
        tokens = int(batch.attention_mask[row].sum())
        single = Batch(
            batch.input_ids[row : row + 1, :tokens],
            batch.attention_mask[row : row + 1, :tokens],
            batch.position_ids[row : row + 1, :tokens],
            batch.completion_mask[row : row + 1, : tokens - 1],
        )
        keep = Keep()
        score_pass(model, subset, single, [keep])
        alone = keep.flat(subset, 1)[0]
        variation[row] = (together[row] - alone).norm() / alone.norm()
    return variation


@contextlib.contextmanager
def _requiring_gradients(weights: Iterable[Tensor]) -> Iterator[None]:
    weights = list(weights)
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
