"""alpha is a curve: the optimal weight at batch size B, and what a weight for another batch size costs."""

from __future__ import annotations

import numpy as np

from bvpo_stats.lab.oracle import ExactMoments
from bvpo_stats.lab.theorems.checks import STANDARD_ERRORS, Numbers, TopicReport, judge
from bvpo_stats.lab.theorems.ground import Ground, Sample
from bvpo_stats.lab.theorems.optimal_alpha import BATCHES
from bvpo_stats.statistics.proportions import Interval, jackknife_interval

LARGE = BATCHES[-1]
"""The paper's batch size."""


def batch_scaling(ground: Ground) -> TopicReport:
    """alpha(tau) against the best weight of real mini-batches, and the cost of leaving B out.

    Args:
        ground: Oracles and samples.
    """
    exact = ground.exact
    measured = {batch: best_weight_of_batches(ground.sample, exact, batch) for batch in BATCHES}
    z = {batch: _distance(*measured[batch], exact.alpha(1 / batch)) for batch in BATCHES}
    worst = max(BATCHES, key=lambda batch: abs(z[batch]))
    p0, p1, q0, q1 = exact.curve
    small, large = exact.alpha(1.0), exact.alpha(1 / LARGE)
    cost = exact.error(small, 1 / LARGE) / exact.error(large, 1 / LARGE)
    steps = np.diff([exact.alpha(1 / batch) for batch in BATCHES]) * np.sign(p0 / q0 - p1 / q1)
    return TopicReport(
        name="batch_size",
        title="Batch size: alpha is a curve",
        checks=(
            judge(
                "At batch size B the best alpha is (P0 + P1 / B) / (Q0 + Q1 / B).",
                Numbers(
                    f"alpha at B = {worst}, the worst of {len(BATCHES)} batch sizes",
                    measured[worst][0],
                    exact.alpha(1 / worst),
                    STANDARD_ERRORS * measured[worst][1],
                ),
                "Theorem 2 with mini-batches",
                note="Measured: the weight that minimises the error of drawn batches about mu.",
            ),
            judge(
                "The curve runs monotonically from the variance-only to the bias-only answer as B grows.",
                Numbers("smallest step towards the bias-only limit", float(steps.min()), 0.0, relation=">="),
                "alpha(tau) as a weighted average",
                note=f"From {p1 / q1:.2f} over {small:.2f} at B = 1 and {large:.2f} at {LARGE} to {p0 / q0:.2f}.",
            ),
            judge(
                "alpha* does not depend on the batch size.",
                Numbers(f"MSE at B = {LARGE} with the alpha of B = 1, over the least", cost, 1.0, 0.01, "<="),
                "as Theorem 2 is read when B is left out",
                should_hold=False,
                note=f"The alpha of single examples, {small:.2f}, costs {cost - 1:.0%} more at the paper's batch size.",
            ),
        ),
        data={
            "points": [{"batch_size": b, "value": measured[b][0], "standard_error": measured[b][1]} for b in BATCHES],
            "curve": [{"batch_size": float(b), "value": exact.alpha(1 / b)} for b in np.geomspace(0.25, 4096, 80)],
            "variance_only": p1 / q1,
            "bias_only": p0 / q0,
            "paper_batch_size": LARGE,
            "paper_alpha": 0.5,
        },
    )


def best_weight_of_batches(sample: Sample, exact: ExactMoments, batch: int) -> tuple[float, float]:
    """The alpha that minimises the mean of norm(batch mean of g_c - mu)^2 over drawn batches, and its standard error.

    With t, e the means of a batch, the error is quadratic in alpha, so the minimiser is
    sum (e - t).(e - mu) / sum norm(t - e)^2 over the batches.

    Args:
        sample: Drawn examples.
        exact: Where mu comes from.
        batch: B.
    """
    n = len(sample.prompt) // batch * batch
    t, e = (rows[:n].reshape(-1, batch, rows.shape[-1]).mean(axis=1) for rows in (sample.t, sample.e))
    parts = np.stack([np.sum((e - t) * (e - exact.mu), axis=1), np.sum((t - e) ** 2, axis=1)], axis=1)
    found: Interval = jackknife_interval(parts, lambda x: x[..., 0] / x[..., 1], level=0.6826894921)
    assert found.value is not None  # some examples always differ
    assert found.high is not None
    return found.value, found.high - found.value


def _distance(value: float, error: float, truth: float) -> float:
    return (value - truth) / error
