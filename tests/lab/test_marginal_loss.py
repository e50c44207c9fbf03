"""L_m as a function of theta against the exact moments, which come from the score engine: another code path."""

import numpy as np
import pytest

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle import MarginalLoss, at, exact_moments

OBJECTIVE = Objective(beta=0.7)


@pytest.fixture(scope="module")
def loss(drifted):
    return MarginalLoss(drifted, OBJECTIVE)


@pytest.mark.parametrize("objective", [OBJECTIVE, Objective("simpo", beta=2.5, gamma=1.0), Objective("ipo", beta=0.4)])
def test_value_is_the_exact_loss(drifted, objective):
    theta = drifted.theta + 0.01
    there = exact_moments(at(drifted, theta), objective).loss_m
    assert abs(MarginalLoss(drifted, objective).value(theta) - there) < 1e-12


def test_hessian_products_are_differences_of_the_gradient(drifted, loss):
    direction, step = np.random.default_rng(0).normal(size=drifted.theta.shape), 1e-5
    ends = [exact_moments(at(drifted, drifted.theta + s * direction), OBJECTIVE).mu for s in (step, -step)]
    expected = (ends[0] - ends[1]) / (2 * step)
    found = loss.product(drifted.theta, direction)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_ends_of_the_spectrum_bound_every_quadratic_form(drifted, loss):
    ends = loss.hessian_ends(drifted.theta, steps=40)
    assert ends.smallest < 0 < ends.largest
    assert ends.smoothness == max(-ends.smallest, ends.largest)
    for seed in range(5):
        vector = np.random.default_rng(seed).normal(size=drifted.theta.shape)
        vector /= np.linalg.norm(vector)
        assert ends.smallest <= vector @ loss.product(drifted.theta, vector) <= ends.largest
    gradient = exact_moments(drifted, OBJECTIVE).mu
    image = loss.product(drifted.theta, gradient)
    assert ends.largest > 0.2 * np.linalg.norm(image) / np.linalg.norm(gradient)  # and not out of proportion
