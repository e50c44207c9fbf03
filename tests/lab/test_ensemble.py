"""Many copies at once against one oracle at a time, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from bvpo_stats.gradients.curvature import lanczos
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle import at, draw_examples, exact_moments, example_gradients
from bvpo_stats.lab.oracle.ensemble import (
    Curvatures,
    Ensemble,
    Pairs,
    copy_moments,
    curvature_root,
    draw_probe,
    hessian_products,
    in_metric,
    marginal_vectors,
    noise_curvature,
    pair_vectors,
)


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


def test_marginal_vectors_tend_to_the_marginal_gradient(at_reference) -> None:
    """Many traces: the estimate of each example is its exact m; at theta_ref few traces are unbiased on average."""
    objective, thetas = Objective(beta=0.7), at_reference.theta[None] + 0.05
    many = draw_probe(at_reference, 3, 6000, [[1]])
    found = marginal_vectors(at_reference, Ensemble.of(at_reference).at(thetas), many, objective)[0]
    draws = draw_examples(at_reference, 3, np.random.default_rng([1]))
    wanted = example_gradients(at(at_reference, thetas[0]), draws, objective)[2]
    np.testing.assert_allclose(found, wanted, atol=0.05 * np.abs(wanted).max())
    few = draw_probe(at_reference, 1500, 2, [[2]])
    copies = Ensemble.of(at_reference).at(at_reference.theta[None])
    vectors, mu = marginal_vectors(at_reference, copies, few, objective)[0], exact_moments(at_reference, objective).mu
    along = vectors @ mu
    assert abs(along.mean() - mu @ mu) < 3.5 * along.std() / np.sqrt(len(along))


def test_smoothness_by_power_iteration_is_that_of_lanczos(minute) -> None:
    objective = Objective(beta=1.0)
    ensemble, theta = Ensemble.of(minute), minute.theta[None]

    def gradient(copies):
        return copy_moments(minute, copies, objective).mu

    found = Curvatures.start(1, theta.shape[1]).refine(ensemble, theta, gradient, 30)
    spectrum = lanczos(lambda v: hessian_products(ensemble, theta, v[None], gradient)[0], theta.shape[1])
    assert found.norm[0] == pytest.approx(max(spectrum.largest, -spectrum.smallest), rel=0.02)


def test_curvature_that_noise_meets_is_unbiased_from_samples(at_reference) -> None:
    """At theta_ref: tr(H Sigma_d) / tr(Sigma_d), exact in the Gauss-Newton metric and from few traces a probe."""
    objective = Objective(beta=1.0)
    copies = Ensemble.of(at_reference).at(np.repeat(at_reference.theta[None], 100, axis=0))
    one = Ensemble.of(at_reference).at(at_reference.theta[None])
    parts = copy_moments(at_reference, one, objective).parts
    root = curvature_root(at_reference, one, objective)
    curved = copy_moments(at_reference, in_metric(one, root), objective).parts
    draws = [draw_examples(at_reference, 8, np.random.default_rng([3, k])) for k in range(100)]
    t, e = pair_vectors(at_reference, copies, Pairs.of(draws), objective)
    noise = (t - e) - (t - e).mean(axis=1, keepdims=True)
    probe = draw_probe(at_reference, 16, 2, [[4, k] for k in range(100)])
    top, bottom = noise_curvature(at_reference, copies, probe, objective, noise)
    for values, truth in ((top / 7, curved.Q1[0]), (bottom / 7, parts.Q1[0])):
        assert abs(values.mean() - truth) < 3.5 * values.std() / np.sqrt(len(values))
