"""Layers whose backward forms every sequence's own weight gradient instead of the batch's sum.

The ordinary backward of a Linear layer multiplies [out, sequences * tokens] by [sequences * tokens, in]. Here the same
product is taken per sequence, [out, tokens] by [tokens, in], which is the same arithmetic: the scores *replace* the
weight gradient rather than adding to it. For LoRA the whole layer W x + scaling * B A x is one autograd node, so that
the scaling and the sums that the composed layer makes at [tokens, out] and [tokens, in] are folded into the matrix
products; this pays for the cost of leaving the built-in nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from bvpo_stats.errors import UserError
from bvpo_stats.model.sinks import Mixture, Sink
from bvpo_stats.model.subset import LinearSite, LoraSite, Probe, Subset, attention_advice

_BMM_WITH_OUT_DTYPE = hasattr(torch.ops.aten.bmm, "dtype")


@dataclass
class Tape:
    """Bookkeeping of one forward and backward: which weights are still to come, and where complete scores go.

    Attributes:
        sequences: Rows of the batch.
        anchor: An input of every captured layer, so that backward reaches it whether or not weights require gradients;
            ``torch.autograd.grad`` with respect to it runs exactly the nodes that lead to captured layers.
        sinks: Receivers of complete scores.
        mix: Optional linear map of sequences to rows, applied before the sinks.
        counting: True during the forward pass. Off in backward, where checkpointing runs layers a second time.
        uses: Outstanding uses per weight; a weight used twice is complete after two contributions.
        partial: Scores of weights with outstanding uses.
        model: Whose layers these are, for messages.
    """

    sequences: int
    anchor: Tensor
    sinks: Sequence[Sink]
    mix: Mixture | None = None
    counting: bool = True
    uses: dict[str, int] = field(default_factory=dict)
    partial: dict[str, Tensor] = field(default_factory=dict)
    model: nn.Module | None = None

    def expect(self, name: str | None) -> None:
        """Counts one use of a weight in the forward pass."""
        if name is not None and self.counting and torch.is_grad_enabled():
            self.uses[name] = self.uses.get(name, 0) + 1

    def add(self, name: str, scores: Float[Tensor, "sequences ..."]) -> None:
        """Takes the scores of one use; hands the weight's sum over uses on when it is complete."""
        if name in self.partial:
            scores = self.partial.pop(name).add_(scores)
        self.uses[name] -= 1
        if self.uses[name] > 0:
            self.partial[name] = scores
        else:
            self._emit(name, scores)

    def finish(self) -> None:
        """Hands on the weights of which some use did not lead to the objective."""
        for name, scores in self.partial.items():
            self._emit(name, scores)
        self.partial.clear()

    def _emit(self, name: str, scores: Tensor) -> None:
        if self.mix is not None:
            scores = self.mix(scores)
        for sink in self.sinks:
            sink(name, scores)


@contextlib.contextmanager
def captured(subset: Subset, tape: Tape) -> Iterator[None]:
    """Within it, the subset's layers form scores in backward and give them to the tape; weights get no ``.grad``.

    Args:
        subset: The layers.
        tape: Where the scores go. The backward pass must run inside the context too: checkpointing calls the layers
            again in backward.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for site in subset.sites:
            replaced.append((site.layer, site.layer.__dict__.get("forward")))
            if isinstance(site, LoraSite):
                site.layer.forward = _lora_forward(site, tape)
            else:
                site.layer.forward = _linear_forward(site, tape, subset.probe)
        yield
    finally:
        for layer, forward in replaced:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _lora_forward(site: Any, tape: Tape) -> Callable[..., Tensor]:
    layer, adapter = site.layer, site.adapter
    base, a, b = layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter]
    terms = _LoraTerms(site, tape, float(layer.scaling[adapter]), isinstance(base, Conv1D))

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        tape.expect(site.name_a)
        tape.expect(site.name_b)
        rows = _rows(site.name, x, tape)
        y = _LoraScores.apply(tape.anchor, rows, base.weight, base.bias, a.weight, b.weight, terms)  # type: ignore[no-untyped-call]
        return _shaped_like(y, x)

    return forward


def _linear_forward(site: LinearSite, tape: Tape, probe: Probe | None) -> Callable[..., Tensor]:
    layer, transposed, a = site.layer, isinstance(site.layer, Conv1D), None
    if probe is not None:
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        a = probe.matrix(site.name_weight, layer.weight.shape[0 if transposed else 1]).to(layer.weight.device, wide)

    def forward(x: Tensor) -> Tensor:
        tape.expect(site.name_weight)
        rows = _rows(site.name, x, tape)
        y = _LinearScores.apply(tape.anchor, rows, layer.weight, layer.bias, a, site, tape, transposed)  # type: ignore[no-untyped-call]
        return _shaped_like(y, x)

    return forward


def _rows(name: str, x: Tensor, tape: Tape) -> Tensor:
    """A layer's input as [sequences, tokens, features]; some models have heads between sequences and tokens."""
    if x.dim() < 3 or x.shape[0] != tape.sequences:
        raise UserError(
            f"{name}: its input has shape {tuple(x.shape)}, not [{tape.sequences} sequences, tokens, features]; layers "
            "that mix sequences (mixture-of-experts routing, for one) are not supported. "
            f"{attention_advice(tape.model)}"
        )
    return x if x.dim() == 3 else x.flatten(1, -2)


