"""alpha during training: given in advance (`fixed`), or estimated (`adaptive`); torch is not needed for either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.training.alpha.adaptive import AdaptiveController, AdaptiveOptions, Controller
from bvpo_stats.training.alpha.base import AlphaRecord, Observation, StepSize
from bvpo_stats.training.alpha.fixed import FixedController
from bvpo_stats.training.alpha.lagged import Lag, StepProducts
from bvpo_stats.training.alpha.rules import DEFAULT_RULE, RULES
from bvpo_stats.training.alpha.stream import AlphaStream, StepMeans

__all__ = [
    "ADAPTIVE",
    "DEFAULT_RULE",
    "RULES",
    "AdaptiveController",
    "AdaptiveOptions",
    "AlphaRecord",
    "AlphaStream",
    "Controller",
    "FixedController",
    "Lag",
    "Observation",
    "StepMeans",
    "StepProducts",
    "StepSize",
    "from_state",
    "make_controller",
]

ADAPTIVE = "adaptive"


def make_controller(alpha: float | str, **options: Any) -> Controller:
    """A controller from a word.

    Args:
        alpha: A number in [0, 1], ``adaptive``, or a schedule ``step:alpha,step:alpha,...``.
        options: Fields of :class:`AdaptiveOptions`, looked at for ``adaptive`` only.

    Raises:
        UserError: Anything else.

    >>> make_controller("0.25").alpha, make_controller("0:0.2,100:0.8").alpha, make_controller("adaptive").alpha
    (0.25, 0.2, 0.25)
    """
    return AdaptiveController.start(AdaptiveOptions(**options)) if alpha == ADAPTIVE else FixedController.of(alpha)


def from_state(state: Mapping[str, Any]) -> Controller:
    """Read what any controller's ``to_state`` wrote.

    Raises:
        UserError: The state is of no known kind.
    """
    if state.get("kind") == "fixed":
        return FixedController.from_state(state)
    if state.get("kind") == "adaptive":
        return AdaptiveController.from_state(state)
    raise UserError("the checkpoint holds no alpha controller that this version knows; start the run anew.")
