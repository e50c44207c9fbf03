"""Estimators of S(y) and pi(y) from K traces: their exact biases, by enumeration of all K-tuples of traces."""

from itertools import product
from math import comb

import numpy as np
import pytest
from scipy.special import gammaln

from bvpo_stats.gradients.marginal import (
    anchored_snis,
    jackknife,
    level_probabilities,
    log_mean_weight,
    multilevel,
    predicted_snis_bias,
    snis,
)

TOL = 1e-10


@pytest.fixture(scope="module")
def side(drifted):
    """One (x, y): posterior, proposal q(r | x), importance weights, scores and their posterior mean S(y)."""
    table, x, y = drifted.table, 0, 1
    proposal = np.exp(table.sampling.trace[x])  # prior traces of pi_ref at temperature 0.8
    weights = np.exp(table.policy.joint[x, :, y]) / proposal
    return {
        "posterior": table.policy.posterior[x, :, y],
        "proposal": proposal,
        "weights": weights,
        "scores": table.scores[x, :, y],
        "S": table.marginal_scores[x, y],
        "log_ratio": table.log_ratio[x, :, y],
        "reference_posterior": table.reference.posterior[x, :, y],
        "marginal_log_ratio": table.marginal_log_ratio[x, y],
    }


def expectation_over_tuples(laws, statistic):
    """E f(r_1 .. r_K) for independent r_k ~ laws[k]."""
    total = 0.0
    for traces in product(range(len(laws[0])), repeat=len(laws)):
        probability = np.prod([law[r] for law, r in zip(laws, traces, strict=True)])
        total = total + probability * statistic(list(traces))
    return total


def estimator(side, method=snis):
    log_weights = np.log(side["weights"])
    return lambda traces: method(log_weights[traces], side["scores"][traces])


def test_weights_are_normalised_by_the_marginal(side, drifted):
    assert abs(side["proposal"] @ side["weights"] - np.exp(drifted.table.policy.marginal[0, 1])) < TOL


def test_snis_bias_at_one_and_two_traces(side):
    """K = 1 ignores the weights: bias E_q s - S. K = 2: E_q (w1 s1 + w2 s2)/(w1 + w2) - S, in closed form."""
    q, w, scores, S = side["proposal"], side["weights"], side["scores"], side["S"]
    one = expectation_over_tuples([q], estimator(side))
    np.testing.assert_allclose(one - S, q @ (scores - S), rtol=0, atol=TOL)
    two = expectation_over_tuples([q, q], estimator(side))
    share = w[:, None] / (w[:, None] + w[None, :])
    np.testing.assert_allclose(two - S, 2 * (q * (share @ q)) @ (scores - S), rtol=0, atol=TOL)
    assert np.linalg.norm(one - S) > np.linalg.norm(two - S) > 0.01 * np.linalg.norm(S)


@pytest.mark.parametrize("n_traces", [1, 2, 3])
def test_anchored_snis_is_unbiased_for_any_k(side, n_traces):
    laws = [side["posterior"]] + [side["proposal"]] * (n_traces - 1)
    mean = expectation_over_tuples(laws, estimator(side, anchored_snis))
    np.testing.assert_allclose(mean, side["S"], rtol=0, atol=TOL)


def test_an_anchor_of_another_posterior_is_biased(side):
    """The reference's posterior traces are no anchors off theta_ref."""
    mean = expectation_over_tuples([side["reference_posterior"], side["proposal"]], estimator(side))
    assert np.linalg.norm(mean - side["S"]) > 1e-3 * np.linalg.norm(side["S"])


def test_leading_order_of_the_snis_bias(side):
    """K bias -> -E_q[w^2 (s - S)] with w normalised, the remainder halving as K doubles."""
    kept = [0, 1, 2]  # three traces, so that compositions of K can be enumerated
    q = side["proposal"][kept] / side["proposal"][kept].sum()
    log_weights, scores = np.log(side["weights"][kept]), side["scores"][kept]
    S = snis(log_weights + np.log(q), scores)
    leading = predicted_snis_bias(q, log_weights, scores, traces=1).score

    def bias(n_traces):
        total = 0.0
        for i in range(n_traces + 1):
            for j in range(n_traces - i + 1):
                counts = np.array([i, j, n_traces - i - j])
                probability = np.exp(gammaln(n_traces + 1) - gammaln(counts + 1).sum() + counts @ np.log(q))
                weights = counts * np.exp(log_weights)
                total = total + probability * (weights @ scores / weights.sum() - S)
        return total

    errors = [np.linalg.norm(n * bias(n) - leading) / np.linalg.norm(leading) for n in (16, 32, 64)]
    assert errors[-1] < 0.1
    np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 2, atol=0.35)


def test_multilevel_sum_telescopes(side):
    """E over the level and the traces of the single-term estimator = E f(K) at the cap, here K = 4."""
    q, f = side["proposal"][:3] / side["proposal"][:3].sum(), estimator(side)  # three traces are quicker to enumerate
    mean = sum(
        probability
        * expectation_over_tuples(
            [q] * 2**level,
            lambda traces, level=level: multilevel(
                lambda chosen: f(np.array(traces)[chosen]), len(traces), level, levels=2
            ),
        )
        for level, probability in enumerate(level_probabilities(2), start=1)
    )
    one, four = expectation_over_tuples([q], f), expectation_over_tuples([q] * 4, f)
    np.testing.assert_allclose(mean, four, rtol=0, atol=TOL)
    assert np.linalg.norm(four - one) > 1e-2 * np.linalg.norm(four)


def test_ratio_identity(side):
    """pi_theta(y) / pi_ref(y) = E_{r ~ pi_ref(r | x, y)} exp(Delta): no normaliser, any drift."""
    mean = side["reference_posterior"] @ np.exp(side["log_ratio"])
    assert abs(np.log(mean) - side["marginal_log_ratio"]) < TOL


def test_jackknife_removes_the_first_order_of_the_log_bias(side):
    """JVI on the ratio identity: the bias of log mean e^Delta is O(1/K) plain and O(1/K^2) jackknifed."""
    kept = [0, 1]
    law = side["reference_posterior"][kept] / side["reference_posterior"][kept].sum()
    log_ratio = side["log_ratio"][kept]
    target = np.log(law @ np.exp(log_ratio))

    def bias(method, n):
        total = 0.0
        for first in range(n + 1):
            traces = np.repeat([0, 1], [first, n - first])
            probability = comb(n, first) * law[0] ** first * law[1] ** (n - first)
            total += probability * method(lambda chosen, t=traces: log_mean_weight(log_ratio[t[chosen]]), n)
        return total - target

    plain = {n: bias(lambda f, k: f(np.arange(k)), n) for n in (8, 16)}
    predicted = predicted_snis_bias(law, log_ratio, np.zeros((2, 1)), traces=16).log_marginal
    assert abs(plain[16] / predicted - 1) < 0.15
    assert abs(plain[8] / plain[16] - 2) < 0.3
    assert abs(bias(jackknife, 8) / bias(jackknife, 16) - 4) < 1.0
