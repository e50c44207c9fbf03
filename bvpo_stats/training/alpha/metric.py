"""The optimizer's metric: a step is -eta P g with P diagonal, read from the optimizer's own state.

| state of a weight | optimizers | P |
|---|---|---|
| ``exp_avg_sq`` | Adam, AdamW, NAdam, RAdam, AdamW of transformers and bitsandbytes in 32 bits | 1 / (sqrt(v / (1 -
beta_2^k)) + eps) |
| ``square_avg`` | RMSprop | 1 / (sqrt(v) + eps) |
| ``sum`` | Adagrad | 1 / (sqrt(v) + eps) |
| ``momentum_buffer``, or nothing | SGD | 1 |

Anything else (quantised or factored moments, sharded state) has no such diagonal to read; SGD's metric stands in, and
the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
_PLAIN = {"momentum_buffer"}


def optimizer_metric(optimizer: Any, weights: Sequence[Tensor]) -> tuple[Float[Tensor, " parameters"] | None, str]:
    """P at the present state, for weights strung together, and its name in a sentence.

    Args:
        optimizer: A torch optimizer, wrapped by accelerate or not.
        weights: The trained weights.

    Returns:
        None for the identity.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    name, state = type(inner).__name__, getattr(inner, "state", {})
    groups = {weight: group for group in getattr(inner, "param_groups", []) for weight in group["params"]}
    pieces: list[Tensor | None] = []
    for weight in weights:
        own, group = state.get(weight, {}), groups.get(weight, {})
        moments = next((own[key] for key in _MOMENTS if key in own), None)
        if moments is None and set(own) <= _PLAIN and "momentum" in group:
            pieces.append(None)
        elif not isinstance(moments, Tensor) or moments.shape != weight.shape or not moments.is_floating_point():
            return None, f"that of SGD, for {name} has no second moments of single weights to read"
        else:
            pieces.append(_diagonal(own, group, moments))
    if all(piece is None for piece in pieces):
        return None, f"that of {name}: the identity"
    if any(piece is None for piece in pieces):
        return None, f"that of SGD, for {name} has second moments of some weights only"
    return torch.cat([piece for piece in pieces if piece is not None]), f"that of {name}: 1 / (sqrt(v) + eps)"


def _diagonal(own: dict[str, Any], group: dict[str, Any], moments: Tensor) -> Tensor:
    second = own.get("max_exp_avg_sq", moments).to(torch.promote_types(moments.dtype, torch.float32)).flatten()
    if "exp_avg_sq" in own and "step" in own:
        beta = float(group["betas"][1])
        second = second / (1 - beta ** max(float(own["step"]), 1.0))
    return 1 / (second.sqrt() + float(group.get("eps", 1e-8)))
