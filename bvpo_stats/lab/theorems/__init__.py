"""The paper's theorems as checks: claim, measured value, exact value, verdict.

``run_theorems`` makes them all; each topic is a function of a `Ground` that returns a `TopicReport`. Names are loaded
when they are first used, so that reading a report imports no torch.
"""

from __future__ import annotations

from bvpo_stats.lazy import on_first_use

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


__getattr__ = on_first_use(__name__, _HOMES)
