"""What controllers of alpha share: what a step tells them, what they decide, and the line they leave in the log.

A controller is an immutable value. The training loop reads ``alpha`` before a step and calls ``update`` after it:

    controller = make_controller("adaptive")        # or a number, or a schedule "0:0.2,100:0.8"
    for step in range(steps):
        alpha = controller.alpha                    # chosen from data of earlier steps only
        ...                                         # g_c = alpha g_t + (1 - alpha) g_e; optimizer step
        controller = controller.update(Observation(step, batch_size, eta_l, sums, probe))
        log(controller.record.log())                # alpha, its interval, biases, variances, ...
    state = controller.to_state()                   # JSON-ready; from_state(state) goes on bit for bit

No controller knows a language model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Real

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.moments import Moments

PRIOR = 0.5
"""The paper's alpha."""


def check_alpha(alpha: float) -> float:
    """Returns a weight that lies in [0, 1].

    Raises:
        UserError: It does not.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha}: must lie between 0 (empty-trace gradient only) and 1 (trace gradient only).")
    return alpha


@dataclass(frozen=True)
class StepSums:
    """Inner products of one step's gradients, summed by *unit*: an example, or a micro-batch of any size.

    Let unit j hold ``b_j`` examples and let ``T_j``, ``E_j`` be the *sums* (not means) of their trace and empty-trace
    gradients, ``S_t = sum_j T_j`` and ``D_te = sum_j T_j . E_j``. With ``B = sum_j b_j`` and ``q = sum_j b_j^2``,

        U_te = (S_t . S_e - D_te) / (B^2 - q)            E U_te = E t . E e
        tr Sigma_te = (D_te - q U_te) / B                unbiased, covariance of single examples

    and likewise for ``tt`` and ``ee``. Units may differ in size; with one example a unit ``q = B``, and U and
    ``M = D / B`` are those of `bvpo_stats.statistics.moments`. All pairs of a prompt must lie in one unit.

    Attributes:
        examples: B.
        squares: q.
        total: ``S_t . S_t, S_t . S_e, S_e . S_e``.
        diagonal: ``D_tt, D_te, D_ee``.
    """

    examples: float
    squares: float
    total: tuple[float, float, float]
    diagonal: tuple[float, float, float]

    @classmethod
    def of_units(
        cls,
        t: Float[np.ndarray, "units parameters"],
        e: Float[np.ndarray, "units parameters"],
        sizes: Real[np.ndarray, " units"] | None = None,
    ) -> StepSums:
        """From the sums of each unit, all in memory.

        Args:
            t: Sum of the trace gradients of each unit.
            e: Sum of the empty-trace gradients of the same examples.
            sizes: Examples in each unit; None where a unit is one example.

        >>> t, e = np.array([[1.0], [3.0]]), np.array([[0.0], [0.0]])
        >>> StepSums.of_units(t, e).covariance()
        (2.0, 0.0, 0.0)
        """
        T, E = np.asarray(t, dtype=np.float64), np.asarray(e, dtype=np.float64)
        b = np.ones(len(T)) if sizes is None else np.asarray(sizes, dtype=np.float64)
        S_t, S_e = T.sum(axis=0), E.sum(axis=0)
        return cls(
            examples=float(b.sum()),
            squares=float(b @ b),
            total=(float(S_t @ S_t), float(S_t @ S_e), float(S_e @ S_e)),
            diagonal=(float(np.vdot(T, T)), float(np.vdot(T, E)), float(np.vdot(E, E))),
        )

    @property
    def usable(self) -> bool:
        """Whether variances follow: two units or more, and finite sums."""
        finite = all(np.isfinite(self.total)) and all(np.isfinite(self.diagonal))
        return finite and self.examples**2 - self.squares > 0

    def covariance(self) -> tuple[float, float, float]:
        """``tr Sigma_t, tr Sigma_te, tr Sigma_e`` of single examples, unbiased.

        Raises:
            UserError: Fewer than two units.
        """
        if not self.usable:
            raise UserError(
                "a step of one micro-batch says nothing of its variance; use at least two micro-batches per step, or "
                "per-example gradients."
            )
        pairs = self.examples**2 - self.squares
        products = zip(self.total, self.diagonal, strict=True)
        tt, te, ee = ((d - self.squares * (s - d) / pairs) / self.examples for s, d in products)
        return tt, te, ee


@dataclass(frozen=True)
class Observation:
    """What is known when step k is done, for the alpha of step k + 1.

    Attributes:
        step: k, counted from 0.
        batch_size: Examples of an optimizer step, B.
        eta_l: Learning rate times smoothness *of the step to come* (:class:`StepSize`).
        sums: Gradients of step k; None where they were not kept.
        probe: Moments of the probe prompts at the present parameters, members ``t``, ``e``, ``m``; None between probes.
            Prompts keep their ids from probe to probe: the jackknife groups that follow from the ids are what makes the
            interval of an average right, whether the probes share prompts or not.
        time_share: Share of the run's time that estimation has taken so far, for the log.
    """

    step: int
    batch_size: float
    eta_l: float = 1.0
    sums: StepSums | None = None
    probe: Moments | None = None
    time_share: float | None = None


@dataclass(frozen=True)
class StepSize:
    """How ``eta L`` follows from the learning rate.

    Attributes:
        eta_l: ``eta L`` at the peak learning rate; it shrinks with the schedule.
        peak: Peak learning rate.
        smoothness: L where it was measured (the curvature along the gradient noise); then ``eta_l`` is not looked at.

    >>> StepSize(eta_l=1.0, peak=0.1).at(0.05), StepSize(peak=0.1, smoothness=30.0).at(0.1)
    (0.5, 3.0)
    """

    eta_l: float = 1.0
    peak: float = 1.0
    smoothness: float | None = None

    def __post_init__(self) -> None:
        if not (self.eta_l > 0 and self.peak > 0):
            raise UserError(f"eta_l {self.eta_l} and the peak learning rate {self.peak} must be positive.")

    def at(self, learning_rate: float) -> float:
        """``eta L`` at a learning rate; 0 at a learning rate of 0, where nothing moves."""
        if self.smoothness is not None:
            return learning_rate * max(self.smoothness, 0.0)
        return self.eta_l * learning_rate / self.peak


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


@runtime_checkable
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
