"""The gradient of one step, L_c = alpha L_t + (1 - alpha) L_e, in microbatches of a token budget.

`mixed_gradient` is an ordinary backward; `parted_gradient` keeps the gradients of the two sets apart, for the
estimate of alpha (`bvpo_stats.training.alpha.lagged`), and `curvature_along` goes a little way along a direction with
one more forward pass.

`transformers.Trainer` asks `compute_loss` for one scalar and runs its backward. What is handed over is the scalar with
the finished gradient attached (`with_gradient`): to the Trainer, to gradient accumulation and to the reduction over
processes it looks like any other loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Example
from bvpo_stats.gradients.objectives import Objective, PairLogps, PairTerms
from bvpo_stats.gradients.reference import PairBatch, Reference, pair_batches
from bvpo_stats.model.head import arithmetic, sequence_logprobs, token_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import check_finite
from bvpo_stats.records import Mode, PreferencePair

Observe = Callable[[list[Mode], Tensor, PairLogps[Tensor], PairTerms[Tensor]], None]
"""Told about every microbatch: sets, shares in the loss, log-probabilities, losses and rewards."""


@dataclass(frozen=True)
class StepGradient:
    """A step's loss and its gradient, averaged over the step's prompts.

    Attributes:
        loss: alpha L_t + (1 - alpha) L_e.
        gradients: Its derivative by each trainable weight; None for weights it does not depend on.
    """

    loss: Tensor
    gradients: list[Tensor | None]


@dataclass(frozen=True)
class PairModel:
    """The model, the loss of a pair, and how pairs go through.

    Attributes:
        policy: The policy, dropout off.
        objective: The loss.
        reference: log pi_ref; None where the loss has no reference.
        max_tokens: Budget of padded tokens per forward.
        max_padding: Largest share of padding per forward.
        precision: What products are formed in, policy's and reference's alike; None for the weights' own.
    """

    policy: Policy
    objective: Objective
    reference: Reference | None
    max_tokens: int
    max_padding: float = 0.25
    precision: torch.dtype | None = None

    @functools.cached_property
    def weights(self) -> list[Tensor]:
        """The parameters that are trained."""
        model: Any = self.policy.model
        return [weight for weight in model.parameters() if weight.requires_grad]

    def plan(self, pairs: Sequence[PreferencePair]) -> list[PairBatch]:
        """Pairs as microbatches, longest first, with the reference's log-probabilities.

        Raises:
            UserError: A sequence is empty or too long, or a log-probability is not finite; the pair is named.
        """
        with self.arithmetic():
            return pair_batches(
                self.policy, pairs, self.reference, max_tokens=self.max_tokens, max_padding=self.max_padding
            )

    def arithmetic(self) -> AbstractContextManager[None]:
        """In which every log-probability of the loss is taken."""
        return arithmetic(self.precision, self.policy.device)

    def forward(self, micro: PairBatch) -> tuple[PairLogps[Tensor], PairTerms[Tensor]]:
        """Log-probabilities, losses and score weights of a microbatch.

        Raises:
            UserError: A log-probability is not finite; the pair is named.
        """
        with self.arithmetic():
            policy = sequence_logprobs(token_logprobs(self.policy.model, micro.batch))
        check_finite(policy.detach(), micro.names)
        return self.terms(micro, policy)

    def terms(self, micro: PairBatch, policy: Tensor) -> tuple[PairLogps[Tensor], PairTerms[Tensor]]:
        """The same from log pi_theta of its rows."""
        logps = micro.logps(policy)
        return logps, self.objective(logps)


def mixed_gradient(pair_model: PairModel, prompts: Sequence[Example], alpha: float, observe: Observe) -> StepGradient:
    """Loss and gradient of a step with a given alpha; pairs without weight are not run.

    Args:
        pair_model: The model and the loss.
        prompts: The step's prompts.
        alpha: Weight of the trace loss.
        observe: Told about every microbatch.

    Raises:
        UserError: A log-probability, the loss or the gradient is not finite; the pairs are named.
    """
    weighted = [(pair, share / len(prompts)) for prompt in prompts for pair, share in shares(prompt, alpha) if share]
    pairs = [pair for pair, _ in weighted]
    weights = pair_model.weights
    gradients: list[Tensor | None] = [None] * len(weights)
    loss = torch.zeros((), dtype=torch.float64, device=pair_model.policy.device)
    for micro in pair_model.plan(pairs):
        share = torch.tensor([weighted[i][1] for i in micro.members], dtype=torch.float64, device=loss.device)
        with torch.enable_grad():
            logps, terms = pair_model.forward(micro)
            part = (share * terms.loss).sum()
            found = torch.autograd.grad(part, weights, allow_unused=True)
        gradients = _added(gradients, found)
        loss += part.detach()
        observe([pair.mode for pair in micro.pairs], share, logps, terms)
    check_gradient(loss, gradients, prompts)
    return StepGradient(loss, gradients)


def shares(prompt: Example, alpha: float) -> list[tuple[PreferencePair, float]]:
    """The prompt's pairs with their weight in its loss, alpha and 1 - alpha."""
    found = ((prompt.trace_pair, alpha), (prompt.empty_pair, 1 - alpha))
    return [(pair, share) for pair, share in found if pair is not None]


