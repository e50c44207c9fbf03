"""Marginal-score estimators against exact expectations over all tuples of traces in a small space."""

from itertools import product

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.marginal import (
    anchored_snis,
    jackknife,
    level_probabilities,
    log_mean_weight,
    multilevel,
    normalised_weights,
    predicted_snis_bias,
    snis,
)


@pytest.fixture
def space():
    """Four traces: proposal q, weights w = pi(r, y) / q(r), scores."""
    rng = np.random.default_rng(0)
    q = np.array([0.4, 0.3, 0.2, 0.1])
    log_w = np.log([0.2, 0.05, 0.6, 0.9])
    return q, log_w, rng.normal(size=(4, 3))


def truth(q, log_w):
    """Posterior, log pi(y)."""
    joint = q * np.exp(log_w)
    return joint / joint.sum(), np.log(joint.sum())


def expectation(q, traces, value, first=None):
    """Exact mean of value(indices) over ``traces`` draws of q, the first from another law if given."""
    laws = [q if first is None else first] + [q] * (traces - 1)
    total = 0.0
    for chosen in product(range(len(q)), repeat=traces):
        total = total + np.prod([law[c] for law, c in zip(laws, chosen, strict=True)]) * value(np.array(chosen))
    return total


@pytest.mark.parametrize("traces", [1, 2, 3, 4])
def test_anchored_snis_has_no_bias_at_any_number_of_traces(space, traces):
    q, log_w, s = space
    posterior, _ = truth(q, log_w)
    mean = expectation(q, traces, lambda i: anchored_snis(log_w[i], s[i]), first=posterior)
    np.testing.assert_allclose(mean, posterior @ s, rtol=0, atol=1e-12)


def test_plain_snis_is_biased_exactly_as_its_definition_says_at_one_and_two_traces(space):
    q, log_w, s = space
    w = np.exp(log_w)
    np.testing.assert_allclose(expectation(q, 1, lambda i: snis(log_w[i], s[i])), q @ s, atol=1e-12)
    pairs = sum(q[a] * q[b] * (w[a] * s[a] + w[b] * s[b]) / (w[a] + w[b]) for a, b in product(range(4), repeat=2))
    np.testing.assert_allclose(expectation(q, 2, lambda i: snis(log_w[i], s[i])), pairs, atol=1e-12)
    posterior, _ = truth(q, log_w)
    assert np.abs(pairs - posterior @ s).max() > 0.05


def test_snis_and_log_biases_approach_their_leading_order():
    """K times the exact bias tends to K times the prediction; the gap shrinks as 1 / K (exact sums up to K = 64)."""
    q, w = np.array([0.6, 0.4]), np.array([0.5, 1.3])
    s = np.array([[1.0], [-2.0]])
    posterior, log_marginal = truth(q, np.log(w))
    gaps = {"score": [], "log": []}
    for traces in (16, 64):
        bias_score = bias_log = 0.0
        for k in range(traces + 1):  # k draws of the first trace
            indices = np.array([0] * k + [1] * (traces - k))
            chance = np.exp(_log_binomial(traces, k) + k * np.log(q[0]) + (traces - k) * np.log(q[1]))
            bias_score += chance * (snis(np.log(w)[indices], s[indices])[0] - posterior @ s[:, 0])
            bias_log += chance * (log_mean_weight(np.log(w)[indices]) - log_marginal)
        predicted = predicted_snis_bias(q, np.log(w), s, traces)
        gaps["score"].append(abs(bias_score / predicted.score[0] - 1))
        gaps["log"].append(abs(bias_log / predicted.log_marginal - 1))
    for name, (coarse, fine) in gaps.items():
        assert fine < 0.03, name
        assert fine == pytest.approx(coarse / 4, rel=0.3), name


def _log_binomial(n, k):
    from scipy.special import gammaln

    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def test_ratio_identity(space):
    """pi_theta(y) / pi_ref(y) = E_{r ~ pi_ref(r | y)} exp(Delta)."""
    rng = np.random.default_rng(1)
    reference, policy = rng.dirichlet(np.ones(5), size=2) * 0.3  # joint pi(r, y) of five traces
    posterior = reference / reference.sum()
    delta = np.log(policy / reference)
    mean = np.log(posterior @ np.exp(delta))
    assert mean == pytest.approx(np.log(policy.sum() / reference.sum()), abs=1e-12)
    # log_mean_weight of one trace per posterior atom, repeated in proportion, is the same number.
    whole = np.repeat(np.arange(5), np.round(posterior * 10**4).astype(int))
    assert log_mean_weight(delta[whole]) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(("base", "levels"), [(1, 2), (2, 1)])
def test_multilevel_telescopes_to_the_largest_level(space, base, levels):
    q, log_w, s = space
    probabilities = level_probabilities(levels)

    def functional(chosen):
        # Two nonlinearities at once: a score and a sigmoid of the log-marginal.
        return np.append(snis(log_w[chosen], s[chosen]), 1 / (1 + np.exp(-3 * log_mean_weight(log_w[chosen]))))

    def on(indices):
        return lambda chosen: functional(indices[chosen])

    mean = sum(
        p * expectation(q, base * 2**level, lambda i, k=level: multilevel(on(i), len(i), k, base=base, levels=levels))
        for level, p in enumerate(probabilities, start=1)
    )
    top = expectation(q, base * 2**levels, functional)
    np.testing.assert_allclose(mean, top, rtol=0, atol=1e-12)
    assert np.abs(top - expectation(q, base, functional)).max() > 0.01


def test_multilevel_refuses_counts_that_do_not_fit():
    with pytest.raises(UserError, match="needs 4 traces"):
        multilevel(lambda i: i.mean(), 3, 2)
    with pytest.raises(UserError, match="level 3 of 2"):
        multilevel(lambda i: i.mean(), 8, 3, levels=2)


def test_jackknife_cuts_the_bias_of_the_log_by_an_order(space):
    q, log_w, _ = space
    _, log_marginal = truth(q, log_w)
    plain = expectation(q, 4, lambda i: log_mean_weight(log_w[i])) - log_marginal
    cut = expectation(q, 4, lambda i: jackknife(lambda c: log_mean_weight(log_w[i][c]), 4)) - log_marginal
    assert plain < -0.03
    assert abs(cut) < abs(plain) / 3
    # An exactly 1/K bias goes entirely: the variance of K draws about their mean.
    x = np.array([1.0, 4.0, -2.0, 0.5])
    assert jackknife(lambda c: x[c].var(), 4) == pytest.approx(x.var(ddof=1))
    with pytest.raises(UserError, match="two"):
        jackknife(lambda c: x[c].var(), 1)


def test_weights_survive_extreme_logs_and_refuse_nonsense():
    np.testing.assert_allclose(normalised_weights(np.array([-2000.0, -2000.0 + np.log(3)])), [0.25, 0.75])
    np.testing.assert_allclose(normalised_weights(np.array([-np.inf, 800.0])), [0.0, 1.0])
    batch = np.log(np.array([[1.0, 3.0], [2.0, 2.0]]))
    scores = np.array([[[0.0], [4.0]], [[1.0], [3.0]]])
    np.testing.assert_allclose(snis(batch, scores), [[3.0], [2.0]])
    with pytest.raises(UserError, match="weight zero"):
        normalised_weights(np.array([-np.inf, -np.inf]))
    with pytest.raises(UserError, match="NaN"):
        normalised_weights(np.array([0.0, np.nan]))
