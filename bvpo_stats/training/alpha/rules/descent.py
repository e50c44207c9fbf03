"""``descent``: the alpha with the best bound on one step's progress (alpha_J), no term of Theorem 3's proof dropped.

    alpha = [mu.h / rho - E g_e . h + P1 / B] / [norm(h)^2 + Q1 / B],     rho = eta L < 1

with mu.h = E g_e . h + norm(h)^2 - c.h,

in the optimizer's metric; at rho >= 1 it is ``theorem4``.

**Against it.** It is greedy: it maximises the progress of the next step and pays with bias later. At small eta L the
first term rules and alpha becomes 0 or 1 by the sign of mu.h alone: the longer gradient wins, right or not. Under
Adam, whose steps do not grow with the gradient, that reward for length is void; ``direction`` is then the consistent
choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bvpo_stats.statistics.moments import Array
from bvpo_stats.training.alpha.rules.base import Decision, Parts, Seen, shrunk
from bvpo_stats.training.alpha.rules.theorem4 import error_ratio


@dataclass(frozen=True)
class Descent:
    """See the module."""

    name: str = "descent"
    keeps_empty: bool = False

    def decide(self, seen: Seen, level: float | None) -> Decision:
        """The shrunk ratio at the eta L of the step to come."""
        rho = seen.eta_l[..., None]

        def ratio(parts: Parts) -> tuple[Array, Array]:
            small = (rho > 0) & (rho < 1)
            inner = np.where(small, rho, 1.0)
            mu_h = parts.e_h + parts.h_sq - parts.c_h
            # At rho = 1 this is theorem4 at tau = 1 / B.
            kept = (mu_h / inner - parts.e_h + parts.P1 / seen.batch_size, parts.h_sq + parts.Q1 / seen.batch_size)
            plain = error_ratio(parts, rho / seen.batch_size)
            return np.where(small, kept[0], plain[0]), np.where(small, kept[1], plain[1])

        return shrunk(seen, ratio, level, seen.prior)
