"""The gradient of one step, L_c = alpha L_t + (1 - alpha) L_e, in microbatches of a token budget.

`mixed_gradient` is an ordinary backward; `scored_gradient` takes it together with each prompt's own trace and
empty-trace gradients out of the same backward. With t_i and e_i those of prompt i, S_t = sum_i t_i, S_e = sum_i e_i and
D_tt, D_te, D_ee = sum_i of the inner products, the sums give the step's gradient, (alpha S_t + (1 - alpha) S_e) / n,
and together with the D's the U-statistics of :class:`~bvpo_stats.training.alpha.StepSums`. All in float64.

`transformers.Trainer` asks `compute_loss` for one scalar and runs its backward. What is handed over is the scalar with
the finished gradient attached (`with_gradient`): to the Trainer, to gradient accumulation and to the reduction over
processes it looks like any other loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Example
from bvpo_stats.gradients.objectives import Objective, PairLogps, PairTerms
from bvpo_stats.gradients.reference import PairBatch, Reference, pair_batches
from bvpo_stats.model.head import sequence_logprobs, token_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import ScoreOptions, check_finite, score_pass
from bvpo_stats.model.sinks import Sink
from bvpo_stats.model.subset import Subset
from bvpo_stats.records import Mode, PreferencePair
from bvpo_stats.training.alpha import StepSums

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
    """

    policy: Policy
    objective: Objective
    reference: Reference | None
    max_tokens: int
    max_padding: float = 0.25

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
        return pair_batches(
            self.policy, pairs, self.reference, max_tokens=self.max_tokens, max_padding=self.max_padding
        )

    def terms(self, micro: PairBatch, policy: Tensor) -> tuple[PairLogps[Tensor], PairTerms[Tensor]]:
        """Losses and score weights of a microbatch, from log pi_theta of its rows."""
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
            policy = sequence_logprobs(token_logprobs(pair_model.policy.model, micro.batch))
            check_finite(policy.detach(), micro.names)
            logps, terms = pair_model.terms(micro, policy)
            part = (share * terms.loss).sum()
            found = torch.autograd.grad(part, weights, allow_unused=True)
        gradients = [
            g if total is None else total if g is None else total.add_(g)
            for total, g in zip(gradients, found, strict=True)
        ]
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


class PromptSums:
    """Running sums; memory: two vectors of the parameters, and what `TraceRows` keep."""

    def __init__(self, subset: Subset) -> None:
        self._subset = subset
        self._trace: dict[str, Tensor] = {}
        self._empty: dict[str, Tensor] = {}
        self._products: dict[str, list[Tensor]] = {"tt": [], "te": [], "ee": []}
        self._examples = 0

    def trace_sink(self, rows: dict[str, Tensor], group: int, members: Int[Tensor, " prompts"]) -> Sink:
        """Takes the weighted scores of trace pairs, chosen and rejected in turn: their sums are the prompts' t_i.

        Args:
            rows: Where the t_i are kept for the inner products with the e_i, by weight: ``[group, *shape]``.
            group: Prompts that share ``rows``.
            members: Which of them these pairs belong to, in rising order.
        """

        def take(name: str, scores: Float[Tensor, "sequences ..."]) -> None:
            gradients = scores[0::2] + scores[1::2]
            if len(members) == group:  # members are in rising order
                rows[name] = gradients
            else:
                if name not in rows:
                    rows[name] = gradients.new_zeros((group, *gradients.shape[1:]))
                rows[name][members] = gradients
            _add(self._trace, name, gradients)
            self._products["tt"].append(_square(gradients))

        return take

    def empty_sink(self, rows: dict[str, Tensor], members: Int[Tensor, " prompts"]) -> Sink:
        """Takes the weighted scores of empty-trace pairs, likewise: the prompts' e_i.

        Args:
            rows: The t_i of the group.
            members: Which of the group's prompts these pairs belong to.
        """

        def take(name: str, scores: Float[Tensor, "sequences ..."]) -> None:
            gradients = scores[0::2] + scores[1::2]
            _add(self._empty, name, gradients)
            self._products["ee"].append(_square(gradients))
            if (trace := rows.get(name)) is not None:
                theirs = trace if len(members) == len(trace) else trace[members]
                self._products["te"].append((gradients * theirs).sum(dtype=torch.float64))

        return take

    def count(self, prompts: int) -> None:
        """Counts prompts whose gradients the sinks have received."""
        self._examples += prompts

    def gradients(self, alpha: float) -> list[Tensor | None]:
        """(alpha S_t + (1 - alpha) S_e) / n by weight, in the weights' dtype; None for weights without gradient."""
        found: list[Tensor | None] = []
        for name, weight in self._subset.parameters.items():
            sums = ((alpha, self._trace.get(name)), (1 - alpha, self._empty.get(name)))
            parts = [share * part for share, part in sums if part is not None]
            found.append(sum(parts[1:], parts[0]).div_(self._examples).to(weight.dtype) if parts else None)
        return found

    def merge(self, other: PromptSums) -> PromptSums:
        """Sums over both sets of prompts; takes ``other``'s over."""
        for mine, theirs in ((self._trace, other._trace), (self._empty, other._empty)):
            for name, total in theirs.items():
                mine[name] = mine[name].add_(total) if name in mine else total
        for name, products in other._products.items():
            self._products[name] += products
        self._examples += other._examples
        return self

    def step_sums(self, reduce: Callable[[Tensor], Tensor] | None = None) -> StepSums:
        """The inner products, over all processes.

        Args:
            reduce: Adds a tensor up over processes; None for a single one.
        """
        weights = self._subset.parameters
        device = next(iter(weights.values())).device
        diagonal = [torch.stack(found).sum() if found else torch.zeros(()) for found in self._products.values()]
        numbers = torch.tensor([*map(float, diagonal), self._examples], dtype=torch.float64, device=device)
        trace, empty = (_flat(part, weights) for part in (self._trace, self._empty))
        if reduce is not None:
            numbers, trace, empty = reduce(numbers), reduce(trace), reduce(empty)
        tt, te, ee, examples = numbers.tolist()
        total = (float(trace @ trace), float(trace @ empty), float(empty @ empty))
        return StepSums(examples, examples, total, (tt, te, ee))


