"""A loss whose gradient was taken beforehand, microbatch by microbatch, and the way through a distributed wrapper.

`transformers.Trainer` asks `compute_loss` for one scalar and runs its backward. A step here goes through the model in
several microbatches, each with a backward of its own, so that memory is bounded by the microbatch; what is handed over
is the scalar with the finished gradient attached. To the Trainer, to gradient accumulation and to the reduction over
processes it looks like any other loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def with_gradient(value: Tensor, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """The scalar ``value``; its backward adds ``gradients`` to the weights' (and may overwrite them: give them away).

    Args:
        value: The loss.
        weights: Parameters that require gradients.
        gradients: The derivative of the loss by each; None where the loss does not depend on one.
    """
    return _Deposit.apply(value, list(gradients), *weights)


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
