"""``hypergradient``: alpha follows the derivative of the loss by itself, through the last steps.

A step moves theta by -eta P (g_e + alpha h), so earlier alphas have moved it along -P hbar, and the loss falls with
alpha at the rate mu . P hbar. The next batch's g_t stands for mu, and its product with hbar is one of the lagged
products:

    alpha <- clip(alpha + kappa x / rms(x)),     x = t_k' P hbar_{<k} - c.h,   kappa = 0.02

(Baydin et al. 2018, with the reach of hbar; the Hessian's contraction of old moves is left out.)

**Against it.** It is greedy over some fifty steps and wanders with the noise of x: its worst case on the oracle was 24%
above the best fixed alpha. It has no interval and no estimate to show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bvpo_stats.training.alpha.rules.base import MIN_PRODUCTS, Decision, Seen

KAPPA = 0.02
"""Change of alpha per step where every step agrees."""


@dataclass(frozen=True)
class Hypergradient:
    """See the module."""

    name: str = "hypergradient"
    keeps_empty: bool = False

    def decide(self, seen: Seen, level: float | None) -> Decision:
        """One step of alpha."""
        if seen.products < MIN_PRODUCTS or seen.latest is None:
            return Decision(seen.alpha, known=seen.products >= MIN_PRODUCTS)
        x = seen.latest[..., 3] + seen.latest[..., 4] - seen.statistics[..., 6]
        mean = seen.statistics[..., 3] + seen.statistics[..., 4] - seen.statistics[..., 6]
        spread = seen.covariance[..., 3:5, 3:5].sum(axis=(-1, -2)) * max(seen.effective, 1.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            move = np.nan_to_num(x / np.sqrt(mean**2 + np.maximum(spread, 0.0)), posinf=0.0, neginf=0.0)
        return Decision(np.clip(seen.alpha + KAPPA * np.clip(move, -3, 3), 0.0, 1.0))
