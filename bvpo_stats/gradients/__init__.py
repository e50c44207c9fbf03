"""Objectives as weights on scores, and the per-prompt gradients g_t, g_e and marginal.

Names are loaded when they are first used, since they bring torch along.
"""

from __future__ import annotations

from bvpo_stats.lazy import on_first_use

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


__getattr__ = on_first_use(__name__, _HOMES)
