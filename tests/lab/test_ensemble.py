"""Many copies at once against one oracle at a time, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle import at, draw_examples, exact_moments, example_gradients
from bvpo_stats.lab.oracle.ensemble import Ensemble, Pairs, copy_moments, pair_vectors
from bvpo_stats.lab.oracle.forest import Forest


@pytest.fixture(scope="module")
def thetas(drifted):
    return drifted.theta + 0.1 * np.random.default_rng(0).normal(size=(3, len(drifted.theta)))


@pytest.fixture(scope="module")
def copies(drifted, thetas):
    return Ensemble.of(drifted).at(thetas)


def test_copies_have_the_scores_of_the_oracle_at_their_theta(drifted, thetas, copies) -> None:
    for k, theta in enumerate(thetas):
        table = at(drifted, theta).table
        np.testing.assert_allclose(copies.joint[k], table.policy.joint, rtol=0, atol=1e-12)
        np.testing.assert_allclose(copies.scores[k], table.scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", [Objective(beta=0.7), Objective("simpo", beta=2.0, gamma=0.3)])
def test_moments_are_those_of_the_loop_over_cells(drifted, thetas, copies, objective) -> None:
    found = copy_moments(drifted, copies, objective)
    for k, theta in enumerate(thetas):
        one = exact_moments(at(drifted, theta), objective)
        for name in ("mean_t", "mean_e", "mu", "loss_m"):
            np.testing.assert_allclose(getattr(found, name)[k], getattr(one, name), rtol=0, atol=1e-12)
        wanted = one.estimates
        for name, value in vars(found.parts).items():
            if value is not None:
                np.testing.assert_allclose(value[k], getattr(wanted, name), rtol=1e-10, atol=1e-12, err_msg=name)


def test_example_gradients_are_those_read_off_one_oracle(drifted, thetas, copies) -> None:
    draws = [draw_examples(drifted, 6, np.random.default_rng(seed)) for seed in range(len(thetas))]
    t, e = pair_vectors(drifted, copies, Pairs.of(draws).part(2, 5), Objective(beta=0.7))
    for k, theta in enumerate(thetas):
        wanted = example_gradients(at(drifted, theta), draws[k], Objective(beta=0.7))
        np.testing.assert_allclose(t[k], wanted[0][2:5], rtol=0, atol=1e-12)
        np.testing.assert_allclose(e[k], wanted[1][2:5], rtol=0, atol=1e-12)


def test_the_forest_has_the_same_log_probabilities_and_gradients(drifted, thetas, copies) -> None:
    """One short pass over trees against one over whole sequences."""
    own = torch.tensor(thetas).requires_grad_()
    joint = Forest(drifted).joint(own)
    np.testing.assert_allclose(joint.detach().numpy(), copies.joint, rtol=0, atol=1e-12)
    weights = torch.tensor(np.random.default_rng(1).normal(size=copies.joint.shape))
    (found,) = torch.autograd.grad((weights * joint).sum(), own)
    wanted = np.einsum("nxra,nxrad->nd", weights.numpy(), copies.scores)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-11)
