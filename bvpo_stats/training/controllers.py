"""Controllers: which weight alpha the next training step gives the trace gradient.

A controller is an immutable value. The training loop reads ``alpha`` before a step and calls ``update`` after it:

    controller = make_controller("adaptive")        # or a number, or a schedule "0:0.2,100:0.8"
    for step in range(steps):
        alpha = controller.alpha                    # chosen from data of earlier steps only
        ...                                         # g_c = alpha g_t + (1 - alpha) g_e; optimizer step
        controller = controller.update(Observation(step, batch_size, eta_l, sums, probe))
        log(controller.record.log())                # alpha, its interval, biases, variances, ...
    state = controller.to_state()                   # JSON-ready; from_state(state) goes on bit for bit

`FixedController` keeps one number, `ScheduleController` follows given ones, `AdaptiveController`
(`bvpo_stats.training.adaptive`) estimates. No controller knows a language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.training.observations import Observation

PRIOR = 0.5
"""The paper's alpha."""


@dataclass(frozen=True)
class AlphaRecord:
    """One line of the log: the alpha of the next step and what it rests on. None where nothing is known.

    Attributes:
        step: The step just done; ``alpha`` is that of the next.
        alpha: The weight in use.
        why: ``fixed``, ``schedule``, ``estimated``, or ``held: ...`` with the reason for holding the prior.
        estimate: alpha_unc, the ratio of the averaged parts, before clipping.
        low: Lower end of its confidence interval, clipped to [0, 1].
        high: Upper end.
        level: Level of that interval.
        bias_trace_sq: ``norm(b_t)^2``.
        bias_empty_sq: ``norm(b_e)^2``.
        bias_cross: ``b_t . b_e``.
        var_trace: ``tr Sigma_t`` of single examples.
        var_empty: ``tr Sigma_e``.
        var_cross: ``tr Sigma_te``.
        trace_share: Part of ``tr Sigma_t`` that the sampling of traces causes (Theorem 1).
        batch_size: B.
        eta_l: Learning rate times smoothness of the next step.
        probe_prompts: Prompts in the latest probe.
        time_share: Share of the time that estimation has taken.
    """

    step: int
    alpha: float
    why: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    bias_trace_sq: float | None = None
    bias_empty_sq: float | None = None
    bias_cross: float | None = None
    var_trace: float | None = None
    var_empty: float | None = None
    var_cross: float | None = None
    trace_share: float | None = None
    batch_size: float | None = None
    eta_l: float | None = None
    probe_prompts: int | None = None
    time_share: float | None = None

    @property
    def held(self) -> bool:
        """Whether the prior is held for want of evidence."""
        return self.why.startswith("held")

    @property
    def tau(self) -> float | None:
        """``eta L / B``."""
        return None if self.eta_l is None or not self.batch_size else self.eta_l / self.batch_size

    def log(self, prefix: str = "alpha/") -> dict[str, float]:
        """The numbers that are known, by name, for a tracker; ``alpha`` itself goes without the prefix."""
        named = asdict(self) | {"tau": self.tau, "held": float(self.held)}
        numbers = {key: float(value) for key, value in named.items() if isinstance(value, (int, float))}
        alpha = numbers.pop("alpha")
        return {"alpha": alpha} | {prefix + key: value for key, value in numbers.items() if key != "step"}