def _add(sums: dict[str, Tensor], name: str, gradients: Tensor) -> None:
    total = gradients.sum(0, dtype=torch.float64)
    sums[name] = sums[name].add_(total) if name in sums else total


def _square(gradients: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradients, dtype=torch.float64).square()


def _flat(part: dict[str, Tensor], weights: dict[str, torch.nn.Parameter]) -> Float[Tensor, " parameters"]:
    """A sum as one vector; weights that were not reached count as zero."""
    pieces = [
        part[name].flatten() if name in part else torch.zeros(w.numel(), dtype=torch.float64, device=w.device)
        for name, w in weights.items()
    ]
    return torch.cat(pieces)


_ROW_BYTES = 1 << 30  # memory for the trace gradients of a group of prompts


def scored_gradient(
    pair_model: PairModel, subset: Subset, prompts: Sequence[Example], alpha: float, observe: Observe
) -> tuple[StepGradient, PromptSums]:
    """Loss and gradient of a step, and the sums that alpha is estimated from.

    Prompts go through in groups: first all trace pairs of a group, then all its empty-trace pairs, so that the inner
    products of a prompt's two gradients can be formed weight by weight. A group's trace gradients are kept meanwhile.

    Args:
        pair_model: The model and the loss.
        subset: The weights that are trained.
        prompts: The step's prompts, each with both pairs.
        alpha: Weight of the trace loss.
        observe: Told about every microbatch.

    Raises:
        UserError: A log-probability, the loss or the gradient is not finite; the pairs are named.
    """
    sums = PromptSums(subset)
    loss = torch.zeros((), dtype=torch.float64, device=pair_model.policy.device)
    for group in _groups(subset, prompts):
        rows: dict[str, Tensor] = {}
        trace = pair_model.plan([example.both[0] for example in group])
        empty = pair_model.plan([example.both[1] for example in group])
        for share, part in ((alpha, trace), (1 - alpha, empty)):
            for micro in part:
                members = torch.tensor(micro.members, device=loss.device)
                sink = sums.trace_sink(rows, len(group), members) if part is trace else sums.empty_sink(rows, members)
                logps, terms = _pass(pair_model, subset, micro, sink)
                shares = torch.full_like(terms.loss, share / len(prompts))
                loss += (shares * terms.loss).sum()
                observe([pair.mode for pair in micro.pairs], shares, logps, terms)
        sums.count(len(group))
    gradients = sums.gradients(alpha)
    check_gradient(loss, gradients, prompts)
    return StepGradient(loss, gradients), sums


def _groups(subset: Subset, prompts: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Prompts whose trace gradients fit the memory for them."""
    most = max(1, _ROW_BYTES // (subset.size * 4))
    for start in range(0, len(prompts), most):
        yield prompts[start : start + most]


def _pass(
    pair_model: PairModel, subset: Subset, micro: PairBatch, sink: Sink
) -> tuple[PairLogps[Tensor], PairTerms[Tensor]]:
    """Hands the sink each sequence's score times its weight in its pair's gradient."""
    found: list[tuple[PairLogps[Tensor], PairTerms[Tensor]]] = []

    def weigh(policy: Tensor) -> Tensor:
        found.append(pair_model.terms(micro, policy))
        terms = found[0][1]
        return torch.stack([terms.chosen_weight, terms.rejected_weight], dim=1).flatten()

    options = ScoreOptions(weigh=weigh, names=micro.names)
    score_pass(pair_model.policy.model, subset, micro.batch, [sink], options)
    return found[0]


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
