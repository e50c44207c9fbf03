"""Intervals of accuracies: Wilson's formula by hand, textbook limits, and coverage where trials come in clusters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bvpo_stats.lab.acceptance.checks import coverage_band
from bvpo_stats.statistics.proportions import (
    Interval,
    average_interval,
    difference_interval,
    mean_interval,
    proportion_interval,
)


def test_single_trials_give_wilsons_interval() -> None:
    """One trial a cluster: p (1 - p) / v is N - 1, so scipy's Wilson interval is met up to t for z and N for N - 1."""
    values = np.array([1.0] * 300 + [0.0] * 200)
    found = proportion_interval(values)
    wilson = stats.binomtest(300, 500).proportion_ci(method="wilson")
    assert found.value == 0.6
    assert (found.low, found.high) == (pytest.approx(wilson.low, abs=2e-4), pytest.approx(wilson.high, abs=2e-4))


def test_effective_trials_by_hand() -> None:
    means = np.array([1.0, 0.5, 0.75, 0.25])
    p, v = 0.625, np.var([1.0, 0.5, 0.75, 0.25], ddof=1) / 4
    n, t = p * (1 - p) / v, stats.t.ppf(0.95, 3)
    centre = (p + t * t / (2 * n)) / (1 + t * t / n)
    half = t * np.sqrt(p * (1 - p) / n + t * t / (4 * n * n)) / (1 + t * t / n)
    found = proportion_interval(means, trials=4, level=0.9)
    assert (found.value, found.low, found.high) == (p, pytest.approx(centre - half), pytest.approx(centre + half))


def test_no_more_trials_than_were_made() -> None:
    """Equal cluster means would be worth infinitely many trials; 10 x 4 were made."""
    wilson = stats.binomtest(20, 40).proportion_ci(confidence_level=0.95, method="wilson")
    found = proportion_interval(np.full(10, 0.5), trials=4)
    assert found.low is not None
    assert 0 < wilson.low - found.low < 0.03  # t on 9 degrees of freedom is wider than z


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_have_an_interval(value: float) -> None:
    found = proportion_interval(np.full(30, value), trials=32)
    assert found.value == value
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.high <= 1
    assert found.high - found.low == pytest.approx(0.122, abs=0.001)  # t^2 / (30 + t^2) on 29 degrees of freedom


def test_too_little_to_say() -> None:
    assert proportion_interval(np.array([])) == mean_interval(np.array([])) == Interval(None, None, None)
    assert proportion_interval(np.array([0.5])) == Interval(0.5, None, None)
    same = difference_interval(np.array([0.5, 1.0]), np.array([0.25, 0.75]))
    assert same == Interval(0.25, None, None)
    assert average_interval([np.array([1.0, 1.0]), np.array([0.0, 0.0])]) == Interval(0.5, None, None)


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(50)
    new = np.clip(base + rng.normal(0.02, 0.01, size=50), 0, 1)
    found = difference_interval(new, base)
    low, high = stats.t.interval(0.95, 49, loc=(new - base).mean(), scale=stats.sem(new - base))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_average_of_one_size_groups_by_hand() -> None:
    groups = [np.array([0.0, 1.0, 1.0]), np.array([0.5, 0.5, 0.0])]
    variance = sum(np.var(group, ddof=1) / 3 for group in groups)
    freedom = variance**2 / sum((np.var(group, ddof=1) / 3) ** 2 / 2 for group in groups)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance) / 2
    found = average_interval(groups)
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))


def draws(rng: np.random.Generator, mean: float, problems: int, k: int, runs: int) -> np.ndarray:
    """Accuracy of each problem over k samples: problems differ (beta), samples of one problem share its chance."""
    chance = rng.beta(1.5 * mean, 1.5 * (1 - mean), size=(runs, problems))
    return rng.binomial(k, chance) / k


def covered(found: Interval, truth: float) -> bool:
    return found.low is not None and found.high is not None and found.low <= truth <= found.high


@pytest.mark.parametrize(("mean", "problems", "k"), [(0.7, 30, 32), (0.9, 30, 32), (0.4, 200, 8)])
def test_coverage_of_clustered_accuracies(mean: float, problems: int, k: int) -> None:
    """1,000 benchmarks a cell; AIME's size included. Bounds that a true 95% method misses once in 500 cells."""
    rng = np.random.default_rng(problems + k)
    tables = draws(rng, mean, problems, k, runs=1_000)
    share = np.mean([covered(proportion_interval(row, trials=k), mean) for row in tables])
    low, high = coverage_band(0.95, 1_000)
    assert low <= share <= high
    # the test can fail: samples of one problem taken for independent ones
    pooled = [stats.binomtest(round(row.sum() * k), problems * k).proportion_ci(method="wilson") for row in tables]
    assert np.mean([ci.low <= mean <= ci.high for ci in pooled]) < low


@pytest.mark.parametrize("problems", [30, 100])
def test_exact_coverage_of_pass_at_1(problems: int) -> None:
    """One sample a problem: successes are binomial, so coverage is a sum, not a simulation. On a lattice it swings."""
    found = [proportion_interval(np.repeat([1.0, 0.0], [hits, problems - hits])) for hits in range(problems + 1)]
    chances = np.linspace(0.05, 0.95, 181)
    exact = np.array(
        [stats.binom.pmf([hits for hits, ci in enumerate(found) if covered(ci, p)], problems, p).sum() for p in chances]
    )
    assert 0.945 < exact.mean() < 0.965
    assert exact.min() > 0.90
    student = [mean_interval(np.repeat([1.0, 0.0], [hits, problems - hits])) for hits in range(problems + 1)]
    plain = stats.binom.pmf([hits for hits, ci in enumerate(student) if covered(ci, 0.95)], problems, 0.95).sum()
    assert plain < 0.90 < exact[-1]  # what p +- t sqrt(v) would have given near the end


def test_coverage_of_paired_differences() -> None:
    """Base and adapter share each problem's difficulty: the paired interval covers, an unpaired one is far too wide."""
    rng, runs, truth = np.random.default_rng(3), 1_000, 0.05
    chance = rng.beta(1.0, 1.0, size=(runs, 60)) * 0.9
    base, new = rng.binomial(16, chance) / 16, rng.binomial(16, chance + truth) / 16
    found = [difference_interval(a, b) for a, b in zip(new, base, strict=True)]
    low, high = coverage_band(0.95, runs)
    assert low <= np.mean([covered(interval, truth) for interval in found]) <= high
    widths = [
        interval.high - interval.low for interval in found if interval.low is not None and interval.high is not None
    ]
    unpaired = 2 * stats.t.ppf(0.975, 118) * np.sqrt(2 * base.var(axis=1, ddof=1).mean() / 60)
    assert np.mean(widths) < unpaired / 2


def test_coverage_of_the_average_over_benchmarks() -> None:
    rng, runs = np.random.default_rng(4), 1_000
    sizes = ((0.6, 30, 32), (0.85, 100, 1), (0.4, 60, 1))
    tables = [draws(rng, mean, problems, k, runs) for mean, problems, k in sizes]
    truth = float(np.mean([mean for mean, *_ in sizes]))
    found = [average_interval([table[run] for table in tables]) for run in range(runs)]
    low, high = coverage_band(0.95, runs)
    assert low <= np.mean([covered(interval, truth) for interval in found]) <= high