class Controller(Protocol):
    """What a training loop needs of a controller."""

    @property
    def alpha(self) -> float:
        """Weight of the trace gradient in the next step."""

    @property
    def record(self) -> AlphaRecord:
        """What the present alpha rests on."""

    @property
    def wants_data(self) -> bool:
        """Whether `update` looks at gradient sums and probes at all."""

    def update(self, observation: Observation) -> Controller:
        """The controller after one more step."""

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; `from_state` reads it."""


@dataclass(frozen=True)
class FixedController:
    """One alpha throughout.

    >>> FixedController(0.3).update(Observation(0, 8)).alpha
    0.3
    """

    value: float = PRIOR
    step: int = -1
    batch_size: float | None = None
    eta_l: float | None = None

    def __post_init__(self) -> None:
        check_alpha(self.value)

    @property
    def alpha(self) -> float:
        """The number."""
        return self.value

    @property
    def record(self) -> AlphaRecord:
        """Nothing but the number."""
        return AlphaRecord(self.step, self.value, "fixed", batch_size=self.batch_size, eta_l=self.eta_l)

    @property
    def wants_data(self) -> bool:
        """No."""
        return False

    def update(self, observation: Observation) -> FixedController:
        """Counts the step."""
        return FixedController(self.value, observation.step, observation.batch_size, observation.eta_l)

    def to_state(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kind": "fixed", **asdict(self)}


@dataclass(frozen=True)
class ScheduleController:
    """alpha by step: straight lines between knots, constant before the first and after the last.

    Attributes:
        knots: ``(step, alpha)``, steps rising.
        step: Steps done, less one.

    >>> ScheduleController(((0, 0.0), (10, 1.0))).update(Observation(3, 8)).alpha
    0.4
    """

    knots: tuple[tuple[float, float], ...]
    step: int = -1

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.knots]
        if not steps or sorted(set(steps)) != steps:
            raise UserError("an alpha schedule needs at least one step:alpha, with steps rising, e.g. 0:0.2,100:0.8.")
        for _, alpha in self.knots:
            check_alpha(alpha)

    @property
    def alpha(self) -> float:
        """The line's value at the next step."""
        steps, alphas = zip(*self.knots, strict=True)
        return float(np.interp(self.step + 1, steps, alphas))

    @property
    def record(self) -> AlphaRecord:
        """Nothing but the number."""
        return AlphaRecord(self.step, self.alpha, "schedule")

    @property
    def wants_data(self) -> bool:
        """No."""
        return False

    def update(self, observation: Observation) -> ScheduleController:
        """Counts the step."""
        return ScheduleController(self.knots, observation.step)

    def to_state(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kind": "schedule", "knots": [list(knot) for knot in self.knots], "step": self.step}


def check_alpha(alpha: float) -> float:
    """Returns a weight that lies in [0, 1].

    Raises:
        UserError: It does not.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha}: must lie between 0 (empty-trace gradient only) and 1 (trace gradient only).")
    return alpha


def make_controller(alpha: float | str, **options: Any) -> Controller:
    """A controller from a command-line word.

    Args:
        alpha: A number in [0, 1], ``adaptive``, or a schedule ``step:alpha,step:alpha,...``.
        options: Fields of `bvpo_stats.training.adaptive.AdaptiveOptions`, looked at for ``adaptive`` only.

    Raises:
        UserError: Anything else.

    >>> make_controller("0.25").alpha, make_controller("0:0.2,100:0.8").alpha, make_controller("adaptive").alpha
    (0.25, 0.2, 0.5)
    """
    from bvpo_stats.training.adaptive import AdaptiveController, AdaptiveOptions

    if alpha == "adaptive":
        return AdaptiveController.start(AdaptiveOptions(**options))
    try:
        if isinstance(alpha, str) and ":" in alpha:
            pairs = [knot.split(":") for knot in alpha.split(",")]
            knots = tuple((float(step), float(value)) for step, value in pairs)
        else:
            return FixedController(float(alpha))
    except ValueError as error:
        raise UserError(f"alpha {alpha!r}: give a number, `adaptive`, or a schedule such as 0:0.2,100:0.8.") from error
    return ScheduleController(knots)


def from_state(state: Mapping[str, Any]) -> Controller:
    """Read what any controller's ``to_state`` wrote.

    Raises:
        UserError: The state is of no known kind.
    """
    from bvpo_stats.training.adaptive import AdaptiveController

    values = {key: value for key, value in state.items() if key != "kind"}
    if state.get("kind") == "fixed":
        return FixedController(**values)
    if state.get("kind") == "schedule":
        return ScheduleController(tuple((step, alpha) for step, alpha in values["knots"]), values["step"])
    if state.get("kind") == "adaptive":
        return AdaptiveController.from_state(values)
    raise UserError("the checkpoint holds no alpha controller that this version knows; start the run anew.")