def _shaped_like(y: Tensor, x: Tensor) -> Tensor:
    return y if x.dim() == 3 else y.unflatten(1, x.shape[1:-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return nn.functional.linear(x, weight.T if transposed else weight, bias)


def _input_gradient(grad: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return grad @ (weight.T if transposed else weight)


def per_sequence_product(
    left: Float[Tensor, "sequences tokens m"], right: Float[Tensor, "sequences tokens n"]
) -> Float[Tensor, "sequences m n"]:
    """left[s].T @ right[s] for every sequence s, with the result in float32 or better.

    Args:
        left: One factor, e.g. the gradient of a layer's output.
        right: The other, e.g. its input.
    """
    dtype = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(dtype), right.to(dtype)
    if dtype.itemsize >= 4:
        return torch.bmm(left.mT, right)
    if left.is_cuda and _BMM_WITH_OUT_DTYPE:
        return torch.bmm(left.mT, right, out_dtype=torch.float32)
    # One sequence at a time: a float32 copy of a whole batch's activations would cost more memory than the scores.
    scores = left.new_empty(left.shape[0], left.shape[2], right.shape[2], dtype=torch.float32)
    for row in range(left.shape[0]):
        torch.mm(left[row].float().T, right[row].float(), out=scores[row])
    return scores


@dataclass(frozen=True)
class _LoraTerms:
    """The constants of one LoRA layer."""

    site: Any
    tape: Tape
    scaling: float
    transposed: bool


class _LoraScores(torch.autograd.Function):
    """y = W x + bias + scaling * B A x; backward gives grad x and hands dA, dB per sequence to the tape."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, terms: Any
    ) -> Tensor:
        y = _linear(x, weight, bias, terms.transposed)
        low = nn.functional.linear(x.to(a.dtype), a)  # [sequences, tokens, r]
        if y.dtype == b.dtype:
            y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.T, alpha=terms.scaling)
        else:  # a float32 adapter on a half-precision base, as PEFT makes it
            y = (y + nn.functional.linear(low, b).mul_(terms.scaling)).to(y.dtype)
        ctx.terms = terms
        ctx.save_for_backward(x, low, weight, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, low, weight, a, b = ctx.saved_tensors
        terms = ctx.terms
        wide = grad.to(b.dtype)
        grad_low = (wide @ b).mul_(terms.scaling)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = _input_gradient(grad, weight, terms.transposed)
            if grad_x.dtype == a.dtype:
                grad_x.view(-1, grad_x.shape[-1]).addmm_(grad_low.view(-1, grad_low.shape[-1]), a)
            else:
                grad_x += grad_low @ a
        if terms.site.name_b is not None:
            terms.tape.add(terms.site.name_b, per_sequence_product(wide, low * terms.scaling))
        if terms.site.name_a is not None:
            terms.tape.add(terms.site.name_a, per_sequence_product(grad_low, x.to(a.dtype)))
        return None, grad_x, None, None, None, None, None


class _LinearScores(torch.autograd.Function):
    """y = W x + bias; backward gives grad x and hands dW per sequence to the tape; dW A', from x A', under a probe."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        site: LinearSite,
        tape: Tape,
        transposed: bool,
    ) -> Tensor:
        ctx.site, ctx.tape, ctx.transposed = site, tape, transposed
        ctx.inputs_first = transposed and a is None  # what a probe sees is [out, r] either way
        kept = x if a is None else nn.functional.linear(x, a) if x.dtype == a.dtype else _wide_product(x, a)
        ctx.save_for_backward(kept, weight)
        return _linear(x, weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kept, weight = ctx.saved_tensors
        grad_x = _input_gradient(grad, weight, ctx.transposed) if ctx.needs_input_grad[1] else None
        scores = per_sequence_product(kept, grad) if ctx.inputs_first else per_sequence_product(grad, kept)
        ctx.tape.add(ctx.site.name_weight, scores)
        return None, grad_x, None, None, None, None, None, None


def _wide_product(x: Tensor, a: Tensor) -> Tensor:
    """X A' of half-precision x with a float32 A, one sequence at a time."""
    low = x.new_empty(x.shape[0], x.shape[1], a.shape[0], dtype=a.dtype)
    for row in range(x.shape[0]):
        torch.mm(x[row].to(a.dtype), a.T, out=low[row])
    return low
