"""alpha given in advance, as a function of the step; one number is the constant function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
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
        percent: Whether the steps are percent of the run.

    >>> FixedController.of(0.3).update(Observation(0, 8)).alpha
    0.3
    >>> FixedController.of("0:0.0,10:1.0").update(Observation(3, 8)).alpha
    0.4
    >>> FixedController.of("0%:0.5,100%:1").update(Observation(29, 8, progress=0.6)).alpha
    0.8
    """

    knots: tuple[tuple[float, float], ...]
    record: AlphaRecord
    percent: bool = False

    @classmethod
    def of(cls, alpha: float | str) -> FixedController:
        """Before the first step.

        Args:
            alpha: A number in [0, 1], or a schedule ``step:alpha,step:alpha,...``, steps in numbers or all in percent
                of the run, ``0%:0.5,100%:1``.

        Raises:
            UserError: Anything else.
        """
        percent = False
        try:
            if isinstance(alpha, str) and ":" in alpha:
                steps_and_alphas = [knot.split(":") for knot in alpha.split(",")]
                percent = all(step.strip().endswith("%") for step, _ in steps_and_alphas)
                knots = tuple(
                    (float(step.strip().removesuffix("%") if percent else step), float(value))
                    for step, value in steps_and_alphas
                )
            else:
                knots = ((0.0, float(alpha)),)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"`alpha={alpha!r}`: give a number, `adaptive`, or a schedule such as 0:0.2,100:0.8 (steps) or "
                "0%:0.5,100%:1 (of the run)."
            ) from error
        steps = [step for step, _ in knots]
        if sorted(set(steps)) != steps or not all(0 <= step < math.inf for step in steps):
            raise UserError(
                f"`alpha={alpha!r}`: a schedule needs at least one step:alpha, with steps rising from 0 on, e.g. "
                "0:0.2,100:0.8."
            )
        if percent and steps[-1] > 100:
            raise UserError(f"`alpha={alpha!r}`: a run ends at 100%.")
        for _, value in knots:
            check_alpha(value)
        return cls(knots, AlphaRecord(-1, _at(knots, 0), _why(knots)), percent)

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
        """Counts the step.

        Raises:
            UserError: A schedule in percent where the length of the run is unknown.
        """
        if self.percent and observation.progress is None:
            raise UserError("`alpha`: a schedule in percent needs a run of known length; give its steps in numbers.")
        now = 100 * (observation.progress or 0.0) if self.percent else observation.step + 1
        record = AlphaRecord(
            observation.step,
            _at(self.knots, now),
            self.record.why,
            batch_size=observation.batch_size,
            eta_l=float(observation.eta_l),
        )
        return replace(self, record=record)

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; `from_state` goes on bit for bit."""
        return {"kind": "fixed"} | asdict(self) | {"knots": [list(knot) for knot in self.knots]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> FixedController:
        """Read what `to_state` wrote."""
        knots = tuple((step, alpha) for step, alpha in state["knots"])
        return cls(knots, AlphaRecord(**state["record"]), state.get("percent", False))


def _at(knots: tuple[tuple[float, float], ...], step: float) -> float:
    steps, alphas = zip(*knots, strict=True)
    return float(np.interp(step, steps, alphas))


def _why(knots: tuple[tuple[float, float], ...]) -> str:
    return "fixed" if len(knots) == 1 else "schedule"
