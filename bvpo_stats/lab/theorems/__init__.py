"""The paper's theorems as checks: claim, measured value, exact value, verdict.

``run_theorems`` makes them all; each topic is a function of a `Ground` that returns a `TopicReport`. Names are loaded
when they are first used, so that reading a report imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "appendix_b": "log_probabilities",
    "batch_scaling": "alpha",
    "check_theorems": "run",
    "drift": "bias",
    "Ground": "ground",
    "marginal_gradient": "bias",
    "proposition1": "alpha",
    "reference_point": "bias",
    "run_theorems": "run",
    "theorem1": "variance",
    "theorem2": "alpha",
    "theorem3": "convergence",
    "theorem4": "convergence",
    "TheoremConfig": "config",
    "TheoremsReport": "report",
    "TopicReport": "report",
    "Check": "report",
}

__all__ = [
    "Check",
    "Ground",
    "TheoremConfig",
    "TheoremsReport",
    "TopicReport",
    "appendix_b",
    "batch_scaling",
    "check_theorems",
    "drift",
    "marginal_gradient",
    "proposition1",
    "reference_point",
    "run_theorems",
    "theorem1",
    "theorem2",
    "theorem3",
    "theorem4",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