def check_gradient(loss: Tensor, gradients: Sequence[Tensor | None], prompts: Sequence[Example]) -> None:
    """Refuses a step whose loss or gradient is not finite, before it reaches the optimizer.

    Raises:
        UserError: Names the step's prompts.
    """
    # One number to look at: a norm is finite exactly if every entry is (float64 keeps float32's squares from overflow).
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    if not norms:
        raise UserError(
            "No trained weight has a gradient: the loss does not depend on any of them, so a step would train nothing. "
            "Are the weights that require gradients part of the model that is run?"
        )
    if bool(torch.isfinite(torch.stack([loss.detach().double(), *norms]).sum())):
        return
    what = "loss" if not bool(torch.isfinite(loss)) else "gradient"
    listed = ", ".join(prompt.prompt_id for prompt in prompts[:8])
    more = f" and {len(prompts) - 8} more" if len(prompts) > 8 else ""
    raise UserError(
        f"The {what} of the batch with prompts {listed}{more} is NaN or infinite; no step was taken. Lower the "
        "learning rate or use a wider dtype, and resume from the last checkpoint."
    )


_SAMPLED = 1 << 20  # elements of one weight that are looked at


def moving_share(weights: Sequence[Tensor], step: float) -> float:
    """Share of 16-bit weights that a step of a given size moves: |w +- step|, rounded to their type, is not w.

    A step below half the distance to the next number is lost. Weights that are zero (a fresh adapter's B) are left out:
    they stop only when they have become larger. Of a large weight, evenly spaced elements are looked at.

    Args:
        weights: Trained weights; those of 32 bits and more move.
        step: The step's size in each element, Adam's learning rate.

    Returns:
        Between 0 and 1, by number of elements; 1 where all have 32 bits or more.
    """
    moved = seen = 0.0
    for weight in weights:
        if weight.dtype.itemsize >= 4:
            continue
        some = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)]
        some = some[some != 0]
        if not some.numel():
            continue
        wide = some.double()
        both = sum(float(((wide + sign * step).to(some.dtype) != some).double().mean()) for sign in (1, -1))
        moved += weight.numel() * both / 2
        seen += weight.numel()
    return moved / seen if seen else 1.0


@dataclass(frozen=True)
class SetGradients:
    """Sums over prompts of the gradients of either set, each one vector over all trained weights.

    Attributes:
        trace: S_t = sum_i t_i, in the weights' dtype, float32 at least.
        empty: S_e = sum_i e_i.
        prompts: How many.
    """

    trace: Float[Tensor, " parameters"]
    empty: Float[Tensor, " parameters"]
    prompts: int

    def merge(self, other: SetGradients) -> SetGradients:
        """Sums over both sets of prompts."""
        return SetGradients(self.trace + other.trace, self.empty + other.empty, self.prompts + other.prompts)


Passes = list[tuple[PairBatch, PairLogps[Tensor]]]
"""Microbatches of D_t with log pi_theta of their pairs."""


