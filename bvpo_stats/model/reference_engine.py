"""The yardstick: scores by ``torch.func``, plainly written, for any parameters.

``vmap(grad(functional_call))`` differentiates each sequence's log-probability on its own, with the model's own forward,
eager attention and full logits. (``torch.func`` is the present home of functorch.) It is obviously correct, and slow;
the fast engine is tested against it in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import Batch
from bvpo_stats.model.head import causal_lm_of

_PLAIN = "bvpo_stats_plain"


def reference_scores(
    model: nn.Module, names: Sequence[str], batch: Batch, *, chunk_sequences: int | None = None
) -> dict[str, Float[Tensor, "sequences ..."]]:
    """Scores s_i = grad_theta log pi_theta(completion_i | prompt_i) for any named parameters.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not, with dropout off.
        names: Parameter names, as in ``model.named_parameters()``; norms, biases and embeddings included.
        batch: The sequences, on the model's device.
        chunk_sequences: Sequences differentiated at once; None for all.

    Returns:
        Scores by parameter name.

    Raises:
        UserError: No names, or one that is not a parameter.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in names if name not in parameters]
    if unknown or not names:
        raise UserError(f"Not a parameter of the model: {unknown[0]}." if unknown else "No parameters are selected.")
    chosen = {name: parameters[name].detach() for name in names}

    def logprob(
        theta: dict[str, Tensor], input_ids: Int[Tensor, " tokens"], completion: Float[Tensor, " targets"]
    ) -> Tensor:
        # Right padding under causal attention: no mask is needed, see Batch.
        output: Any = functional_call(model, theta, kwargs={"input_ids": input_ids[None, :-1], "use_cache": False})
        logps = torch.log_softmax(output.logits[0], dim=-1)
        return (logps.gather(1, input_ids[1:, None]).squeeze(1) * completion).sum()

    per_sequence = vmap(grad(logprob), in_dims=(None, 0, 0), chunk_size=chunk_sequences)
    dtype = next(iter(chosen.values())).dtype
    with plain_attention(model):
        return per_sequence(chosen, batch.input_ids, batch.completion_mask.to(dtype))


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within it, attention is eager: plain matrix products and a softmax, in the model's own dtype.

    Fused kernels have no batching rule for their backward, and transformers' own eager attention takes the softmax in
    float32 even in a float64 model.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not.
    """
    AttentionInterface.register(_PLAIN, _attend)
    AttentionMaskInterface.register(_PLAIN, eager_mask)
    causal_lm: Any = causal_lm_of(model)
    before = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation(_PLAIN)
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Float[Tensor, "sequences heads tokens width"],
    key: Float[Tensor, "sequences key_heads tokens width"],
    value: Float[Tensor, "sequences key_heads tokens width"],
    attention_mask: Float[Tensor, "#sequences 1 tokens tokens"],
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "sequences tokens heads width"], None]:
    """softmax(scaling * Q K' + mask) V with grouped keys and values, in transformers' calling convention."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = torch.softmax(scaling * query @ key.mT + attention_mask, dim=-1)
    return (weights @ value).transpose(1, 2), None
