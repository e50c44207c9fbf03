"""Training: controllers of alpha, and the trainer that uses them."""

from typing import Any

from bvpo_stats.training.alpha import (
    AdaptiveController,
    AdaptiveOptions,
    AlphaRecord,
    Controller,
    FixedController,
    Observation,
    StepProducts,
    StepSize,
    from_state,
    make_controller,
)

__all__ = [
    "AdaptiveController",
    "AdaptiveOptions",
    "AlphaRecord",
    "BVPOConfig",
    "BVPOTrainer",
    "Controller",
    "FixedController",
    "Observation",
    "StepProducts",
    "StepSize",
    "from_state",
    "make_controller",
]


def __getattr__(name: str) -> Any:
    """The trainer and its settings on first use: they bring torch along, which the controllers do without."""
    if name == "BVPOConfig":
        from bvpo_stats.training.config import BVPOConfig

        return BVPOConfig
    if name == "BVPOTrainer":
        from bvpo_stats.training.trainer import BVPOTrainer

        return BVPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
