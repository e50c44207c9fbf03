"""A step of training, L_c = alpha L_t + (1 - alpha) L_e: an ordinary backward for each microbatch of pairs.

L_c is a sum over pairs, so microbatches of a token budget add up on the weights' ``.grad``, whatever wraps the model:
log-probabilities come out of the wrapper's call, `Backward` says when processes add theirs up. `add_gradient` is a step
with a given alpha; `add_parted_gradient` keeps the gradients of the two sets apart, for the estimate of alpha
(`bvpo_stats.training.alpha.lagged`), and `curvature_along` goes a little way along a direction with one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bvpo_stats.distributed import World, own_part
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
class PairModel:
    """The model, the loss of a pair, and how pairs go through.

    Attributes:
        policy: The policy, dropout off.
        objective: The loss.
        reference: log pi_ref; None where the loss has no reference.
        max_tokens: Budget of padded tokens per forward.
        max_padding: Largest share of padding per forward.
        precision: What products are formed in, policy's and reference's alike; None for the weights' own.
        world: The processes that hold shards of the weights, which must all run equally many forwards; None
            where each has all of them.
    """

    policy: Policy
    objective: Objective
    reference: Reference | None
    max_tokens: int
    max_padding: float = 0.25
    precision: torch.dtype | None = None
    world: World | None = None

    @property
    def weights(self) -> list[Tensor]:
        """The parameters that are trained; the shards of them once the model is sharded."""
        model: Any = self.policy.model
        if self.world is not None:
            gather_anew(model)  # a forward without gradients leaves the gathered weights in the shards' places
        return [weight for weight in model.parameters() if weight.requires_grad]

    def plan(self, *sets: Sequence[PreferencePair]) -> list[list[PairBatch]]:
        """Sets of pairs as microbatches of one set each, longest first, with the reference's log-probabilities.

        Returns:
            The microbatches of each set.

        Raises:
            UserError: A sequence is empty or too long, or a log-probability is not finite; the pair is named.
        """
        budget: dict[str, Any] = {"max_tokens": self.max_tokens, "max_padding": self.max_padding, "world": self.world}
        found = [pair_batches(self.policy, pairs, None, **budget) for pairs in sets]
        if self.reference is None:
            return found
        with self.arithmetic():
            filled = iter(self.reference.added_to([micro for part in found for micro in part]))
        return [[next(filled) for _ in part] for part in found]

    def arithmetic(self) -> AbstractContextManager[None]:
        """In which every log-probability of the loss is taken."""
        return arithmetic(self.precision, self.policy.device)

    def forward(self, micro: PairBatch, model: nn.Module | None = None) -> tuple[PairLogps[Tensor], PairTerms[Tensor]]:
        """Log-probabilities, losses and score weights of a microbatch.

        Args:
            micro: The microbatch.
            model: What is called: a wrapper around the policy's model, where there is one.

        Raises:
            UserError: A log-probability is not finite; the pair is named.
        """
        with self.arithmetic():
            policy = sequence_logprobs(token_logprobs(model or self.policy.model, micro.batch))
        check_finite(policy.detach(), micro.names)
        return self.terms(micro, policy)

    def terms(self, micro: PairBatch, policy: Tensor) -> tuple[PairLogps[Tensor], PairTerms[Tensor]]:
        """The same from log pi_theta of its rows."""
        logps = micro.logps(policy)
        return logps, self.objective(logps)


@dataclass(frozen=True)
class Backward:
    """How losses of microbatches become gradients on the weights, under whatever accelerate has wrapped the model in.

    Wrappers average gradients over processes, so losses are multiplied by their number: what arrives is the sum.
    DistributedDataParallel adds processes up at the last microbatch of a batch; FSDP2 and ZeRO at every one, since a
    process would hold the whole, unsharded gradient until then.

    Attributes:
        accelerator: accelerate's.
        model: The wrapped model.
    """

    accelerator: Any
    model: nn.Module

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one."""
        kind = self.accelerator.distributed_type.value
        if kind == "FSDP":
            self.model.set_requires_gradient_sync(True)  # type: ignore[operator]
        elif kind == "DEEPSPEED":  # which must know what it need not add to; `step` takes the step
            engine: Any = self.model
            engine.set_gradient_accumulation_boundary(last and self.accelerator.sync_gradients)
        elif not last:
            with self.accelerator.no_sync(self.model):
                yield
            return
        yield

    def __call__(self, loss: Tensor) -> None:
        """Adds the gradient of a part of the loss."""
        if not loss.requires_grad:  # what no weight has a gradient of is refused at the end of the batch
            return
        loss = loss * self.accelerator.num_processes
        if self.accelerator.distributed_type.value == "DEEPSPEED":  # accelerate would take the step at once
            engine: Any = self.model
            engine.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)


