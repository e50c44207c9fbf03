"""The replicate engine's index arithmetic against the same samples gathered as arrays."""

from dataclasses import replace

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.lab.acceptance.checks import acceptance, bias_check, collect, coverage_band, coverage_check
from bvpo_stats.lab.acceptance.replicates import Population, isometric_coordinates
from bvpo_stats.statistics.estimates import LinearRatio, estimates
from bvpo_stats.statistics.intervals import jackknife_normal
from bvpo_stats.statistics.moments import summary_of_arrays


@pytest.fixture
def heavy():
    """Lognormal scale mixture in 60 dimensions; m is unbiased for mu and shares the noise of t, e is biased."""
    return heavy_tailed(np.random.default_rng(0))


def heavy_tailed(rng, outcomes=2000, d=60, sigma=0.5):
    mu, b_t, b_e = 0.1 * rng.normal(size=d), 0.05 * rng.normal(size=d), 0.15 * rng.normal(size=d)
    scale_t, scale_e = np.exp(sigma * rng.normal(size=(2, outcomes, 1)) - sigma**2)
    noise = scale_t * rng.normal(size=(outcomes, d))
    vectors = {
        "t": mu + b_t + noise,
        "e": mu + b_e + 0.5 * scale_e * rng.normal(size=(outcomes, d)),
        "m": mu + 0.5 * noise + 0.3 * rng.normal(size=(outcomes, d)),
    }
    return Population.from_vectors(vectors), vectors


def test_index_arithmetic_is_the_gathered_sample(heavy):
    population, vectors = heavy
    indices = population.draw(np.random.default_rng(0), 3, 25)
    fast = population.summaries(indices)
    slow = summary_of_arrays({k: v[indices] for k, v in vectors.items()})
    for which in ("U", "M"):
        np.testing.assert_allclose(
            getattr(fast, which) + fast.shift, getattr(slow, which) + slow.shift, rtol=0, atol=1e-10
        )
    labels = np.arange(25) % 6
    grouped = estimates(population.summaries(indices, labels))
    assert grouped.P0.shape == (3, 7)
    without = estimates(summary_of_arrays({k: v[indices[:, labels != 2]] for k, v in vectors.items()}))
    np.testing.assert_allclose(grouped.P0[:, 3], without.P0[:, 0], atol=1e-10)
    np.testing.assert_allclose(grouped.var_trace[:, 3], without.var_trace[:, 0], atol=1e-10)


def test_draws_follow_the_probabilities():
    population = Population.from_vectors({"t": np.eye(3), "e": np.eye(3)}, np.array([0.7, 0.2, 0.1]))
    counts = np.bincount(population.draw(np.random.default_rng(0), 100, 100).ravel())
    assert np.abs(counts / 1e4 - [0.7, 0.2, 0.1]).max() < 0.02
    with pytest.raises(UserError, match="sum to one"):
        Population.from_vectors({"t": np.eye(3)}, np.array([0.7, 0.2, 0.2]))


def test_isometric_coordinates_keep_inner_products():
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 300))
    short = isometric_coordinates(atoms)
    assert short.shape == (40, 5)
    np.testing.assert_allclose(short @ short.T, atoms @ atoms.T, atol=1e-9)


def with_diagonal(summary):
    """The V-statistic: what U becomes when products of an example with itself are kept."""
    size = summary.n_examples - np.concatenate([[0.0], summary.group_sizes[0]])
    n = size[:, None, None, None]
    return replace(summary, U=((n - 1) * summary.U + summary.M) / n)


@pytest.mark.parametrize(("size", "groups"), [(20, None), (50, None), (200, 20)])
def test_acceptance_of_heavy_tailed_population(heavy, size, groups):
    """600 replicates per cell: unbiased estimates, honest intervals; and the V-statistic is caught."""
    population, _ = heavy
    truth = estimates(population.exact()).select(0)
    taus = (1.0, 1 / 8, 1 / 128)
    samples = list(population.replicate(np.random.default_rng(size), 600, size, groups=groups))

    def weighed(summaries):
        return [(summary, [LinearRatio.alpha(summary, tau) for tau in taus]) for summary in summaries]

    checks = acceptance(collect(weighed(samples), taus), truth)
    assert [c for c in checks if not c.passed] == []
    broken = acceptance(collect(weighed(map(with_diagonal, samples)), taus), truth)
    failed = {c.name for c in broken if not c.passed}
    assert "bias bias_trace_sq (standard errors)" in failed
    assert "bias P0 (standard errors)" in failed
    assert any(name.startswith("coverage") for name in failed)


def test_an_interval_that_is_too_short_is_rejected(heavy):
    """The 95% interval of norm(b_t)^2 passes, the 50% one sold as 95% does not: the check can fail."""
    population, _ = heavy
    truth = float(estimates(population.exact()).select(0).bias_trace_sq)
    summary = next(population.replicate(np.random.default_rng(0), 250, 50, chunk=250))
    values = estimates(summary).bias_trace_sq
    good = jackknife_normal(values, summary.group_sizes)
    assert coverage_check("b", (good.low <= truth) & (truth <= good.high), 0.95, "lower", 0.92).passed
    shrunk = jackknife_normal(values, summary.group_sizes, 0.5)
    assert not coverage_check("b", (shrunk.low <= truth) & (truth <= shrunk.high), 0.95, "lower", 0.92).passed


def test_acceptance_rules():
    assert coverage_band(0.95, 2000) == (pytest.approx(0.935, abs=1e-4), pytest.approx(0.965, abs=1e-4))
    assert coverage_band(0.95, 2000, "lower", 0.92) == (0.92, 1.0)
    hits = np.zeros(2000, bool)
    hits[: round(0.93 * 2000)] = True
    assert not coverage_check("x", hits, 0.95).passed
    assert coverage_check("x", hits, 0.95, "lower", 0.92).passed
    rng = np.random.default_rng(0)
    assert bias_check("x", rng.normal(size=1000), 0.0).passed
    assert not bias_check("x", rng.normal(size=1000), 0.2).passed
    assert bias_check("x", np.full(10, 1e-17), 0.0).passed
    assert not bias_check("x", np.full(10, 1e-3), 0.0).passed
