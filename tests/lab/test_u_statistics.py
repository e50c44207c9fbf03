"""U-statistics on a population so small that every sample of three examples can be enumerated: exactly unbiased."""

from itertools import product

import numpy as np
import pytest

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.acceptance.replicates import Population
from bvpo_stats.lab.oracle import exact_moments, population_atoms
from bvpo_stats.statistics.estimates import estimates as estimates_of
from bvpo_stats.statistics.moments import Moments

OBJECTIVE = Objective(beta=0.7)
N = 3
PROMPTS = ["question-0", "question-1", "question-2"]  # in three different jackknife groups


@pytest.fixture(scope="module")
def exact(minute):
    return exact_moments(minute, OBJECTIVE)


@pytest.fixture(scope="module")
def samples(minute):
    """(probability, {member: vectors}) of every ordered sample of N examples."""
    atoms = population_atoms(minute, OBJECTIVE)
    t, e, probability = atoms.product()
    population = {"t": atoms.t[t], "e": atoms.e[e], "m": atoms.m[t]}
    return [
        (np.prod(probability[list(rows)]), {name: vectors[list(rows)] for name, vectors in population.items()})
        for rows in product(range(len(t)), repeat=N)
    ]


def truth(exact):
    """The table of estimands, straight from the exact moments."""
    return {
        "b_t.b_t": exact.b_t @ exact.b_t,
        "b_e.b_e": exact.b_e @ exact.b_e,
        "b_t.b_e": exact.b_t @ exact.b_e,
        "tr Sigma_t": exact.tr_sigma_t,
        "tr Sigma_e": exact.tr_sigma_e,
        "tr Sigma_te": exact.tr_sigma_te,
        "A": exact.A,
        "B": exact.B,
        "MSE(0.3)": exact.error(0.3),
    }


def estimates(U, M):
    """The same quantities from U and M, each a mapping from a pair of members such as "tm"."""
    C = {pair: M[pair] - U[pair] for pair in U}
    return {
        "b_t.b_t": U["tt"] - 2 * U["tm"] + U["mm"],
        "b_e.b_e": U["ee"] - 2 * U["em"] + U["mm"],
        "b_t.b_e": U["te"] - U["tm"] - U["em"] + U["mm"],
        "tr Sigma_t": C["tt"],
        "tr Sigma_e": C["ee"],
        "tr Sigma_te": C["te"],
        "A": M["tt"] - 2 * M["te"] + M["ee"],
        "B": M["ee"] - M["te"] - (U["em"] - U["tm"]),
        "MSE(0.3)": 0.09 * M["tt"] + 0.42 * M["te"] + 0.49 * M["ee"] - 0.6 * U["tm"] - 1.4 * U["em"] + U["mm"],
    }


FIELDS = (
    *("bias_trace_sq", "bias_empty_sq", "bias_cross", "var_trace", "var_empty", "var_cross"),
    *("marginal_sq", "trace_dot_marginal", "empty_dot_marginal", "trace_sq", "empty_sq", "trace_dot_empty"),
)
PAIRS = ("tt", "ee", "mm", "te", "tm", "em")


def plain_u_and_m(vectors):
    sums = {name: rows.sum(axis=0) for name, rows in vectors.items()}
    D = {a + b: np.sum(vectors[a] * vectors[b]) for a, b in PAIRS}
    return {p: (sums[p[0]] @ sums[p[1]] - D[p]) / (N * (N - 1)) for p in PAIRS}, {p: D[p] / N for p in PAIRS}


def plug_in_u_and_m(vectors):
    """V-statistics: norms of mean vectors, the diagonal left in."""
    means = {name: rows.mean(axis=0) for name, rows in vectors.items()}
    _, M = plain_u_and_m(vectors)
    return {p: means[p[0]] @ means[p[1]] for p in PAIRS}, M


def expected(samples, statistic):
    totals: dict[str, float] = {}
    for probability, vectors in samples:
        for name, value in estimates(*statistic(vectors)).items():
            totals[name] = totals.get(name, 0.0) + probability * value
    return totals


def test_the_enumeration_is_complete(samples):
    assert len(samples) == 8**N
    assert abs(sum(probability for probability, _ in samples) - 1) < 1e-12


def test_u_statistics_are_exactly_unbiased(exact, samples):
    means = expected(samples, plain_u_and_m)
    for name, value in truth(exact).items():
        assert abs(means[name] - value) < 1e-10, name


def test_streamed_estimates_are_exactly_unbiased(exact, samples):
    """The package's accumulator and every quantity it reports, over the same enumeration."""
    totals: dict[str, float] = {}
    for probability, vectors in samples:
        summary = Moments.init().update(vectors, PROMPTS).finalize()
        estimated = estimates_of(summary).select(0)
        for name in FIELDS:
            totals[name] = totals.get(name, 0.0) + probability * float(getattr(estimated, name))
    for name in FIELDS:
        assert abs(totals[name] - float(getattr(exact.estimates, name))) < 1e-10, name


def test_a_population_of_atoms_knows_the_truth(minute, exact):
    """Gram matrices of the atoms, with a second independent trace draw for the same answers (Theorem 1)."""
    atoms = population_atoms(minute, OBJECTIVE)
    t, e, probability = atoms.product()
    first, again = np.nonzero(atoms.t_prompt[t][:, None] == atoms.t_prompt[None])  # one cell of answers per prompt
    weights = probability[first] * atoms.t_probability[again]
    vectors = {"t": atoms.t[t][first], "e": atoms.e[e][first], "m": atoms.m[t][first]}
    population = Population.from_vectors(vectors, weights, trace2=atoms.t[again])
    found = estimates_of(population.exact()).select(0)
    for name in (*FIELDS, "var_trace_sampling"):
        assert abs(float(getattr(found, name)) - float(getattr(exact.estimates, name))) < 1e-10, name


def test_the_two_spellings_of_the_truth_agree(exact):
    """ExactMoments' own alpha, error and curve against those of Estimates."""
    stated = exact.estimates
    assert exact.curve == pytest.approx([stated.P0, stated.P1, stated.Q0, stated.Q1], abs=1e-14)
    for tau in (0.01, 1.0):
        assert abs(exact.alpha(tau) - stated.numerator(tau) / stated.denominator(tau)) < 1e-12
        assert abs(exact.error(0.3, tau) - stated.error(0.3, tau)) < 1e-14
    assert abs(exact.A / stated.denominator() - 1) < 1e-14
    assert abs(exact.B / stated.numerator() - 1) < 1e-14


def test_plug_in_norms_are_not(exact, samples):
    """The yardstick can tell: V-statistics miss by more than the tolerance in every line that needs U."""
    means = expected(samples, plug_in_u_and_m)
    for name, value in truth(exact).items():
        assert (abs(means[name] - value) > 1e-4) == (name != "A"), name