def zero_gradients(engine: Any) -> list[Tensor]:
    """This process's parts of the gradients under DeepSpeed's ZeRO, which takes them off the weights."""
    groups = engine.optimizer.averaged_gradients.values()
    return [part for group in groups if group is not None for part in group if part is not None]


def add_gradient(
    pair_model: PairModel, weighted: Sequence[tuple[PreferencePair, float]], backward: Backward, observe: Observe
) -> Tensor:
    """Adds the gradient of a weighted sum of pairs' losses to the weights'.

    Args:
        pair_model: The model and the loss.
        weighted: This process's pairs, and the weight of each.
        backward: Where losses go.
        observe: Told about every microbatch.

    Returns:
        The sum of this process's part.

    Raises:
        UserError: A log-probability is not finite; the pair is named.
    """
    loss = torch.zeros((), dtype=torch.float64, device=pair_model.policy.device)
    (micros,) = pair_model.plan([pair for pair, _ in weighted])
    for number, micro in enumerate(micros, start=1):
        share = torch.tensor([weighted[i][1] for i in micro.members], dtype=torch.float64, device=loss.device)
        with backward.microbatch(last=number == len(micros)), torch.enable_grad():
            logps, terms = pair_model.forward(micro, backward.model)
            part = (share * terms.loss).sum() * (not micro.spare)
            backward(part)
        if not micro.spare:
            loss += part.detach()
            observe([pair.mode for pair in micro.pairs], share, logps, terms)
    return loss


def shares(prompt: Example, alpha: float) -> list[tuple[PreferencePair, float]]:
    """The prompt's pairs with their weight in its loss, alpha and 1 - alpha; those without weight are not run."""
    found = ((prompt.trace_pair, alpha), (prompt.empty_pair, 1 - alpha))
    return [(pair, share) for pair, share in found if pair is not None and share]


def check_gradient(
    loss: Tensor, gradients: Sequence[Tensor], prompts: Sequence[Example], summed: Callable[[Tensor], Tensor]
) -> None:
    """Refuses a step whose loss or gradient is not finite, before it reaches the optimizer; in all processes alike.

    Args:
        loss: This process's part of the loss.
        gradients: This process's parts of the gradients.
        prompts: The step's prompts, for the message.
        summed: Adds a tensor up over processes.

    Raises:
        UserError: Names the step's prompts.
    """
    # One number to look at: a norm is finite exactly if every entry is (float64 keeps float32's squares from overflow).
    norms = [torch.linalg.vector_norm(own_part(gradient), dtype=torch.float64) for gradient in gradients]
    total = torch.stack([loss.detach(), *(norm.to(loss.device) for norm in norms)]).sum()
    seen = summed(torch.stack([total, loss.detach(), total.new_tensor(float(len(norms)))]))
    if not float(seen[2]):
        raise UserError(
            "No trained weight has a gradient: the loss does not depend on any of them, so a step would train nothing. "
            "Are the weights that require gradients part of the model that is run?"
        )
    if bool(torch.isfinite(seen[0])):
        return
    what = "loss" if not bool(torch.isfinite(seen[1])) else "gradient"
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
    """Sums over prompts, of all processes, of the gradients of either set, each one vector over all trained weights.

    Of sharded weights each process has its own part (`Shards`).

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


def add_parted_gradient(
    pair_model: PairModel,
    prompts: Sequence[Example],
    alpha: float,
    share: float,
    total: int,
    backward: Backward,
    observe: Observe,
) -> tuple[Tensor, SetGradients, Passes]:
    """Adds the gradient of a batch as `add_gradient` does, and returns the gradients of D_t and D_e apart.

    The same forward and backward passes over the same pairs, in microbatches of one set each: what it costs is a
    vector.

    Args:
        pair_model: The model and the loss.
        prompts: This process's prompts, each with both pairs.
        alpha: Weight of the trace loss.
        share: Weight of a prompt in the step's loss; 0 for a process that has nothing to do but to keep step.
        total: Prompts of the batch in all processes.
        backward: Where losses go.
        observe: Told about every microbatch.

    Returns:
        This process's part of the loss, the sums of both sets, and the passes over D_t.

    Raises:
        UserError: A log-probability is not finite; the pair is named.
    """
    weights, counted = pair_model.weights, 1.0 if share else 0.0
    earlier = _taken(weights)  # of batches that were accumulated before
    loss = torch.zeros((), dtype=torch.float64, device=pair_model.policy.device)
    sides: list[list[Tensor | None]] = []
    passes: Passes = []
    parted = pair_model.plan(*([example.both[which] for example in prompts] for which in (0, 1)))
    for which, (micros, weight) in enumerate(zip(parted, (alpha, 1 - alpha), strict=True)):
        for number, micro in enumerate(micros, start=1):
            with backward.microbatch(last=number == len(micros)), torch.enable_grad():
                logps, terms = pair_model.forward(micro, backward.model)
                backward(terms.loss.sum() * (0.0 if micro.spare else counted))
            if which == 0:
                passes.append((micro, replace(logps, chosen=logps.chosen.detach(), rejected=logps.rejected.detach())))
            if not micro.spare and share:
                each = torch.full_like(terms.loss.detach(), weight * share)
                loss += (each * terms.loss.detach()).sum()
                observe([pair.mode for pair in micro.pairs], each, logps, terms)
        sides.append(_taken(weights))
    part = share or 1 / total
    for owner, before, t, e in zip(weights, earlier, *sides, strict=True):
        mixed = None if t is None and e is None else _mix(t, alpha * part, e, (1 - alpha) * part)
        owner.grad = mixed if before is None else before if mixed is None else before.add_(mixed)
    trace, empty = (_flat(side, weights) for side in sides)
    return loss, SetGradients(trace, empty, total), passes


def _taken(weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The weights' gradients, which they have no more."""
    found = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    return found


