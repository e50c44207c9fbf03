"""The lagged estimator on real gradients at a frozen theta: 120 of the embedded pairs', in 60 coordinates.

The whole study, on all 396, is benchmarks/alpha_tracking.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bvpo_stats.training.alpha import AdaptiveController, AdaptiveOptions, AlphaStream, StepMeans, StepSize

RUNS, B = 24, 24


@pytest.fixture(scope="module")
def gradients():
    with np.load(Path(__file__).with_name("embedded_gradients.npz")) as stored:
        t, e = (stored[name].astype(np.float64) for name in ("t", "e"))
    h, n = t - e, len(t)

    def unbiased(a, b):
        return float((n * n * (a.mean(axis=0) @ b.mean(axis=0)) - (a * b).sum()) / (n * (n - 1)))

    h_sq = unbiased(h, h)
    return t, e, (h_sq, unbiased(e, h) - (e * h).sum() / n, (h * h).sum() / n - h_sq)


def track(t, e, eta_l, steps, rule="theorem4"):
    """alpha of every run after each step, ``[steps, runs]``; epochs without replacement."""
    rng, n = np.random.default_rng(0), len(t)
    controller = AdaptiveController.start(AdaptiveOptions(rule=rule, level=None), (RUNS,))
    stream, alphas, per_epoch = AlphaStream(controller, StepSize(eta_l=eta_l), B), [], n // B
    for step in range(steps):
        if step % per_epoch == 0:
            order = np.stack([rng.permutation(n) for _ in range(RUNS)])
        rows = order[:, step % per_epoch * B : (step % per_epoch + 1) * B]
        means_t, means_e = t[rows].mean(axis=1), e[rows].mean(axis=1)
        stream.observe(StepMeans(step, B, means_t - means_e, means_e, step // per_epoch), None, np.ones(RUNS))
        alphas.append(stream.controller.decision.alpha)
    return np.array(alphas)


def truth(parts, eta_l):
    h_sq, P1, Q1 = parts
    return (h_sq + eta_l / B * P1) / (h_sq + eta_l / B * Q1)


@pytest.mark.parametrize("eta_l", [1.0, 0.05])
def test_alpha_leaves_its_prior_where_the_answer_is_elsewhere(gradients, eta_l):
    """Within .1 of the truth after 10 steps; holding 0.5 is not."""
    t, e, parts = gradients
    wanted = truth(parts, eta_l)
    assert abs(wanted - 0.5) > 0.12
    off = np.sqrt(((track(t, e, eta_l, 40) - wanted) ** 2).mean(axis=1))
    assert (off[9:] < 0.1).all(), off
    assert off[-1] < 0.6 * abs(wanted - 0.5)


def test_alpha_stays_at_its_prior_where_that_is_the_answer(gradients):
    t, e, parts = gradients
    h_sq, P1, Q1 = parts
    eta_l = B * h_sq / (Q1 - 2 * P1)  # where h_sq + tau P1 = (h_sq + tau Q1) / 2
    assert truth(parts, eta_l) == pytest.approx(0.5)
    found = track(t, e, eta_l, 40)
    assert np.abs(found - 0.5).max() < 0.2
    assert np.sqrt(((found - 0.5) ** 2).mean(axis=1)).max() < 0.06
