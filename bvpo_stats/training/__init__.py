"""Training: controllers of alpha, and the trainer that uses them."""

from bvpo_stats.lazy import on_first_use
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


# They bring torch along, which the controllers do without.
__getattr__ = on_first_use(__name__, {"BVPOConfig": "config", "BVPOTrainer": "trainer"})
