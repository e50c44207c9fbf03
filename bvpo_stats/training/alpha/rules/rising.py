"""``rising``: from half of the direction answer to the trace gradient alone as the run runs out.

    alpha_k = start + (1 - start) k / K,      start = alpha_direction / 2

Early on gradients are noisy beside the steps and variance costs; late, with the learning rate gone down, bias has added
up coherently and must be removed. No greedy criterion knows of that: the direction answer, which is best for the step
to come, mixes in too little of the quiet gradient. Where it is low, a run does best that begins near 0, and where it is
high, one that begins near 0.5 (the oracle training study, models that choose: half of it beats every fixed start). The
start is renewed at every step, shrunk toward half of the prior.

**Against it.** Nothing is optimised: the half is a fit to twelve small models, the end is always D_t alone and the pace
always linear, whatever the data say, and the length of the run must be known. Under SGD, where the length of a
gradient counts, the direction answer tells less: a plain line from 0.5 did better there. At a learning rate that does
not fall, or for a run that is cut short, the late part is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bvpo_stats.statistics.moments import Array
from bvpo_stats.training.alpha.rules.base import Decision, Seen, shrunk
from bvpo_stats.training.alpha.rules.direction import direction_ratio

SHARE = 0.5
"""Of the direction answer, at which alpha starts."""


@dataclass(frozen=True)
class Rising:
    """See the module."""

    name: str = "rising"
    keeps_empty: bool = True

    def decide(self, seen: Seen, level: float | None) -> Decision:
        """On the line from the estimated start to 1."""
        direction = shrunk(seen, direction_ratio(seen), level, seen.prior)
        start, progress = SHARE * direction.alpha, min(max(seen.progress or 0.0, 0.0), 1.0)
        alpha = start + (1 - start) * progress
        estimate, low, high = map(_start_of, (direction.estimate, direction.low, direction.high))
        return Decision(alpha, estimate, low, high, direction.known, direction.n_eff, direction.largest)


def _start_of(direction: Array | None) -> Array | None:
    return None if direction is None else SHARE * np.asarray(direction)
