"""bfloat16 on CPUs: whether it would be faster here, measured."""

from __future__ import annotations

import time

import torch

from bvpo_stats.model.policy import Policy
from bvpo_stats.progress import say

_WORTH = 1.3  # times as fast: less does not pay for coarser arithmetic
_ROWS = 32  # of the products that are timed: some responses drawn together
_TIMES = 5
_LEAST = 512  # width of a layer under which products are not what takes time


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16 (AMX, AVX-512 BF16)."""
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in asked)


def offer_bfloat16(policy: Policy) -> float | None:
    """Says where a model in float32 on a CPU would draw faster in bfloat16; nothing is changed.

    Decided by a product with the model's largest layer, timed for some milliseconds, on CPUs that have the
    instructions.

    Returns:
        How many times as fast, where it was said.
    """
    if policy.device.type != "cpu" or policy.model.dtype != torch.float32 or not cpu_has_bfloat16():
        return None
    weights = (w for w in policy.model.parameters() if w.ndim == 2)
    largest = max(weights, key=lambda w: w.numel(), default=None)
    if largest is None or min(largest.shape) < _LEAST:
        return None
    slow, fast = (_seconds(largest.detach().to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    if slow < _WORTH * fast:
        return None
    say(
        f"This CPU multiplies bfloat16 {slow / fast:.1f} times as fast as float32: `dtype='bfloat16'` draws and scores "
        "faster, in coarser arithmetic. Nothing was changed."
    )
    return slow / fast


@torch.inference_mode()
def _seconds(weight: torch.Tensor) -> float:
    """The shortest of some products with a weight."""
    rows = torch.ones(_ROWS, weight.shape[1], dtype=weight.dtype)
    found = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        rows @ weight.T
        found.append(time.perf_counter() - started)
    return min(found)
