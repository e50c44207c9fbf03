"""Cluster intervals: the jackknife against hand arithmetic and against its promised coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bvpo_stats.statistics.proportions import Interval, jackknife_interval


def ratio(x: np.ndarray) -> np.ndarray:
    return x[..., 0] / x[..., 1]


def test_mean_gives_the_student_interval() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    found = jackknife_interval(values[:, None], lambda x: x[..., 0])
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert found.value == pytest.approx(4.0)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_log_scale_by_hand() -> None:
    rows = np.array([[2.0, 1.0], [3.0, 1.0], [7.0, 2.0]])
    without = np.log([10 / 3, 9 / 3, 5 / 2])
    spread = np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    factor = np.exp(stats.t.ppf(0.95, 2) * spread)
    found = jackknife_interval(rows, ratio, level=0.9, positive=True)
    assert found.value == pytest.approx(3.0)
    assert (found.low, found.high) == (pytest.approx(3.0 / factor), pytest.approx(3.0 * factor))


def test_undefined_where_there_is_nothing_to_vary() -> None:
    assert jackknife_interval(np.array([[2.0, 1.0]]), ratio) == Interval(2.0, None, None)
    assert jackknife_interval(np.array([[2.0, 0.0], [1.0, 0.0]]), ratio) == Interval(None, None, None)
    # dropping the only cluster with a denominator leaves a value but no interval
    assert jackknife_interval(np.array([[2.0, 1.0], [1.0, 0.0]]), ratio, positive=True) == Interval(3.0, None, None)


def _coverage(n: int, replicates: int, half_width_factor: float = 1.0) -> float:
    """Share of intervals that hold the true variance ratio: 5 normal log-probs a question, gamma-spread scales."""
    rng = np.random.default_rng(7)
    truth = 4.0
    covered = 0
    for _ in range(replicates):
        scale = rng.gamma(4.0, 0.25, size=n)  # questions differ; both modes share the question's scale
        thinking = rng.normal(size=(n, 5)) * np.sqrt(truth * scale)[:, None]
        nothinking = rng.normal(size=(n, 5)) * np.sqrt(scale)[:, None]
        rows = np.stack([thinking.var(axis=1, ddof=1), nothinking.var(axis=1, ddof=1)], axis=1)
        found = jackknife_interval(rows, ratio, positive=True)
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        low = found.value * (found.low / found.value) ** half_width_factor
        high = found.value * (found.high / found.value) ** half_width_factor
        covered += low <= truth <= high
    return covered / replicates


def test_coverage_of_the_variance_ratio() -> None:
    """Nominal 95%; 1,000 replicates have a standard error of 0.7 points, so 3.5 of them bound a true 95% method."""
    error = 3.5 * np.sqrt(0.95 * 0.05 / 1000)
    assert abs(_coverage(60, 1000) - 0.95) < error
    # the check can fail: intervals a third too narrow are caught
    assert _coverage(60, 1000, half_width_factor=2 / 3) < 0.95 - error
