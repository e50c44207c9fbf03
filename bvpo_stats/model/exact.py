"""Attention and norms in the model's own dtype: what comparing engines in float64 needs.

Transformers computes RMSNorm in float32 whatever the model's dtype, and its eager attention the softmax. Two exact
orders of the same float64 computation then differ by 1e-8 to 1e-6, wherever a last bit decides a float32 rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from bvpo_stats.model.head import causal_lm_of

_PLAIN = "bvpo_stats_plain"


def use_plain_attention(model: nn.Module) -> None:
    """Makes attention eager: plain matrix products and a softmax, in the model's own dtype.

    Fused kernels have no batching rule for their backward, and transformers' own eager attention takes the softmax in
    float32 even in a float64 model.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not; its configuration is changed.
    """
    AttentionInterface.register(_PLAIN, _attend)
    AttentionMaskInterface.register(_PLAIN, eager_mask)
    causal_lm: Any = causal_lm_of(model)
    causal_lm.set_attn_implementation(_PLAIN)


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within it, the model attends as after :func:`use_plain_attention`.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not.
    """
    causal_lm: Any = causal_lm_of(model)
    before = causal_lm.config._attn_implementation
    use_plain_attention(model)
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


def replace_norms(model: nn.Module) -> None:
    """Replaces RMSNorm layers by torch's own, which computes in the model's dtype; weights are kept.

    Args:
        model: A transformers causal LM; changed in place.
    """
    for parent in list(model.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, norm in children:
            if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
                exact = nn.RMSNorm(tuple(norm.weight.shape), eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact.train(norm.training))
