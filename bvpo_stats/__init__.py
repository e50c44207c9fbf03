"""Gradient statistics for aligning large reasoning models: bias, variance and the optimal BVPO mixing weight.

The front door: from a model and questions to alpha* and a trained adapter. Names are loaded when they are first used,
so that importing the package costs nothing.

    import bvpo_stats as bvpo

    policy = bvpo.load_policy("embedded", lora=8)
    samples = bvpo.sample(policy, "embedded", n=5, temperature=1.0)
    pairs = bvpo.make_pairs(samples, reward="embedded")
    print(bvpo.alpha_star(policy, pairs, batch_size=128))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bvpo_stats.lazy import on_first_use

__version__ = "0.2.0"

if TYPE_CHECKING:
    from bvpo_stats.errors import UserError
    from bvpo_stats.gradients.objectives import Objective
    from bvpo_stats.gradients.stream import pair_gradients
    from bvpo_stats.model.policy import Policy, load_policy
    from bvpo_stats.records import Completion, PreferencePair, Prompt, TraceRecord
    from bvpo_stats.sampling.pairs import make_pairs
    from bvpo_stats.sampling.sample import sample
    from bvpo_stats.sampling.traces import make_traces
    from bvpo_stats.statistics.alpha import alpha_from_gradients
    from bvpo_stats.statistics.moments import Moments
    from bvpo_stats.store.tables import read_records, write_records
    from bvpo_stats.studies.alpha_star.report import AlphaReport
    from bvpo_stats.studies.alpha_star.run import alpha_star
    from bvpo_stats.training.config import BVPOConfig
    from bvpo_stats.training.trainer import BVPOTrainer

_HOMES = {
    "AlphaReport": "studies.alpha_star.report",
    "BVPOConfig": "training.config",
    "BVPOTrainer": "training.trainer",
    "Completion": "records",
    "Moments": "statistics.moments",
    "Objective": "gradients.objectives",
    "Policy": "model.policy",
    "PreferencePair": "records",
    "Prompt": "records",
    "TraceRecord": "records",
    "UserError": "errors",
    "alpha_from_gradients": "statistics.alpha",
    "alpha_star": "studies.alpha_star.run",
    "load_policy": "model.policy",
    "make_pairs": "sampling.pairs",
    "make_traces": "sampling.traces",
    "pair_gradients": "gradients.stream",
    "read_records": "store.tables",
    "sample": "sampling.sample",
    "write_records": "store.tables",
}

__all__ = [
    "AlphaReport",
    "BVPOConfig",
    "BVPOTrainer",
    "Completion",
    "Moments",
    "Objective",
    "Policy",
    "PreferencePair",
    "Prompt",
    "TraceRecord",
    "UserError",
    "alpha_from_gradients",
    "alpha_star",
    "load_policy",
    "make_pairs",
    "make_traces",
    "pair_gradients",
    "read_records",
    "sample",
    "write_records",
]


__getattr__ = on_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
