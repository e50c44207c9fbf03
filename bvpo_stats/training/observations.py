"""What a training step tells a controller: sums of gradients, moments of a probe set, the size of the next step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.moments import Moments


@dataclass(frozen=True)
class StepSums:
    """Inner products of one step's gradients, summed by *unit*: an example, or a micro-batch of any size.

    Let unit j hold ``b_j`` examples and let ``T_j``, ``E_j`` be the *sums* (not means) of their trace and empty-trace
    gradients, ``S_t = sum_j T_j`` and ``D_te = sum_j T_j . E_j``. With ``B = sum_j b_j`` and ``q = sum_j b_j^2``,

        U_te = (S_t . S_e - D_te) / (B^2 - q)            E U_te = E t . E e
        tr Sigma_te = (D_te - q U_te) / B                unbiased, covariance of single examples

    and likewise for ``tt`` and ``ee``. Units may differ in size; with one example a unit ``q = B``, and U and
    ``M = D / B`` are those of `bvpo_stats.statistics.summary`. All pairs of a prompt must lie in one unit.

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
        sizes: Float[np.ndarray, " units"] | None = None,
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
        eta_l: Learning rate times smoothness *of the step to come* (`bvpo_stats.training.step_size`).
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
