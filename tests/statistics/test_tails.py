"""Intervals of means that a few clusters rule."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bvpo_stats.errors import UserError
from bvpo_stats.lab.acceptance.tails import coverage, jackknife_ends, populations
from bvpo_stats.statistics.tails import even_top_share, geometric_ratio, tail_interval, tail_mean, top_share


@pytest.mark.parametrize("questions", [30, 200])
def test_coverage_under_tails_and_that_the_jackknife_interval_fails(questions):
    """The acceptance table in small; 400 samples a cell have a standard error of 1.1 points."""
    lines, before = [], []
    for population in populations(20261128):
        lines += coverage(population, questions, 400, seed=5)
        before += coverage(population, questions, 400, seed=5, ends=jackknife_ends)
    floor = {30: 0.90, 200: 0.93}[questions] - 0.022
    short = [line for line in lines if line.coverage < floor and not line.power_law]
    assert not short
    assert sum(line.coverage < floor - 0.05 for line in before if not line.power_law) >= 5
    heavy = [line for line in lines if line.power_law and line.statistic == "mean"]
    assert heavy[0].few > 0.5  # the mean of a power law without a variance is said to rest on few
    assert lines[0].few < 0.05  # and one of equal variances is not


def test_the_tail_fit_is_the_censored_likelihoods_maximum():
    rng = np.random.default_rng(3)
    values = rng.lognormal(0.3, 1.2, size=200)
    logs = np.sort(np.log(values))
    limit, seen = logs[79], logs[80:]

    def loss(at: np.ndarray) -> float:
        mu, log_sigma = at
        return float(
            -stats.norm.logpdf(seen, mu, np.exp(log_sigma)).sum() - 80 * stats.norm.logcdf(limit, mu, np.exp(log_sigma))
        )

    from scipy.optimize import minimize

    best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9})
    mu, sigma = best.x[0], np.exp(best.x[1])
    upper = np.exp(mu + sigma**2 / 2) * stats.norm.cdf((mu - limit) / sigma + sigma)
    mean, influence = tail_mean(values[None])
    assert mean[0] == pytest.approx(np.exp(logs[:80]).sum() / 200 + upper, rel=1e-6)
    assert influence[0].mean() == pytest.approx(0, abs=1e-6 * mean[0])


def test_influences_give_the_tail_means_standard_error():
    rng = np.random.default_rng(4)
    mean, influence = tail_mean(rng.lognormal(0, 1, size=(3000, 100)))
    predicted = np.sqrt((influence**2).mean(axis=1) / 100) / mean
    assert np.std(np.log(mean)) == pytest.approx(float(np.median(predicted)), rel=0.08)


def test_units_do_not_matter_and_a_ratio_turns_over():
    rng = np.random.default_rng(1)
    above, below = rng.lognormal(0, 2, size=(2, 60))
    one, scaled, turned = tail_interval(above, below), tail_interval(1e6 * above, below), tail_interval(below, above)
    assert scaled.value == pytest.approx(1e6 * one.value)
    assert (scaled.low, scaled.high) == (
        pytest.approx(1e6 * one.low, rel=1e-6),
        pytest.approx(1e6 * one.high, rel=1e-6),
    )
    assert (turned.low, turned.high) == (pytest.approx(1 / one.high, rel=1e-6), pytest.approx(1 / one.low, rel=1e-6))
    assert one.n_eff == pytest.approx(scaled.n_eff)
    assert one.low < one.value < one.high


def test_one_question_with_99_percent_of_the_variance():
    found = tail_interval(np.array([1.0] * 99 + [99.0 * 99]))
    assert found.few
    assert found.n_eff == pytest.approx(1.02, abs=0.01)
    assert found.largest_share == pytest.approx(0.99, abs=0.001)
    assert found.value == pytest.approx(99)
    assert found.high / found.low > 1e6  # nothing is known


@pytest.mark.parametrize(
    ("values", "value"),
    [
        ([2.0] * 40, 2.0),  # all alike: nothing is said of how questions differ
        ([0.1] * 3, 0.1),
        ([5.0] + [0.0] * 9, 0.5),  # one holds the whole mean
        ([0.0] * 5, 0.0),
        ([3.0], 3.0),
        ([1.0, np.inf, 2.0], None),
        ([1.0, np.nan], None),
        ([], None),
    ],
)
def test_what_says_nothing_of_the_spread_has_no_ends(values, value):
    found = tail_interval(np.array(values, dtype=float))
    assert (found.value, found.low, found.high) == (pytest.approx(value) if value else value, None, None)


def test_a_ratio_with_nothing_below_and_a_fixed_ratio():
    rows = np.array([1.0, 5.0, 2.0, 8.0])
    assert tail_interval(rows, np.zeros(4)).value is None
    fixed = tail_interval(3 * rows, rows)
    assert (fixed.value, fixed.low, fixed.high) == (pytest.approx(3), None, None)


def test_three_questions_say_little():
    found = tail_interval(np.array([1.0, 2.0, 50.0]))
    assert found.low < 1
    assert found.high > 1000


def test_negative_values_and_levels_are_refused():
    with pytest.raises(UserError, match="negative"):
        tail_interval(np.array([1.0, -1.0, 2.0]))
    with pytest.raises(UserError, match="between 0 and 1"):
        tail_interval(np.array([1.0, 2.0]), level=1.0)


def test_small_variances_have_no_say_in_the_tail():
    """Two kinds of questions, some that hardly vary and some that do: a log-normal through both would be absurd."""
    rng = np.random.default_rng(2)
    values = np.concatenate([1e-9 * rng.lognormal(0, 1, 120), rng.lognormal(0, 0.5, 80)])
    found = tail_interval(values)
    assert found.high < 1.5 * found.value


def test_the_geometric_ratio_is_free_of_the_bias_of_few_responses():
    rng = np.random.default_rng(6)
    scale = rng.lognormal(0, 1, size=4000)
    above, below = 3 * scale * rng.chisquare(2, 4000) / 2, scale * rng.chisquare(9, 4000) / 9
    found, left_out = geometric_ratio(above, below, (np.full(4000, 3.0), np.full(4000, 10.0)))
    assert left_out == 0
    assert found.low < 3 < found.high
    assert found.high / found.low < 1.2
    naive = float(np.exp(np.log(above / below).mean()))
    assert naive < 0.75 * 3


def test_the_geometric_ratio_leaves_out_questions_without_spread():
    above, below = np.array([2.0, 0.0, 8.0, 4.0]), np.array([1.0, 3.0, 2.0, 0.0])
    found, left_out = geometric_ratio(above, below, (np.full(4, 5.0), np.full(4, 5.0)))
    assert left_out == 2
    assert found.value == pytest.approx(np.sqrt(8))
    nothing, left_out = geometric_ratio(np.zeros(3), np.ones(3), (np.full(3, 5.0), np.full(3, 5.0)))
    assert (nothing.value, left_out) == (None, 3)


def test_top_shares():
    values = np.concatenate([np.full(95, 1.0), np.full(5, 19.0)])
    assert top_share(values) == pytest.approx(0.5)
    assert top_share(np.zeros(4)) is None
    rng = np.random.default_rng(7)
    assert top_share(rng.chisquare(4, 200_000)) == pytest.approx(even_top_share(5), rel=0.02)
