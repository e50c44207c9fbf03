"""Length-controlled win rates: the fit against other optimisers, simulated truth, coverage, and where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from bvpo_stats.lab.acceptance.checks import coverage_band
from bvpo_stats.statistics.proportions import (
    Interval,
    fit_log_odds,
    length_controlled_difference,
    length_controlled_rate,
)


def draw(rng: np.random.Generator, n: int, theta: float, phi: float) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of the model itself, with longer answers on average; s is the true standard deviation of lengths."""
    lengths = rng.normal(150.0, 400.0, size=n).round()
    wins = rng.random(n) < expit(theta + phi * np.tanh(lengths / 400.0))
    return wins.astype(np.float64), lengths


def cross_entropy(fit: np.ndarray, wins: np.ndarray, lengths: np.ndarray) -> float:
    odds = fit[0] + fit[1] * np.tanh(lengths / lengths.std(ddof=1))
    return float(np.sum(wins * np.logaddexp(0, -odds) + (1 - wins) * np.logaddexp(0, odds)))


@pytest.mark.parametrize("ties", [False, True])
def test_the_fit_is_the_maximum_likelihood(ties: bool) -> None:
    """scipy's simplex search knows neither the gradient nor Newton's method."""
    rng = np.random.default_rng(1)
    wins, lengths = draw(rng, 300, 0.4, 0.8)
    if ties:
        wins[rng.random(300) < 0.2] = 0.5
    found = fit_log_odds(wins, lengths, np.ones((1, 300)))[0]
    options = {"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000}
    best = minimize(cross_entropy, np.zeros(2), args=(wins, lengths), method="Nelder-Mead", options=options)
    assert found == pytest.approx(best.x, abs=1e-5)
    assert length_controlled_rate(wins, lengths).value == pytest.approx(expit(best.x[0]), abs=1e-6)


def test_the_fit_is_scikit_learns() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    wins, lengths = draw(np.random.default_rng(2), 400, -0.3, 1.2)
    x = np.tanh(lengths / lengths.std(ddof=1))[:, None]
    theirs = linear.LogisticRegression(C=np.inf, tol=1e-10).fit(x, wins.astype(int))
    found = fit_log_odds(wins, lengths, np.ones((1, 400)))[0]
    assert found == pytest.approx([theirs.intercept_[0], theirs.coef_[0, 0]], abs=1e-4)


def test_deleted_fits_are_fits_of_what_is_left() -> None:
    wins, lengths = draw(np.random.default_rng(3), 40, 0.2, 0.5)
    weights = np.ones((40, 40)) - np.eye(40)
    for place, fit in enumerate(fit_log_odds(wins, lengths, weights)):
        left = np.delete(wins, place), np.delete(lengths, place)
        assert fit == pytest.approx(fit_log_odds(*left, np.ones((1, 39)))[0], abs=1e-9)


def test_length_alone_is_taken_out() -> None:
    """A model that only writes longer wins often, and half of the time at equal length."""
    wins, lengths = draw(np.random.default_rng(4), 1_500, 0.0, 1.5)
    found = length_controlled_rate(wins, lengths)
    assert wins.mean() > 0.56
    assert found.value == pytest.approx(0.5, abs=0.045)  # three standard errors
    even = length_controlled_rate(wins[:500], np.zeros(500))
    assert even.value == pytest.approx(wins[:500].mean(), abs=1e-9)


@pytest.mark.slow
def test_coverage_of_rate_and_paired_difference() -> None:
    rng, runs, n = np.random.default_rng(5), 400, 120
    rates, differences = [], []
    for _ in range(runs):
        lengths = rng.normal(100.0, 300.0, size=n)
        x = np.tanh(lengths / 300.0)
        u = rng.random(n)  # both models meet the same prompts, and the same luck with them
        old = (u < expit(0.1 + 0.9 * x)).astype(float)
        new = (u < expit(0.5 + 0.9 * x)).astype(float)
        rates.append(length_controlled_rate(new, lengths))
        differences.append(length_controlled_difference((new, lengths), (old, lengths)))
    low, high = coverage_band(0.95, runs)
    for found, truth in ((rates, expit(0.5)), (differences, expit(0.5) - expit(0.1))):
        hits = [ci.low is not None and ci.high is not None and ci.low <= truth <= ci.high for ci in found]
        assert low <= np.mean(hits) <= high
    width = np.mean([ci.high - ci.low for ci in differences if ci.low is not None and ci.high is not None])
    alone = np.mean([ci.high - ci.low for ci in rates if ci.low is not None and ci.high is not None])
    assert width < alone  # pairing helps; independent models would give sqrt(2) times a single width


def test_what_the_data_do_not_determine() -> None:
    lengths = np.array([10.0, -5.0, 20.0, 3.0])
    nothing = Interval(None, None, None)
    assert length_controlled_rate(np.ones(4), lengths) == nothing  # wins only
    assert length_controlled_rate(np.array([1.0, 0.0, 1.0, 0.0]), np.array([10.0, -5.0, 20.0, -3.0])) == nothing
    assert length_controlled_rate(np.array([1.0, 0.0, 1.0, 0.0]), np.full(4, 7.0)) == nothing
    assert length_controlled_rate(np.zeros(0), np.zeros(0)) == nothing
    # one prompt decides whether there is a maximum: a value, and no interval
    found = length_controlled_rate(np.array([1.0, 0.0, 1.0, 1.0]), np.array([10.0, 12.0, 20.0, -3.0]))
    assert found.value is not None
    assert found.low is None