def parted_gradient(
    pair_model: PairModel, prompts: Sequence[Example], alpha: float, observe: Observe
) -> tuple[StepGradient, SetGradients, Passes]:
    """Loss and gradient of a step as `mixed_gradient` has them, and the gradients of D_t and D_e apart.

    The same forward and backward passes over the same pairs, in microbatches of one set each: what it costs is a
    vector.

    Args:
        pair_model: The model and the loss.
        prompts: The step's prompts, each with both pairs.
        alpha: Weight of the trace loss.
        observe: Told about every microbatch.

    Raises:
        UserError: A log-probability, the loss or the gradient is not finite; the pairs are named.
    """
    weights = pair_model.weights
    loss = torch.zeros((), dtype=torch.float64, device=pair_model.policy.device)
    sides: list[list[Tensor | None]] = []
    passes: Passes = []
    for which, share in enumerate((alpha, 1 - alpha)):
        gradients: list[Tensor | None] = [None] * len(weights)
        for micro in pair_model.plan([example.both[which] for example in prompts]):
            with torch.enable_grad():
                logps, terms = pair_model.forward(micro)
                found = torch.autograd.grad(terms.loss.sum(), weights, allow_unused=True)
            gradients = _added(gradients, found)
            shares = torch.full_like(terms.loss.detach(), share / len(prompts))
            loss += (shares * terms.loss.detach()).sum()
            observe([pair.mode for pair in micro.pairs], shares, logps, terms)
            if which == 0:
                passes.append((micro, replace(logps, chosen=logps.chosen.detach(), rejected=logps.rejected.detach())))
        sides.append(gradients)
    mixed = [
        None if t is None and e is None else _mix(t, alpha / len(prompts), e, (1 - alpha) / len(prompts))
        for t, e in zip(*sides, strict=True)
    ]
    check_gradient(loss, mixed, prompts)
    trace, empty = (_flat(side, weights) for side in sides)
    return StepGradient(loss, mixed), SetGradients(trace, empty, len(prompts)), passes


def _added(totals: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        g if total is None else total if g is None else total.add_(g) for total, g in zip(totals, found, strict=True)
    ]


def _mix(t: Tensor | None, share: float, e: Tensor | None, rest: float) -> Tensor:
    if t is None or e is None:
        only, factor = (e, rest) if t is None else (t, share)
        assert only is not None
        return only * factor
    return t.mul(share).add_(e, alpha=rest)


def _flat(side: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Float[Tensor, " parameters"]:
    """Gradients as one vector; weights that were not reached count as zero."""
    pieces = [
        (torch.zeros_like(weight) if g is None else g).flatten().to(torch.promote_types(weight.dtype, torch.float32))
        for g, weight in zip(side, weights, strict=True)
    ]
    return torch.cat(pieces)


@torch.no_grad()
def curvature_along(
    pair_model: PairModel, passes: Passes, direction: Float[Tensor, " parameters"], reach: float
) -> tuple[float, int]:
    """Sum over pairs of the Gauss-Newton curvature v' H v of the loss along a direction, by one more forward pass.

    In the weights' own precision: between two points that near, bfloat16 shows little but its rounding. Where the loss
    is in another precision that costs a second pass.

    Args:
        pair_model: The model and the loss.
        passes: The pairs and their log-probabilities at theta.
        direction: v, over all trained weights.
        reach: How far along it the second pass is; the result is divided by its square.

    Returns:
        The sum, and the number of pairs.
    """
    if pair_model.precision is not None:
        pair_model = replace(pair_model, precision=None)
        passes = [(micro, pair_model.forward(micro)[0]) for micro, _ in passes]
    kept = [weight.detach().clone() for weight in pair_model.weights]
    total, pairs, start = 0.0, 0, 0
    try:
        for weight in pair_model.weights:
            piece = direction[start : start + weight.numel()].reshape(weight.shape)
            weight.add_(piece.to(weight.dtype), alpha=reach)
            start += weight.numel()
        for micro, before in passes:
            with pair_model.arithmetic():
                after = micro.logps(sequence_logprobs(token_logprobs(pair_model.policy.model, micro.batch)))
            total += float(pair_model.objective.curvature(before, after).double().sum())
            pairs += len(micro.pairs)
    finally:
        for weight, value in zip(pair_model.weights, kept, strict=True):
            weight.copy_(value)
    return total / reach**2, pairs


def with_gradient(value: Tensor, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """The scalar ``value``; its backward adds ``gradients`` to the weights' (and may overwrite them: give them away).

    Args:
        value: The loss.
        weights: Parameters that require gradients.
        gradients: The derivative of the loss by each; None where the loss does not depend on one.
    """
    return _Deposit.apply(value, list(gradients), *weights)  # type: ignore[no-untyped-call]


class _Deposit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        gradients, ctx.gradients = ctx.gradients, []
        return None, None, *(None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients)


def through_wrapper(wrapper: nn.Module, model: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """Calls ``compute`` as if it were the wrapped model's forward.

    A distributed wrapper prepares its reduction of gradients when its forward is called, and only then.

    Args:
        wrapper: What the Trainer trains: the model, or DistributedDataParallel around it.
        model: The model itself.
        compute: Computes the loss with the model.
    """
    if wrapper is model:
        return compute()
    before = model.__dict__.get("forward")

    def restore() -> None:
        if before is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = before

    def once(*_: Any, **__: Any) -> Tensor:
        restore()  # compute() may call the model itself
        return compute()

    model.forward = once
    try:
        return wrapper()
    finally:
        restore()
