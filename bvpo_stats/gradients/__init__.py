"""Objectives as weights on scores, and the per-prompt gradients g_t, g_e and marginal.

Names are loaded when they are first used, since they bring torch along.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Example": "examples",
    "Joined": "examples",
    "Objective": "objectives",
    "PairGradients": "stream",
    "Reference": "reference",
    "StreamOptions": "options",
    "gradient_batches": "stream",
    "join": "examples",
    "pair_gradients": "stream",
}

__all__ = [
    "Example",
    "Joined",
    "Objective",
    "PairGradients",
    "Reference",
    "StreamOptions",
    "gradient_batches",
    "join",
    "pair_gradients",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