def _mix(t: Tensor | None, share: float, e: Tensor | None, rest: float) -> Tensor:
    if t is None or e is None:
        only, factor = (e, rest) if t is None else (t, share)
        assert only is not None
        return only * factor
    return t.mul(share).add_(e, alpha=rest)


def _flat(side: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Float[Tensor, " parameters"]:
    """Gradients as one vector; weights that were not reached count as zero."""
    pieces = [
        own_part(torch.zeros_like(weight) if g is None else g)
        .flatten()
        .to(torch.promote_types(weight.dtype, torch.float32))
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
        direction: v, over all trained weights; this process's part of them where they are sharded.
        reach: How far along it the second pass is; the result is divided by its square.

    Returns:
        The sum over this process's pairs, and their number.
    """
    if pair_model.precision is not None:
        pair_model = replace(pair_model, precision=None)
        passes = [(micro, pair_model.forward(micro)[0]) for micro, _ in passes]
    weights = [own_part(weight.detach()) for weight in pair_model.weights]
    kept = [weight.clone() for weight in weights]
    total, pairs, start = 0.0, 0, 0
    try:
        for weight in weights:
            piece = direction[start : start + weight.numel()].reshape(weight.shape)
            weight.add_(piece.to(weight.dtype), alpha=reach)
            start += weight.numel()
        gather_anew(pair_model.policy.model)
        for micro, before in passes:
            with pair_model.arithmetic():
                after = micro.logps(sequence_logprobs(token_logprobs(pair_model.policy.model, micro.batch)))
            if not micro.spare:
                total += float(pair_model.objective.curvature(before, after).double().sum())
                pairs += len(micro.pairs)
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
        gather_anew(pair_model.policy.model)
    return total / reach**2, pairs


def gather_anew(model: nn.Module) -> None:
    """Lets FSDP2 forget the weights that it has gathered and kept: their shards were changed under it."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None and hasattr(module, "unshard"):
            reshard()


@dataclass(frozen=True)
class Shards:
    """Vectors over all trained weights, of which each process holds the part of its shards; all of it without FSDP2.

    Attributes:
        weights: The trained weights, as they are now.
        summed: Adds a tensor up over processes.
    """

    weights: Sequence[Tensor]
    summed: Callable[[Tensor], Tensor]

    @property
    def sharded(self) -> bool:
        """Whether a process holds but a part."""
        return any(hasattr(weight, "to_local") for weight in self.weights)

    def total(self, products: Any) -> Any:
        """Inner products of whole vectors, from those of the parts."""
        return self.summed(torch.as_tensor(products)).cpu().numpy() if self.sharded else products

    def whole(self, vector: Tensor) -> Tensor:
        """The whole vector, from everyone's part; for every process to call."""
        if not self.sharded:
            return vector
        from torch.distributed.tensor import DTensor

        sizes = [own_part(weight).shape for weight in self.weights]
        pieces = vector.split([size.numel() for size in sizes])
        found = []
        for weight, size, piece in zip(self.weights, sizes, pieces, strict=True):
            like: Any = weight
            dtensor = DTensor.from_local(
                piece.reshape(size), like.device_mesh, like.placements, shape=weight.shape, stride=weight.stride()
            )
            found.append(dtensor.full_tensor().flatten())
        return torch.cat(found)

    def part(self, vector: Tensor) -> Tensor:
        """This process's part of a whole vector."""
        if not self.sharded:
            return vector
        from torch.distributed.tensor import distribute_tensor

        pieces = vector.split([weight.numel() for weight in self.weights])
        found = []
        for weight, piece in zip(self.weights, pieces, strict=True):
            like: Any = weight
            spread = distribute_tensor(
                piece.reshape(weight.shape), like.device_mesh, like.placements, src_data_rank=None
            )
            found.append(own_part(spread).flatten())
        return torch.cat(found)
