"""Every estimate is exactly unbiased: its mean over all samples of a small population is the population value."""

from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.lab.acceptance.replicates import Population
from bvpo_stats.statistics.estimates import estimates, noise_scale
from bvpo_stats.statistics.intervals import jackknife_corrected
from bvpo_stats.statistics.moments import summary_of_arrays

DERIVED = ("P0", "P1", "Q0", "Q1")


def values_of(parts):
    names = [f.name for f in fields(parts) if getattr(parts, f.name) is not None] + list(DERIVED)
    return {name: getattr(parts, name) for name in names}


@pytest.fixture
def population():
    """Four outcomes with unequal probabilities; m is unbiased for mu yet strongly dependent on t."""
    rng = np.random.default_rng(0)
    t, e, t2 = rng.normal(size=(3, 4, 3)) + np.array([1.0, 0.0, 1.0])[:, None, None]
    m = 0.7 * t + 0.2 * rng.normal(size=(4, 3))
    return {"t": t, "e": e, "m": m}, t2, np.array([0.4, 0.3, 0.2, 0.1])


def by_hand(vectors, probabilities):
    """Theorem 2's quantities from their definitions."""
    t, e, m = (vectors[k] for k in "tem")
    w = probabilities
    mu, b_t, b_e = w @ m, w @ t - w @ m, w @ e - w @ m
    ct, ce = t - w @ t, e - w @ e
    return {
        "bias_trace_sq": b_t @ b_t,
        "bias_empty_sq": b_e @ b_e,
        "bias_cross": b_t @ b_e,
        "var_trace": w @ (ct**2).sum(1),
        "var_empty": w @ (ce**2).sum(1),
        "var_cross": w @ (ct * ce).sum(1),
        "marginal_sq": mu @ mu,
        "trace_dot_marginal": (w @ t) @ mu,
        "empty_dot_marginal": (w @ e) @ mu,
        "trace_sq": (w @ t) @ (w @ t),
        "empty_sq": (w @ e) @ (w @ e),
        "trace_dot_empty": (w @ t) @ (w @ e),
        "P0": b_e @ b_e - b_t @ b_e,
        "Q0": (b_t - b_e) @ (b_t - b_e),
        "P1": w @ (ce**2).sum(1) - w @ (ct * ce).sum(1),
        "Q1": w @ ((ct - ce) ** 2).sum(1),
    }


def test_the_exact_population_summary_gives_theorem_2(population):
    vectors, t2, w = population
    truth = estimates(Population.from_vectors(vectors, w, t2).exact()).select(0)
    for name, value in by_hand(vectors, w).items():
        assert float(getattr(truth, name)) == pytest.approx(value, abs=1e-12)
    for alpha in (0.0, 0.3, 1.0):
        mix = alpha * vectors["t"] + (1 - alpha) * vectors["e"]
        mse = w @ ((mix - w @ vectors["m"]) ** 2).sum(1)
        assert float(truth.error(alpha)) == pytest.approx(mse, abs=1e-12)
    for factor in (0.0, 0.4):
        mse = w @ ((factor * vectors["t"] - w @ vectors["m"]) ** 2).sum(1)
        assert float(truth.shrunk_error(factor)) == pytest.approx(mse, abs=1e-12)
    best = float(truth.shrink_factor())
    assert all(truth.shrunk_error(best) < truth.shrunk_error(best + step) for step in (-0.01, 0.01))


@pytest.mark.parametrize("size", [3, 4])
def test_unbiased_over_all_tuples(population, size):
    vectors, t2, w = population
    tuples = np.array(list(product(range(4), repeat=size)))
    chance = w[tuples].prod(axis=1)
    drawn = {k: v[tuples] for k, v in vectors.items()}
    parts = estimates(summary_of_arrays(drawn, trace2=t2[tuples])).select(0)
    truth = values_of(estimates(Population.from_vectors(vectors, w, t2).exact()).select(0))
    for name, expected in truth.items():
        assert chance @ values_of(parts)[name] == pytest.approx(float(expected), abs=1e-10), name
    # The formulas of A, B and the mean squared error as Theorem 2's estimators are usually written.
    s = summary_of_arrays(drawn)
    U, M = (s.U + s.shift)[:, 0, 0], (s.M + s.shift)[:, 0, 0]
    A = M[:, 0, 0] - 2 * M[:, 0, 1] + M[:, 1, 1]
    B = M[:, 1, 1] - M[:, 0, 1] - (U[:, 1, 2] - U[:, 0, 2])
    np.testing.assert_allclose(parts.denominator(), A, atol=1e-12)
    np.testing.assert_allclose(parts.numerator(), B, atol=1e-12)
    a = 0.3
    mse = a**2 * M[:, 0, 0] + 2 * a * (1 - a) * M[:, 0, 1] + (1 - a) ** 2 * M[:, 1, 1]
    mse += -2 * a * U[:, 0, 2] - 2 * (1 - a) * U[:, 1, 2] + U[:, 2, 2]
    np.testing.assert_allclose(parts.error(a), mse, atol=1e-12)


def test_a_v_statistic_fails_the_same_test(population):
    vectors, _, w = population
    tuples = np.array(list(product(range(4), repeat=3)))
    chance = w[tuples].prod(axis=1)
    summary = summary_of_arrays({k: v[tuples] for k, v in vectors.items()})
    n = np.concatenate([[3.0], np.full(3, 2.0)])[:, None, None, None]
    with_diagonal = replace(summary, U=((n - 1) * summary.U + summary.M) / n)
    truth = by_hand(vectors, w)
    parts = values_of(estimates(with_diagonal).select(0))
    for name in ("bias_trace_sq", "bias_empty_sq", "var_trace", "P0", "Q0"):
        assert abs(chance @ parts[name] - truth[name]) > 1e-3, name


