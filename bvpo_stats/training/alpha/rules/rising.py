"""``rising``: from the variance answer to the trace gradient alone as the run runs out.

    alpha_k = start + (1 - start) k / K,      start = P1 / Q1 = tr(Sigma_e - Sigma_te) / tr(Sigma_t + Sigma_e - 2
    Sigma_te)

start, alpha's small-batch limit, needs no mu and is renewed at every step, shrunk toward `PRIOR_START`. Early on
gradients are noisy beside the steps and variance costs; late, with the learning rate gone down, bias has added up
coherently and must be removed. No greedy criterion knows of that.

**Against it.** Nothing is optimised: the end is always D_t alone and the pace always linear, whatever the data say,
and the length of the run must be known. Where D_e is worthless from the start (P1 / Q1 near 0 but norm(h)^2 large) it
begins too low. At a learning rate that does not fall, or for a run that is cut short, the late part is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bvpo_stats.training.alpha.rules.base import Decision, Seen, shrunk

PRIOR_START = 0.25


@dataclass(frozen=True)
class Rising:
    """See the module."""

    name: str = "rising"
    keeps_empty: bool = False

    def decide(self, seen: Seen, level: float) -> Decision:
        """On the line from the estimated start to 1."""
        start = shrunk(seen, lambda parts: (parts.P1, parts.Q1), level, PRIOR_START)
        progress = min(max(seen.progress or 0.0, 0.0), 1.0)
        alpha = np.clip(start.alpha + (1 - start.alpha) * progress, 0.0, 1.0)
        return Decision(alpha, start.estimate, start.low, start.high, start.known)
