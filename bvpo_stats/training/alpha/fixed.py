"""alpha given in advance, as a function of the step; one number is the constant function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.training.alpha.base import AlphaRecord, Observation, check_alpha


@dataclass(frozen=True)
class FixedController:
    """Straight lines between knots, constant before the first and after the last.

    Attributes:
        knots: ``(step, alpha)``, steps rising. One knot is one alpha throughout.
        record: The present alpha.

    >>> FixedController.of(0.3).update(Observation(0, 8)).alpha
    0.3
    >>> FixedController.of("0:0.0,10:1.0").update(Observation(3, 8)).alpha
    0.4
    """

    knots: tuple[tuple[float, float], ...]
    record: AlphaRecord

    @classmethod
    def of(cls, alpha: float | str) -> FixedController:
        """Before the first step.

        Args:
            alpha: A number in [0, 1], or a schedule ``step:alpha,step:alpha,...``.

        Raises:
            UserError: Anything else.
        """
        try:
            if isinstance(alpha, str) and ":" in alpha:
                steps_and_alphas = [knot.split(":") for knot in alpha.split(",")]
                knots = tuple((float(step), float(value)) for step, value in steps_and_alphas)
            else:
                knots = ((0.0, float(alpha)),)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"alpha {alpha!r}: give a number, `adaptive`, or a schedule such as 0:0.2,100:0.8."
            ) from error
        steps = [step for step, _ in knots]
        if sorted(set(steps)) != steps or not all(0 <= step < math.inf for step in steps):
            raise UserError(
                "an alpha schedule needs at least one step:alpha, with steps rising from 0 on, e.g. 0:0.2,100:0.8."
            )
        for _, value in knots:
            check_alpha(value)
        return cls(knots, AlphaRecord(-1, _at(knots, 0), _why(knots)))

    @property
    def alpha(self) -> float:
        """Weight of the trace gradient in the next step."""
        return self.record.alpha

    @property
    def constant(self) -> float | None:
        """The one alpha of all steps; None where they differ."""
        values = {value for _, value in self.knots}
        return values.pop() if len(values) == 1 else None

    @property
    def wants_data(self) -> bool:
        """No."""
        return False

    def update(self, observation: Observation) -> FixedController:
        """Counts the step."""
        record = AlphaRecord(
            observation.step,
            _at(self.knots, observation.step + 1),
            self.record.why,
            batch_size=observation.batch_size,
            eta_l=float(observation.eta_l),
        )
        return FixedController(self.knots, record)

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; `from_state` goes on bit for bit."""
        return {"kind": "fixed", "knots": [list(knot) for knot in self.knots], "record": asdict(self.record)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> FixedController:
        """Read what `to_state` wrote."""
        return cls(tuple((step, alpha) for step, alpha in state["knots"]), AlphaRecord(**state["record"]))


def _at(knots: tuple[tuple[float, float], ...], step: int) -> float:
    steps, alphas = zip(*knots, strict=True)
    return float(np.interp(step, steps, alphas))


def _why(knots: tuple[tuple[float, float], ...]) -> str:
    return "fixed" if len(knots) == 1 else "schedule"
