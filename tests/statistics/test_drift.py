"""The bound on g_t's bias after a small drift, against the oracle's exact bias; the range of alpha made from it."""

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle import Oracle, OracleConfig, build_oracle, draw_examples, exact_moments, example_gradients
from bvpo_stats.lab.oracle.draws import Draws
from bvpo_stats.statistics.bounds import alpha_range, drift_bound, slopes
from bvpo_stats.statistics.moments import summary_of_arrays

SHAPE = {"n_symbols": 3, "max_trace": 3, "n_answers": 3, "n_prompts": 4, "seed": 0}
DRIFTS = (0.001, 0.005, 0.01)


@pytest.fixture(scope="module")
def oracles() -> dict[float, Oracle]:
    return {drift: build_oracle(OracleConfig(**SHAPE, drift=drift)) for drift in DRIFTS}


def sides(oracle: Oracle, draws: Draws, values: np.ndarray) -> np.ndarray:
    """What the D_t pairs hold of a table [prompts, traces, answers]: chosen, rejected."""
    pairs = (draws.thinking.chosen_pair, draws.thinking.rejected_pair)
    return np.stack([values[draws.prompt, trace, answer] for trace, answer in pairs], axis=1)


def exact_terms(oracle: Oracle, beta: float, h: np.ndarray) -> float:
    """The identity at the head of statistics/drift.py, summed over prompts, answers and traces."""
    law, posterior = oracle.pair_law / len(oracle.pair_law), oracle.table.sampling.posterior
    ratio, along, marginal = oracle.table.log_ratio, oracle.table.scores @ h, oracle.table.marginal_log_ratio
    total = 0.0
    for x, y, z in np.argwhere(law > 0).tolist():
        p, q = posterior[x, :, y], posterior[x, :, z]
        up, down, a, b = ratio[x, :, y], ratio[x, :, z], along[x, :, y], along[x, :, z]
        u = 1 / (1 + np.exp(beta * (up[:, None] - down[None, :])))
        U = 1 / (1 + np.exp(beta * (marginal[x, y] - marginal[x, z])))
        w, v = np.exp(up - marginal[x, y]), np.exp(down - marginal[x, z])

        def covariance(weights: np.ndarray, f: np.ndarray, g: np.ndarray) -> float:
            return float(weights @ (f * g) - (weights @ f) * (weights @ g))

        value = covariance(p, U * w - u @ q, a) + covariance(q, p @ u - U * v, b)
        total += law[x, y, z] * beta * (value - (p @ u @ q - U) * (p @ a - q @ b))
    return total


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_bias_along_h_is_what_the_identity_says(oracles, beta):
    for oracle in oracles.values():
        exact = exact_moments(oracle, Objective(beta=beta))
        h = exact.mean_t - exact.mean_e
        assert exact_terms(oracle, beta, h) == pytest.approx(float(h @ exact.b_t), rel=1e-8)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_bound_holds_the_exact_bias(oracles, beta):
    """Above the bias at every drift, within two orders of magnitude of it, and by the drift law where that is small."""
    for drift, oracle in oracles.items():
        exact = exact_moments(oracle, Objective(beta=beta))
        h, draws = exact.mean_t - exact.mean_e, draw_examples(oracle, 4_000, np.random.default_rng(0))
        ratio, along = (sides(oracle, draws, x) for x in (oracle.table.log_ratio, oracle.table.scores @ h))
        bound = drift_bound(ratio, along, beta)
        bias = abs(float(h @ exact.b_t))
        assert bias < bound.value < bound.high < 1.2 * bound.value
        assert bound.value < 200 * bias
        assert bound.largest <= np.abs(oracle.table.log_ratio).max() + 1e-12
        if drift == min(DRIFTS):
            law = beta * (ratio.std(axis=0) * along.std(axis=0)) @ np.array([0.5 + beta / 4, 0.5 - beta / 4])
            assert law < bound.value < 1.3 * law


def test_slopes_bound_the_derivatives_that_they_stand_for():
    grid = np.linspace(-0.3, 0.3, 61)
    for beta in (0.1, 1.0, 3.0):
        chosen, rejected = slopes(beta, 0.3)
        u = 1 / (1 + np.exp(beta * (grid[:, None] - grid[None, :])))  # D+ down, D- across
        for U in (u.min(), 0.5, u.max()):
            for shift in (-0.3, 0.0, 0.3):
                w = U * np.exp(grid - shift)
                assert np.abs(np.diff(w[:, None] - u, axis=0)).max() <= chosen * (grid[1] - grid[0]) * (1 + 1e-9)
                assert np.abs(np.diff(u - w[None, :], axis=1)).max() <= rejected * (grid[1] - grid[0]) * (1 + 1e-9)


def test_bad_numbers_are_refused():
    with pytest.raises(UserError, match="at least three"):
        drift_bound(np.zeros((2, 2)), np.zeros((2, 2)), 0.1)
    with pytest.raises(UserError, match="not finite"):
        drift_bound(np.full((4, 2), np.nan), np.zeros((4, 2)), 0.1)


@pytest.mark.parametrize("drift", DRIFTS)
def test_the_range_holds_the_exact_alpha(oracles, drift):
    """Whole samples of 100 prompts: the range is for the exact alpha*, and says something where the drift is small."""
    oracle = oracles[drift]
    exact = exact_moments(oracle)
    held, widths = 0, []
    for seed in range(20):
        draws = draw_examples(oracle, 100, np.random.default_rng(seed))
        t, e, _ = example_gradients(oracle, draws)
        summary = summary_of_arrays({"t": t, "e": e})
        h = t.mean(axis=0) - e.mean(axis=0)
        bound = drift_bound(
            sides(oracle, draws, oracle.table.log_ratio), sides(oracle, draws, oracle.table.scores @ h), 0.1
        )
        found = alpha_range(summary, bound, batch_size=128)
        held += found.low <= exact.alpha(1 / 128) <= found.high
        widths.append(found.high - found.low)
    assert held >= 18  # 95%: fewer in one of a hundred series
    if drift <= 0.005:
        assert np.median(widths) < 0.6
