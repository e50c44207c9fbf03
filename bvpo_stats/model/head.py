"""Token log-probabilities without full logits: a chunked language-model head."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import Batch

# A chunk's logits in the precision of the softmax. 4,096 tokens x 151,936 words would be 2.5 GB at once.
CHUNK_BYTES = 128 * 2**20

# Settings that change logits after the head; each would silently score another distribution than the model's.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "dim_model_base")


_ARITHMETIC: ContextVar[torch.dtype | None] = ContextVar("arithmetic", default=None)


@contextlib.contextmanager
def arithmetic(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Matrix products within are formed in another precision than the weights'; sums and the softmax are not.

    Autocast of torch, chunked head included: weights stay what they are, and so do their gradients. Every weight is
    cast in each forward: autocast's cache would hand casts that were made without gradients to a forward with.

    Args:
        dtype: Of the products, e.g. bfloat16; None for that of the weights, whatever autocast there is around.
        device: Where the model is.
    """
    before = _ARITHMETIC.set(dtype)
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            yield
    finally:
        _ARITHMETIC.reset(before)


def foreign_autocast() -> bool:
    """Whether autocast is on that `arithmetic` did not turn on."""
    return (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")) and _ARITHMETIC.get() is None


@dataclass(frozen=True)
class Head:
    """Weights of the output layer: logits = hidden @ weight.T + bias.

    Attributes:
        weight: Often tied to the input embedding.
        bias: None in most models.
    """

    weight: Float[Tensor, "words hidden"]
    bias: Float[Tensor, " words"] | None


def token_logprobs(
    model: nn.Module, batch: Batch, *, chunk_tokens: int | None = None
) -> Float[Tensor, "sequences targets"]:
    """Token log-probabilities log pi(token | before) of the completions, differentiable; 0 at all other targets.

    Only completion positions go through the head, ``chunk_tokens`` at a time, with the log-softmax in float32 (float64
    for a float64 model).

    Args:
        model: A transformers causal LM, wrapped by PEFT or not.
        batch: The sequences, on the model's device.
        chunk_tokens: Positions per chunk; None sizes a chunk's logits to 128 MB.

    Raises:
        UserError: The model's output layer is one that the chunked head cannot reproduce.
    """
    mask = batch.completion_mask
    scored = completion_scores(model, batch, functools.partial(head_logprobs, chunk_tokens=chunk_tokens))
    return scored.new_zeros(mask.shape).masked_scatter(mask, scored)


def completion_scores(
    model: nn.Module, batch: Batch, score: Callable[[Tensor, Head, Tensor], Tensor]
) -> Float[Tensor, "*leading positions"]:
    """``score(hidden, head, targets)`` of all completion positions of a batch, sequence after sequence.

    It is computed inside the calls of the model and of its output layer: their hooks are what gathers sharded weights
    (FSDP2, ZeRO-3) and gets the reduction of gradients ready (DistributedDataParallel).

    Args:
        model: A transformers causal LM, wrapped by PEFT, FSDP2, DistributedDataParallel or DeepSpeed, or not.
        batch: The sequences, on the model's device.
        score: Told the hidden states that predict the targets, the output layer's weights, and the targets.

    Raises:
        UserError: The model's output layer is one that the chunked head cannot reproduce.
    """
    layer, decoder, mask = output_layer(model), decoder_of(model), batch.completion_mask

    def inside_model() -> Tensor:
        # No attention mask: with right padding under causal attention no real token sees padding (see Batch).
        output = decoder(input_ids=batch.input_ids[:, :-1], use_cache=False)
        return layer(output.last_hidden_state[mask], batch.input_ids[:, 1:][mask])  # type: ignore[no-any-return]

    def inside_layer(hidden: Tensor, targets: Tensor) -> Tensor:
        return score(hidden, Head(layer.weight, layer.bias), targets)

    with _forward(unwrapped(model), inside_model), _forward(layer, inside_layer):
        return model()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _forward(module: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """Within it, the module's call computes a function instead."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


def sequence_logprobs(token_logps: Float[Tensor, "sequences targets"]) -> Float[Tensor, " sequences"]:
    """Sequence log-probabilities: log pi(completion | prompt) = sum over completion tokens, added up in float64.

    Args:
        token_logps: What :func:`token_logprobs` returns.
    """
    return token_logps.sum(dim=1, dtype=torch.float64)


def head_logprobs(
    hidden: Float[Tensor, "positions hidden"],
    head: Head,
    targets: Int[Tensor, " positions"],
    *,
    chunk_tokens: int | None = None,
) -> Float[Tensor, " positions"]:
    """The chunked head: log softmax(hidden @ weight.T + bias)[target] per position, forward and backward.

    Each log-probability depends on its own position only, so its gradient with respect to the hidden state,
    (onehot(target) - softmax) @ weight, is formed while the chunk's softmax is at hand and kept at the size of
    ``hidden``; backward only scales it. The logits are computed once and never stored. (A trainable head needs them
    again in backward, chunk by chunk.)

    Args:
        hidden: Last hidden states at the positions that predict ``targets``.
        head: The output layer.
        targets: The predicted tokens.
        chunk_tokens: Positions per chunk; None sizes a chunk's logits to 128 MB.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # which does not see into the function below
        weight, bias, dtype = head.weight, head.bias, torch.get_autocast_dtype(device)
        cast = Head(weight.to(dtype), None if bias is None else bias.to(dtype))
        with torch.autocast(device, enabled=False):
            return head_logprobs(hidden.to(dtype), cast, targets, chunk_tokens=chunk_tokens)
    if chunk_tokens is None:
        itemsize = _softmax_dtype(hidden.dtype).itemsize
        chunk_tokens = max(1, CHUNK_BYTES // (head.weight.shape[0] * itemsize))
    return _ChunkedLogProbs.apply(hidden, head.weight, head.bias, targets, chunk_tokens)  # type: ignore[no-untyped-call]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or DeepSpeed's engine, or the model itself."""
    inner = model._modules.get("module")
    return model if inner is None else unwrapped(inner)


def causal_lm_of(model: nn.Module) -> Any:
    """The transformers causal LM inside a wrapper, PEFT's or of several processes, or the model itself."""
    model = unwrapped(model)
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def decoder_of(model: nn.Module) -> nn.Module:
    """The part below the head: ``model`` in Qwen2, Qwen3 and Llama, ``transformer`` in GPT-2.

    Raises:
        UserError: The model is not a transformers causal LM with a decoder of its own.
    """
    causal_lm = causal_lm_of(model)
    prefix = getattr(causal_lm, "base_model_prefix", "")
    decoder = getattr(causal_lm, prefix, None) if prefix else None
    if not isinstance(decoder, nn.Module):
        raise UserError(
            f"{type(causal_lm).__name__} has no decoder under its base_model_prefix {prefix!r}; "
            "use a transformers causal language model."
        )
    return decoder


def output_layer(model: nn.Module) -> nn.Linear:
    """The output layer.

    Raises:
        UserError: It is not a plain Linear (an adapter sits on it), or the model transforms logits after it
            (softcapping, scaling).
    """
    causal_lm = causal_lm_of(model)
    layer = causal_lm.get_output_embeddings()
    kind = type(layer)
    if kind.__name__ == f"FSDP{nn.Linear.__name__}" and issubclass(kind, nn.Linear):  # fully_shard changes the class
        kind = nn.Linear
    if kind is not nn.Linear:
        raise UserError(
            f"The output layer of {type(causal_lm).__name__} is {kind.__module__}.{kind.__name__}, not a "
            "plain Linear; the chunked head does not support adapters or quantisation there. Leave the head out of "
            "the adapter's targets and modules_to_save."
        )
    for setting in _LOGIT_TRANSFORMS:
        value = getattr(causal_lm.config, setting, None)
        if value is not None and value != 1.0:
            raise UserError(f"{type(causal_lm).__name__} uses {setting}={value}; the chunked head does not support it.")
    return cast(nn.Linear, layer)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of one chunk and the softmax, which overwrites the logits: one buffer, not three."""
    logits = nn.functional.linear(hidden, weight, bias).to(_softmax_dtype(hidden.dtype))
    picked = logits.gather(1, targets[:, None])
    peak = logits.amax(dim=1, keepdim=True)
    exponentials = logits.sub_(peak).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    logprobs = (picked - peak - total.log()).squeeze(1)
    return logprobs, exponentials.div_(total)


def _logit_gradient(softmax: Tensor, targets: Tensor) -> Tensor:
    """The derivative of log p(target) by the logits, onehot(target) - softmax, in place."""
    softmax.neg_()
    return softmax.scatter_add_(1, targets[:, None], softmax.new_ones(len(targets), 1))


class _ChunkedLogProbs(torch.autograd.Function):
    """The autograd node behind :func:`head_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_tokens: int,
    ) -> Tensor:
        logprobs = hidden.new_empty(hidden.shape[0], dtype=_softmax_dtype(hidden.dtype))
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logprobs[part], softmax = _chunk_softmax(hidden[part], weight, bias, targets[part])
            if jacobian is not None:
                torch.mm(_logit_gradient(softmax, targets[part]).to(weight.dtype), weight, out=jacobian[part])
            del softmax  # before the next chunk's logits are made
        head_is_trainable = any(ctx.needs_input_grad[1:3])
        ctx.chunk_tokens = chunk_tokens
        ctx.save_for_backward(jacobian, *((hidden, weight, bias, targets) if head_is_trainable else ()))
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        jacobian, *head_inputs = ctx.saved_tensors
        grad_hidden = None if jacobian is None else jacobian * grad[:, None].to(jacobian.dtype)
        grad_weight, grad_bias = _head_gradients(ctx, grad, *head_inputs) if head_inputs else (None, None)
        return grad_hidden, grad_weight, grad_bias, None, None


def _head_gradients(
    ctx: Any,
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a trainable head; recomputes each chunk's softmax."""
    needs_weight, needs_bias = ctx.needs_input_grad[1:3]
    grad_weight = torch.zeros_like(weight, dtype=_softmax_dtype(weight.dtype)) if needs_weight else None
    grad_bias = torch.zeros_like(bias, dtype=_softmax_dtype(weight.dtype)) if needs_bias and bias is not None else None
    for start in range(0, hidden.shape[0], ctx.chunk_tokens):
        part = slice(start, start + ctx.chunk_tokens)
        _, softmax = _chunk_softmax(hidden[part], weight, bias, targets[part])
        grad_logits = _logit_gradient(softmax, targets[part]).mul_(grad[part, None])
        if grad_weight is not None:
            grad_weight += grad_logits.to(weight.dtype).T @ hidden[part]
        if grad_bias is not None:
            grad_bias += grad_logits.sum(0)
        del softmax, grad_logits
    return (
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(weight.dtype),
    )
