"""``theorem4``: the alpha with the least error of a step, norm(bias)^2 + tau Var, tau = eta L / B (Theorems 2 and 4).

    alpha = [norm(h)^2 - c.h + tau P1] / [norm(h)^2 + tau Q1],     h = E g_t - E g_e,  c = E g_t - mu

in the optimizer's metric; eta L = 1 is Theorem 4 as printed.

**Against it.** Least error of every step is not the least loss at the end: early gradients are noisy beside the
steps, so it leans on D_e and its bias, which adds up coherently; it gives way only as the learning rate falls, and
then too late. eta L = 1 is the edge of Theorem 3's condition and prices the variance far above what the curvature
along the noise costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from bvpo_stats.statistics.moments import Array
from bvpo_stats.training.alpha.rules.base import Decision, Parts, Seen, shrunk


@dataclass(frozen=True)
class Theorem4:
    """See the module."""

    name: str = "theorem4"
    keeps_empty: bool = False

    def decide(self, seen: Seen, level: float | None) -> Decision:
        """The shrunk ratio at the tau of the step to come."""
        return shrunk(
            seen, lambda parts: error_ratio(parts, seen.eta_l[..., None] / seen.batch_size), level, seen.prior
        )


def error_ratio(parts: Parts, tau: Array) -> tuple[Array, Array]:
    """Numerator and denominator at tau."""
    return parts.h_sq - parts.c_h + tau * parts.P1, parts.h_sq + tau * parts.Q1