def test_unbiased_with_unequal_numbers_of_dependent_pairs_per_prompt():
    """Prompts of 2, 1 and 1 pairs; the pairs of one prompt share half of their randomness."""
    rng = np.random.default_rng(1)
    pairs = rng.normal(size=(3, 3, 2, 2)) + 0.5  # member, outcome of a prompt, pair of the prompt, parameter
    w = np.array([0.5, 0.3, 0.2])
    # Both pairs of an outcome have the same marginal law only if single-pair prompts draw one of the two at random.
    outcomes = list(product(range(3), range(3), range(2), range(3), range(2)))
    total, truth = {}, None
    for a, b, i, c, j in outcomes:
        vectors = {
            name: np.stack([pairs[k, a, 0], pairs[k, a, 1], pairs[k, b, i], pairs[k, c, j]])
            for k, name in enumerate("tem")
        }
        parts = values_of(estimates(summary_of_arrays(vectors, clusters=[0, 0, 1, 2])).select(0))
        for name, value in parts.items():
            total[name] = total.get(name, 0.0) + w[a] * w[b] * w[c] / 4 * float(value)
    flat = {name: pairs[k].reshape(6, 2) for k, name in enumerate("tem")}
    truth = by_hand(flat, np.repeat(w, 2) / 2)
    for name, value in truth.items():
        assert total[name] == pytest.approx(value, abs=1e-10), name


def test_reference_point_uses_t_for_mu_without_its_diagonal(population):
    vectors, _, w = population
    tuples = np.array(list(product(range(4), repeat=3)))
    chance = w[tuples].prod(axis=1)
    summary = summary_of_arrays({k: vectors[k][tuples] for k in "te"})
    assert summary.reference_point
    parts = estimates(summary).select(0)
    truth = by_hand(dict(vectors, m=vectors["t"]), w)
    for name in ("bias_empty_sq", "P0", "Q0", "marginal_sq", "var_cross"):
        assert chance @ values_of(parts)[name] == pytest.approx(truth[name], abs=1e-10), name
    np.testing.assert_allclose(parts.bias_trace_sq, 0, atol=1e-14)


def test_trace_sampling_and_data_parts_add_up():
    """Two data points, two equally likely traces each: total variance = trace part + data part."""
    t = np.array([[[0.0, 1.0], [2.0, 0.0]], [[4.0, 4.0], [5.0, 1.0]]])  # data, trace, parameter
    rows = [(x, r, s) for x in range(2) for r in range(2) for s in range(2)]
    first, second = np.array([t[x, r] for x, r, _ in rows]), np.array([t[x, s] for x, _, s in rows])
    population = Population.from_vectors({"t": first, "e": first, "m": first}, trace2=second)
    truth = estimates(population.exact()).select(0)
    within = np.mean([((t[x] - t[x].mean(0)) ** 2).sum() / 2 for x in range(2)])
    centres = t.mean(1)
    between = ((centres - centres.mean(0)) ** 2).sum() / 2
    assert float(truth.var_trace_sampling) == pytest.approx(within)
    assert float(truth.var_trace - truth.var_trace_sampling) == pytest.approx(between)


def test_parabola_identity_and_step_error(population):
    vectors, _, w = population
    truth = estimates(Population.from_vectors(vectors, w).exact()).select(0)
    for tau in (1.0, 1 / 8, 1 / 128):
        A = float(truth.denominator(tau))
        best = float(truth.numerator(tau)) / A
        for a in (-0.5, 0.2, 1.0):
            gap = float(truth.error(a, tau) - truth.error(best, tau))
            assert gap == pytest.approx(A * (a - best) ** 2, abs=1e-12)
    # E_k of Theorem 4 at eta L = 1 is the mean squared error of a batch mean.
    assert noise_scale(128, 1.0) == 1 / 128
    batch = float(truth.bias_sq(0.3) + truth.variance(0.3) / 128)
    assert float(truth.error(0.3, noise_scale(128))) == pytest.approx(batch)


def test_per_block_estimates_add_up(population):
    rng = np.random.default_rng(5)
    vectors = {k: rng.normal(size=(12, 6)) for k in "tem"}
    summary = summary_of_arrays(vectors, blocks={"a": slice(0, 2), "b": slice(2, 6)})
    split, joined = estimates(summary, per_block=True), estimates(summary)
    np.testing.assert_allclose(split.P0.sum(-1), joined.P0, atol=1e-12)
    alone = estimates(summary_of_arrays({k: v[:, 2:] for k, v in vectors.items()}))
    np.testing.assert_allclose(split.var_cross[:, 1], alone.var_cross, atol=1e-12)


def test_jackknife_correction_removes_the_bias_of_a_squared_mean(population):
    """(mean)^2 is biased by Var / N exactly, which the jackknife removes exactly."""
    vectors, _, w = population
    x = vectors["t"][:, 0]
    tuples = np.array(list(product(range(4), repeat=4)))
    drawn = x[tuples]
    without = (drawn.sum(1, keepdims=True) - drawn) / 3
    squares = np.concatenate([drawn.mean(1, keepdims=True), without], axis=1) ** 2
    corrected, _ = jackknife_corrected(squares, np.ones((len(tuples), 4)))
    assert w[tuples].prod(1) @ corrected == pytest.approx((w @ x) ** 2, abs=1e-12)


@pytest.mark.parametrize(("batch", "eta_l"), [(0, 1.0), (-1, 1.0), (8, 0.0), (8, float("nan"))])
def test_impossible_scales_are_refused(batch, eta_l):
    with pytest.raises(UserError):
        noise_scale(batch, eta_l)
