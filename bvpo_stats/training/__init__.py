"""Training: controllers of alpha, and the trainer that uses them."""

from bvpo_stats.training.adaptive import AdaptiveController, AdaptiveOptions
from bvpo_stats.training.controllers import (
    AlphaRecord,
    Controller,
    FixedController,
    ScheduleController,
    from_state,
    make_controller,
)
from bvpo_stats.training.observations import Observation, StepSums
from bvpo_stats.training.step_size import StepSize

__all__ = [
    "AdaptiveController",
    "AdaptiveOptions",
    "AlphaRecord",
    "Controller",
    "FixedController",
    "Observation",
    "ScheduleController",
    "StepSize",
    "StepSums",
    "from_state",
    "make_controller",
]
