"""Weight diagnostics against closed forms and against scipy's generalised Pareto distribution."""

import math

import numpy as np
import pytest
from scipy import stats

from bvpo_stats.gradients.marginal import (
    anchor_gap,
    diagnose,
    effective_sample_size,
    half_split_cosine,
    k_hat_threshold,
    pareto_k_hat,
)


def test_effective_size_and_largest_weight():
    assert float(effective_sample_size(np.log([1.0, 1.0, 2.0]))) == pytest.approx(16 / 6)
    one = diagnose(np.array([0.0, -800.0, -900.0]))
    assert one.effective_size == pytest.approx(1.0)
    assert one.largest == pytest.approx(1.0)


def test_anchor_gap_is_jeffreys_divergence():
    """For q = N(0, 1) and posterior N(d, 1): log w = d r - d^2 / 2 and J = d^2."""
    d, rng = 1.3, np.random.default_rng(0)
    draws, anchors = rng.normal(size=200000), d + rng.normal(size=200000)
    logs = [d * r - d**2 / 2 + 7.0 for r in (anchors, draws)]  # any normaliser
    assert anchor_gap(*logs) == pytest.approx(d**2, abs=0.02)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_k_hat_recovers_the_tail_of_generalised_pareto_weights(shape):
    """Catches the sign trap: log-weights passed unnegated describe the smallest weights, whose tail is light."""
    pytest.importorskip("arviz_stats")
    weights = stats.genpareto.rvs(shape, size=20000, random_state=1)
    k = pareto_k_hat(np.log(weights))
    tail = np.sort(weights)[-math.ceil(3 * math.sqrt(len(weights))) :]
    fitted, _, _ = stats.genpareto.fit(tail - tail[0], floc=0)
    assert k == pytest.approx(shape, abs=0.12)
    assert k == pytest.approx(fitted, abs=0.06)
    light = pareto_k_hat(np.log(stats.uniform.rvs(size=20000, random_state=1)))
    assert light < 0 < k


def test_k_hat_needs_a_tail():
    assert pareto_k_hat(np.log(np.arange(1.0, 25.0))) is None  # K = 24
    assert pareto_k_hat(np.zeros(100)) is None
    assert [round(k_hat_threshold(k), 3) for k in (10, 100, 10**6)] == [0.0, 0.5, 0.7]
    assert k_hat_threshold(1) == -math.inf


def test_certificates():
    rng = np.random.default_rng(0)
    good = diagnose(0.1 * rng.normal(size=200), anchors=0.1 * rng.normal(size=50))
    assert good.certified
    collapsed = diagnose(20 * rng.normal(size=200), anchors=60 + rng.normal(size=50))
    assert not collapsed.certified
    assert collapsed.anchor_gap > collapsed.log_traces
    silent = diagnose(0.1 * rng.normal(size=8))
    assert not silent.certified  # K < 25 and no anchors: nothing certifies
    assert (silent.k_hat, silent.anchor_gap) == (None, None)
    anchored = diagnose(0.1 * rng.normal(size=8), anchors=0.1 * rng.normal(size=4))
    assert anchored.certified


def test_half_split_cosine():
    rng = np.random.default_rng(0)
    signal = np.array([1.0, 2.0, 3.0])
    scores = signal + 0.01 * rng.normal(size=(40, 3))
    assert half_split_cosine(np.zeros(40), scores) > 0.999
    # Collapsed weights leave one trace on each side: two unrelated directions.
    noise = rng.normal(size=(40, 2000))
    assert abs(half_split_cosine(30 * rng.normal(size=40), noise)) < 0.2
