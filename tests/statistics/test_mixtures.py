"""Mixtures of several estimators and budgets, against scipy's quadratic programs, enumeration and the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from bvpo_stats.errors import UserError
from bvpo_stats.lab.acceptance.replicates import Population
from bvpo_stats.lab.oracle import OracleConfig, build_oracle, exact_moments
from bvpo_stats.lab.oracle.exact import population_atoms
from bvpo_stats.statistics.alpha import alpha_from_gradients
from bvpo_stats.statistics.mixtures import (
    CHOICES,
    ErrorMatrix,
    best_mixture,
    budget_advice,
    excess_error,
    mixture_from_gradients,
    simplex_minimiser,
    trace_mixture,
)
from bvpo_stats.statistics.moments import summary_of_arrays

C_T, C_E, B, ETA_L = 30.0, 12.0, 4.0, 0.5


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_simplex_minimiser_is_the_quadratic_programs(size, spread):
    """Also where the estimated matrix is indefinite; there scipy needs a start in every corner."""
    rng = np.random.default_rng(size)
    for _ in range(8):
        root = rng.normal(size=(size, size + 1))
        G = root @ root.T + spread * np.diag(rng.normal(size=size))
        found = simplex_minimiser(G)
        starts = [np.full(size, 1 / size), *(0.9 * np.eye(size) + 0.1 / size)]
        least = min(
            minimize(
                lambda w, G=G: w @ G @ w,
                start,
                jac=lambda w, G=G: 2 * G @ w,
                bounds=[(0, 1)] * size,
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                method="SLSQP",
                options={"ftol": 1e-14},
            ).fun
            for start in starts
        )
        assert found.sum() == pytest.approx(1)
        assert (found >= 0).all()
        assert found @ G @ found <= least + 1e-9


def vectors(n=60, d=5, seed=0):
    rng = np.random.default_rng(seed)
    mu, part = rng.normal(size=d), rng.normal(size=(n, d))
    draws = [mu + part + 1.5 * rng.normal(size=(n, d)) for _ in range(4)]
    e = mu + 0.6 * rng.normal(size=d) + 0.5 * part + 0.3 * rng.normal(size=(n, d))
    return draws, e, mu + part + 0.2 * rng.normal(size=(n, d))


@pytest.mark.parametrize("n", [40, 300])
def test_two_estimators_are_alpha_with_its_interval(n):
    (t, *_), e, m = vectors(n)
    mix = mixture_from_gradients({"t": t, "e": e}, m, batch_size=4, eta_l=0.5)
    star = alpha_from_gradients(t, e, m, batch_size=4, eta_l=0.5)
    found = mix.weights["t"]
    assert found.value == pytest.approx(star.value, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((star.low, star.high), abs=1e-9)
    assert mix.weights["e"].low == pytest.approx(1 - star.high, abs=1e-9)
    assert mix.error.value == pytest.approx(float(star.estimates.error(star.value, star.tau)))


def test_means_of_traces_follow_from_one_and_a_second_draw():
    """A population that lists every draw of four traces: its own moments are those that one trace and s give."""
    rng = np.random.default_rng(1)
    cells, steps = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    rows = []
    for cell, signs in itertools.product(range(3), itertools.product((-1.0, 1.0), repeat=4)):
        traces = cells[cell] + np.array(signs)[:, None] * steps[cell]
        e = cells[cell] * 0.5 + 0.3
        rows.append((traces[0], traces[:2].mean(0), traces.mean(0), e, cells[cell] + 0.1, traces[1]))
    t, t2, t4, e, m, second = (np.array(column) for column in zip(*rows, strict=True))
    exact = Population.from_vectors({"t": t, "t2": t2, "t4": t4, "e": e, "m": m}, trace2=second).exact()
    for tau in (1.0, 0.05):
        listed = ErrorMatrix.of_members(exact, ("t", "t2", "t4", "e"), tau)
        derived = ErrorMatrix.of_traces(exact, (1, 2, 4), tau)
        assert derived.names == listed.names
        np.testing.assert_allclose(derived.rows, listed.rows, rtol=1e-10, atol=1e-12)


def test_arrays_of_means_agree_with_second_draws_within_noise():
    draws, e, m = vectors(4000)
    members = {"t": draws[0], "t2": np.mean(draws[:2], axis=0), "t4": np.mean(draws, axis=0), "e": e}
    listed = mixture_from_gradients(members, m, batch_size=8)
    derived = trace_mixture(summary_of_arrays({"t": draws[0], "e": e, "m": m}, trace2=draws[1]), batch_size=8)
    assert listed.weights["t4"].low <= derived.weights["t4"].value <= listed.weights["t4"].high
    # For the same answers more traces are never worse, so one or two of them get no weight.
    assert derived.weights["t"].value == derived.weights["t2"].value == 0
    assert derived.alone["t4"].value < derived.alone["t2"].value < derived.alone["t"].value
    assert str(derived).startswith(f"{derived.weights['t4'].value:.3f} t4 + ")


def test_weights_cover_the_truth():
    """Three estimators of independent noise and different biases: the sets of the weights hold the true ones."""
    rng = np.random.default_rng(3)
    d, n = 4, 60
    biases, scales = np.diag([0.0, 1.4, 1.2]) @ np.eye(3, d), np.array([2.0, 1.0, 0.3])
    G = biases @ biases.T + np.diag(scales**2) * d / 8
    truth = simplex_minimiser(G)
    assert (truth > 0.05).all()
    inside = np.zeros(3)
    for _ in range(20):
        members = {name: b + s * rng.normal(size=(n, d)) for name, b, s in zip("abc", biases, scales, strict=True)}
        mix = mixture_from_gradients(members, 0.5 * rng.normal(size=(n, d)), batch_size=8)
        inside += [found.low <= w <= found.high for found, w in zip(mix.weights.values(), truth, strict=True)]
    assert (inside >= 16).all(), inside


@pytest.fixture(scope="module")
def population():
    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=1, n_answers=3, n_prompts=2, seed=3, drift=0.1))
    atoms = population_atoms(oracle)
    t, e, probability = atoms.product()
    truth = exact_moments(oracle)
    listed = Population.from_vectors({"t": atoms.t[t], "e": atoms.e[e], "m": atoms.m[t]}, probability)
    halved = np.full(len(t), truth.trace_part)
    return Population(listed.members, listed.probabilities, listed.grams, halved), truth


def exact_advice(truth, alpha=0.5):
    """Every choice by the exact moments: alpha, batch, error."""
    both, tau = C_T + C_E, ETA_L / B

    def best(traces, scale):
        s = (1 - 1 / traces) * truth.trace_part
        grid = np.linspace(0, 1, 200_001)
        errors = [truth.error(a, tau * scale) - tau * scale * a * a * s for a in (0.0, 0.5, 1.0)]
        parabola = np.polynomial.Polynomial.fit([0, 0.5, 1], errors, 2)(grid)
        return grid[parabola.argmin()], parabola.min()

    two = both / (2 * C_T), both / (2 * C_T + C_E)
    return {
        "mix": (*best(1, 1.0), B),
        "no_mix": (1.0, truth.error(1.0, tau * C_T / both), B * both / C_T),
        "two_traces_mix": (*best(2, 1 / two[1]), B * two[1]),
        "two_traces": (
            1.0,
            truth.error(1.0, tau / two[0]) - tau / two[0] * truth.trace_part / 2,
            B * two[0],
        ),
        "batch": (alpha, truth.error(alpha, tau / 2), 2 * B),
        "step": (alpha, truth.error(alpha, tau / 2), B),
    }


def settings(**changes):
    return {"trace_tokens": C_T, "empty_tokens": C_E, "batch_size": B, "eta_l": ETA_L} | changes


def test_advice_is_the_oracles(population):
    """Over 12 samples of 300 prompts every error is unbiased, and 95% intervals of the change hold the truth."""
    listed, truth = population
    exact, base = exact_advice(truth), truth.error(0.5, ETA_L / B)
    rng = np.random.default_rng(0)
    errors: dict[str, list[float]] = {name: [] for name in CHOICES}
    covered = dict.fromkeys(CHOICES, 0)
    for _ in range(12):
        summary = next(listed.replicate(rng, 1, 300, groups=20))
        one = {name: getattr(summary, name)[0] for name in ("U", "M", "shift", "group_sizes", "trace_sampling")}
        single = type(summary)(summary.members, summary.blocks, **one, n_examples=300, n_prompts=300)
        for found in budget_advice(single, **settings()):
            weight, error, size = exact[found.choice]
            errors[found.choice].append(found.error)
            assert found.batch_size == pytest.approx(size)
            if found.choice not in ("mix", "two_traces_mix"):
                assert found.alpha == weight
            low, high = (np.nan if end is None else end for end in (found.low, found.high))
            covered[found.choice] += low - 1e-9 <= error / base - 1 <= high + 1e-9
    for name, values in errors.items():
        off = np.mean(values) - exact[name][1]
        assert abs(off) < 3.5 * np.std(values) / 12**0.5 + 0.002 * base, (name, off)
        assert covered[name] >= 9, (name, covered[name])  # 8 or fewer once in 450


def test_progress_and_order(population):
    listed, _ = population
    rng = np.random.default_rng(5)
    rows = listed.draw(rng, 1, 60)[0]
    t = rng.normal(size=(60, 3)) + 1
    found = budget_advice(summary_of_arrays({"t": t, "e": 0.2 * t}, trace2=t[rows % 60]), **settings())
    assert [x.choice for x in found] == list(CHOICES)
    assert [x.progress for x in found] == [1, 1, 1, 1, 0.5, 0.5]
    assert all((x.low is None) == (x.high is None) for x in found)
    # Without second draws nothing is said of two traces.
    found = budget_advice(summary_of_arrays({"t": t, "e": 0.2 * t}), **settings())
    assert [x.choice for x in found] == ["mix", "no_mix", "batch", "step"]


@pytest.mark.parametrize(("noise", "helps"), [(3.0, "yes"), (0.1, "no")])
def test_a_second_trace_beats_the_mix_only_where_traces_make_the_noise(noise, helps):
    """A D_e pair that costs what a trace does: two traces without it have the batch of the mix."""
    rng = np.random.default_rng(2)
    mu, part = np.ones(6), rng.normal(size=(400, 6))
    t, second = (mu + part + noise * rng.normal(size=(400, 6)) for _ in range(2))
    summary = summary_of_arrays({"t": t, "e": mu + 0.8 + 0.2 * part}, trace2=second)
    advice = budget_advice(summary, **settings(empty_tokens=C_T, batch_size=2, alpha=0.9))
    found = next(x for x in advice if x.choice == "two_traces")
    assert (found.traces, found.batch_size, found.helps) == (2, 2.0, helps)


def test_bad_input():
    (t, *_), e, m = vectors(20)
    summary = summary_of_arrays({"t": t, "e": e, "m": m})
    with pytest.raises(UserError, match="second trace draw"):
        trace_mixture(summary)
    with pytest.raises(UserError, match="two to 8"):
        mixture_from_gradients({"t": t}, m)
    with pytest.raises(UserError, match="called m"):
        mixture_from_gradients({"t": t, "m": m}, m)
    with pytest.raises(UserError, match=r"shape \[20\]"):
        mixture_from_gradients({"t": t, "e": e[:, 0]}, m)
    for name, value in (("trace_tokens", 0.0), ("empty_tokens", float("nan")), ("alpha", 1.5)):
        with pytest.raises(UserError, match=name):
            budget_advice(summary, **settings(**{name: value}))
    assert best_mixture(ErrorMatrix.of_traces(summary, (1,), 1.0), batch_size=1, eta_l=1).weights["t"].level == 0.95


def test_excess_error_is_that_of_the_population():
    """Unbiased noisy t, biased quiet e in four dimensions: both errors are known, over weights on a grid."""
    rng, a = np.random.default_rng(0), np.linspace(0, 1, 10_001)
    t, e = 1 + rng.normal(size=(600, 4)), 0.2 + 0.3 * rng.normal(size=(600, 4))
    noise = (4 * a**2 + 0.36 * (1 - a) ** 2) / 8
    step, mean = 2.56 * (1 - a) ** 2 + noise, 4 * (a + 0.2 * (1 - a))
    for eta_l, errors in ((1.0, step), (None, 4 - mean**2 / (mean**2 / 4 + noise))):
        truth = 1 - errors.min() / errors[5_000]
        found = excess_error(summary_of_arrays({"t": t, "e": e}), batch_size=8, eta_l=eta_l)
        assert found.low < truth < found.high
        assert found.value == pytest.approx(truth, abs=0.05)
        assert found.identified
