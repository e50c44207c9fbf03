"""What controllers of alpha share: what a step tells them, what they decide, and the line they leave in the log.

A controller is an immutable value. The training loop reads ``alpha`` before a step and calls ``update`` after it:

    controller = make_controller("adaptive")        # or a number, or a schedule "0%:0.5,100%:1"
    for step in range(steps):
        alpha = controller.alpha                    # chosen from data of earlier steps only
        ...                                         # g_c = alpha g_t + (1 - alpha) g_e; optimizer step
        controller = controller.update(Observation(step, batch_size, eta_l, products))
        log(controller.record.log())                # alpha, its interval, what it rests on, ...
    state = controller.to_state()                   # JSON-ready; from_state(state) goes on bit for bit

No controller knows a language model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.moments import Array
from bvpo_stats.training.alpha.lagged import StepProducts

PRIOR = 0.5
"""The paper's alpha."""


def check_alpha(alpha: float) -> float:
    """Returns a weight that lies in [0, 1].

    Raises:
        UserError: It does not.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"`alpha={alpha}`: must lie between 0 (empty-trace gradient only) and 1 (trace gradient only).")
    return alpha


@dataclass(frozen=True)
class Observation:
    """What is known when step k is done, for the alpha of step k + 1.

    Attributes:
        step: k, counted from 0.
        batch_size: Examples of an optimizer step, B.
        eta_l: Learning rate times smoothness *of the step to come* (:class:`StepSize`); an array for many runs at once.
        products: Products of step k's means; None where they were not formed.
        bias: A look at c = E g_t - mu: prompts, sums and sums of squares of (t_i - m_i) . (hbar, ebar) over them.
        progress: Share of the run that is over, in [0, 1]; None where its length is unknown.
        time_share: Share of the run's time that estimation has taken so far, for the log.
    """

    step: int
    batch_size: float
    eta_l: float | Array = 1.0
    products: StepProducts | None = None
    bias: tuple[int, Array, Array] | None = None
    progress: float | None = None
    time_share: float | None = None


@dataclass(frozen=True)
class StepSize:
    """How ``eta L`` follows from the learning rate.

    Attributes:
        eta_l: ``eta L`` at the peak learning rate; it shrinks with the schedule. Where it is measured, this is what
            holds until the first measurement.
        peak: Peak learning rate; an array for many runs at once.
        auto: Whether it is measured.
        curved: Sum of ``v' H v`` over the measurements, older ones with less weight.
        size: Sum of ``u' P u`` likewise; ``L = curved / size``.
        measurements: Their number.

    >>> StepSize(eta_l=1.0, peak=0.1).at(0.05), float(StepSize(peak=0.1, auto=True).measured(60.0, 2.0).at(0.1))
    (0.5, 3.0)
    """

    eta_l: float = 1.0
    peak: float | Array = 1.0
    auto: bool = False
    curved: float | Array = 0.0
    size: float | Array = 0.0
    measurements: int = 0

    def __post_init__(self) -> None:
        if not (self.eta_l > 0 and np.min(self.peak) > 0):
            raise UserError(f"eta_l {self.eta_l} and the peak learning rate {self.peak} must be positive.")

    @property
    def smoothness(self) -> float | Array | None:
        """L in the optimizer's metric, where it was measured."""
        return self.curved / np.maximum(self.size, 1e-300) if self.measurements else None

    def at(self, learning_rate: float | Array) -> float | Array:
        """``eta L`` at a learning rate; 0 at a learning rate of 0, where nothing moves."""
        if self.smoothness is not None:
            return learning_rate * self.smoothness
        return self.eta_l * learning_rate / self.peak

    def measured(self, curved: float | Array, size: float | Array) -> StepSize:
        """One more measurement; one that is not finite is not believed."""
        if not (np.isfinite(curved).all() and np.isfinite(size).all()):
            return self
        kept = _KEPT if self.measurements else 0.0
        return replace(
            self,
            curved=kept * self.curved + curved,
            size=kept * self.size + size,
            measurements=self.measurements + 1,
        )


_KEPT = 0.8  # weight of earlier measurements of the curvature


@dataclass(frozen=True)
class AlphaRecord:
    """One line of the log: the alpha of the next step and what it rests on. None where nothing is known.

    Attributes:
        step: The step just done; ``alpha`` is that of the next.
        alpha: The weight in use.
        why: ``fixed``, ``schedule``, or the rule's name; after a colon, why nothing is known.
        estimate: The rule's estimate before shrinkage and clipping.
        low: Lower end of its confidence interval, clipped to [0, 1].
        high: Upper end.
        level: Level of that interval.
        n_eff: Effective steps behind the estimate; below 2 the interval is all of [0, 1].
        largest: The largest step's share of its variance.
        h_sq: ``norm(E g_t - E g_e)^2`` in the optimizer's metric, as all that follow.
        e_h: ``E g_e . h``.
        P1: ``tr(Sigma_e - Sigma_te)`` of single examples.
        Q1: ``tr Sigma`` of ``g_t - g_e``.
        c_h: ``c . h``, c the bias of the trace gradient; 0 where there was no look at it.
        batch_size: B.
        eta_l: Learning rate times smoothness of the next step.
        prompts: Prompts behind the averages, in effect.
        bias_prompts: Prompts with traces behind ``c_h``.
        time_share: Share of the time that estimation has taken.
    """

    step: int
    alpha: float
    why: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    n_eff: float | None = None
    largest: float | None = None
    h_sq: float | None = None
    e_h: float | None = None
    P1: float | None = None
    Q1: float | None = None
    c_h: float | None = None
    batch_size: float | None = None
    eta_l: float | None = None
    prompts: int | None = None
    bias_prompts: int | None = None
    time_share: float | None = None

    @property
    def tau(self) -> float | None:
        """``eta L / B``."""
        return None if self.eta_l is None or not self.batch_size else self.eta_l / self.batch_size

    def log(self, prefix: str = "alpha/") -> dict[str, float]:
        """The numbers that are known, by name, for a tracker; ``alpha`` itself goes without the prefix."""
        named = asdict(self) | {"tau": self.tau}
        numbers = {key: float(value) for key, value in named.items() if isinstance(value, (int, float))}
        alpha = numbers.pop("alpha")
        return {"alpha": alpha} | {prefix + key: value for key, value in numbers.items() if key != "step"}
