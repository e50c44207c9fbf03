"""Exact moments against autograd of the losses, against the written-out population, and the identities among them."""

import dataclasses
import time
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle import (
    OracleConfig,
    at,
    build_oracle,
    cell_moments,
    drift_law,
    exact_moments,
    in_coordinates,
    population_atoms,
    shortened,
)
from tests.lab.test_enumeration import flat_gradient, joint_log_probs

BETA = 0.7  # large, so that the weights sigmoid(-m) are far from constant
OBJECTIVE = Objective(beta=BETA)
TOL = 1e-10


@pytest.fixture(scope="module")
def moments(drifted):
    return exact_moments(drifted, OBJECTIVE)


@pytest.fixture(scope="module")
def atoms(drifted):
    return population_atoms(drifted, OBJECTIVE)


def expectation(atoms, values):
    """E f over the whole population; values maps (t, e, m) of every example to one row each."""
    return atoms.expectation(values)


# --- against autograd -------------------------------------------------------------------------------------------------


def loss_by_hand(objective, ratio, log_prob, tokens):
    """The three losses from their definitions, at chosen and rejected (log-ratio, log-probability, length)."""
    beta = objective.beta
    if objective.name == "dpo":
        return -logsigmoid(beta * (ratio[0] - ratio[1]))
    if objective.name == "ipo":
        return (ratio[0] / tokens[0] - ratio[1] / tokens[1] - 0.5 / beta) ** 2
    return -logsigmoid(beta * (log_prob[0] / tokens[0] - log_prob[1] / tokens[1]) - objective.gamma)


def autograd_losses(oracle, objective):
    """L_t, L_e and L_m as differentiable sums over the population, from full logits and the definitions alone."""
    losses = {"t": 0.0, "e": 0.0, "m": 0.0}
    grammar = oracle.grammar
    tokens = torch.tensor([len(grammar.completion_ids(trace, 0)) for trace in grammar.traces()], dtype=torch.float64)
    two = torch.tensor(2.0, dtype=torch.float64)  # answer and end of sequence
    for x in range(grammar.n_prompts):
        joint = joint_log_probs(oracle, x)
        with torch.no_grad(), oracle.policy.reference():
            reference = joint_log_probs(oracle, x)
        delta = joint - reference
        log_marginal = torch.logsumexp(joint, 0)
        marginal = log_marginal - torch.logsumexp(reference, 0)
        law = torch.as_tensor(oracle.table.sampling.posterior[x])

        def loss(ratio, log_prob, lengths):
            return loss_by_hand(objective, ratio, log_prob, lengths)

        for a, b in product(range(grammar.n_answers), repeat=2):
            own = loss((marginal[a], marginal[b]), (log_marginal[a], log_marginal[b]), (two, two))
            losses["m"] += oracle.pair_law[x, a, b] * own
            empty = loss((delta[0, a], delta[0, b]), (joint[0, a], joint[0, b]), (tokens[0], tokens[0]))
            losses["e"] += oracle.empty_pair_law[x, a, b] * empty
            pairs = loss(
                (delta[:, None, a], delta[None, :, b]),
                (joint[:, None, a], joint[None, :, b]),
                (tokens[:, None], tokens[None, :]),
            )
            losses["t"] += oracle.pair_law[x, a, b] * (law[:, None, a] * law[None, :, b] * pairs).sum()
    return {name: loss / grammar.n_prompts for name, loss in losses.items()}


logsigmoid = torch.nn.functional.logsigmoid
OBJECTIVES = [OBJECTIVE, Objective("simpo", beta=2.5, gamma=1.0), Objective("ipo", beta=0.4)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_mean_gradients_equal_autograd_of_the_exact_losses(drifted, objective):
    """mu = grad L_m, E g_t = grad L_t and E g_e = grad L_e."""
    exact = exact_moments(drifted, objective)
    means = {"t": exact.mean_t, "e": exact.mean_e, "m": exact.mu}
    for name, loss in autograd_losses(drifted, objective).items():
        assert abs(loss.item() - getattr(exact, f"loss_{name}")) < 1e-12 * max(1, loss.item()), name
        gradient = flat_gradient(loss, drifted)
        np.testing.assert_allclose(means[name], gradient, rtol=0, atol=TOL * max(1, np.abs(gradient).max()))


# --- against the written-out population -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_atoms_reproduce_every_moment(drifted, objective):
    moments, atoms = exact_moments(drifted, objective), population_atoms(drifted, objective)

    def dot(u, v):
        return np.sum(u * v, axis=-1)

    assert abs(atoms.product()[2].sum() - 1) < 1e-12
    expected = {
        "square_tt": lambda t, e, m: dot(t, t),
        "square_ee": lambda t, e, m: dot(e, e),
        "square_mm": lambda t, e, m: dot(m, m),
        "product_te": lambda t, e, m: dot(t, e),
        "product_tm": lambda t, e, m: dot(t, m),
        "product_em": lambda t, e, m: dot(e, m),
        "A": lambda t, e, m: dot(t - e, t - e),
    }
    for name, values in expected.items():
        assert abs(expectation(atoms, values) - getattr(moments, name)) < TOL, name
    mean_t, mean_e, mu = (expectation(atoms, lambda *tem, k=k: tem[k]) for k in range(3))
    for left, right in [
        ((mean_t, mean_e), (moments.mean_t, moments.mean_e)),
        ((mu, mean_e), (moments.mu, moments.mean_e)),
    ]:
        assert abs(left[0] @ left[1] - right[0] @ right[1]) < TOL
    assert abs(np.sum((mean_t - mu) ** 2) - moments.b_t @ moments.b_t) < TOL
    assert abs(np.sum((mean_e - mu) ** 2) - moments.b_e @ moments.b_e) < TOL
    assert abs((mean_e - mu) @ (mean_t - mu) - moments.b_e @ moments.b_t) < TOL
    assert abs(expectation(atoms, lambda t, e, m: dot(t - mean_t, t - mean_t)) - moments.tr_sigma_t) < TOL
    assert abs(expectation(atoms, lambda t, e, m: dot(e - mean_e, e - mean_e)) - moments.tr_sigma_e) < TOL
    assert abs(expectation(atoms, lambda t, e, m: dot(t - mean_t, e - mean_e)) - moments.tr_sigma_te) < TOL
    assert abs(expectation(atoms, lambda t, e, m: dot(e - t, e - mu)) - moments.B) < TOL


def test_variances_given_the_prompt(moments, atoms):
    """E Var(g | x), by prompt over the atoms; Estimates carries them under the right names."""
    within = {"t": 0.0, "e": 0.0}
    members = {
        "t": (atoms.t, atoms.t_prompt, atoms.t_probability),
        "e": (atoms.e, atoms.e_prompt, atoms.e_probability),
    }
    for name, (vectors, prompts, probability) in members.items():
        for x in range(atoms.n_prompts):
            law, found = probability[prompts == x], vectors[prompts == x]
            within[name] += law @ np.sum((found - law @ found) ** 2, axis=1) / atoms.n_prompts
    assert abs(moments.within_prompt_t - within["t"]) < TOL
    assert abs(moments.within_prompt_e - within["e"]) < TOL
    assert abs(within["t"] - within["e"]) > 1e-3
    assert moments.estimates.within_trace == moments.within_prompt_t
    assert moments.estimates.within_empty == moments.within_prompt_e
    assert moments.estimates.var_trace_sampling == moments.trace_part


def test_conditional_variances_of_theorem_1(drifted, moments, atoms):
    """Var over r+- with (x, y+-, y'+-) held fixed: alpha^2 Var(g_t | .), averaged here cell by cell."""
    alpha, total = 0.3, 0.0
    cells = moments.cells
    n_traces = drifted.grammar.n_traces
    per_cell = atoms.t.reshape(-1, n_traces**2, atoms.t.shape[-1])
    laws = atoms.t_probability.reshape(-1, n_traces**2)
    for cell, t, weight in zip(np.argwhere(cells.pair_law > 0), per_cell, laws, strict=True):
        law = weight / weight.sum()
        e = atoms.e[atoms.e_prompt == cell[0]][0]
        mixed = alpha * t + (1 - alpha) * e
        variance = law @ np.sum((mixed - law @ mixed) ** 2, axis=1)
        conditional = cells.square_t[tuple(cell)] - np.sum(cells.mean_t[tuple(cell)] ** 2)
        assert abs(variance - alpha**2 * conditional) < TOL
        total += weight.sum() / drifted.grammar.n_prompts * variance
    assert abs(total - alpha**2 * moments.trace_part) < TOL
    assert moments.trace_part > 0


@pytest.mark.parametrize("name", ["at_reference", "drifted", "default"])
def test_total_variance_is_trace_part_plus_data_part(name, request):
    exact = exact_moments(request.getfixturevalue(name), OBJECTIVE)
    assert abs(exact.trace_part + exact.data_part - exact.tr_sigma_t) < TOL
    # The data part further: sampling of the answers given the prompt, and the prompts themselves.
    given_x = np.einsum("xab,xabd->xd", exact.cells.pair_law, exact.cells.mean_t)
    between = np.mean(np.sum((given_x - exact.mean_t) ** 2, axis=1))
    assert abs(exact.within_prompt_t + between - exact.tr_sigma_t) < TOL
    assert exact.data_part > 0


# --- bias -------------------------------------------------------------------------------------------------------------


def test_trace_gradient_is_unbiased_at_the_reference_and_temperature_1(at_reference):
    exact = exact_moments(at_reference, OBJECTIVE)
    assert np.linalg.norm(exact.mu) > 0.01
    assert np.abs(exact.b_t).max() < 1e-14
    bias = exact.cells.mean_t - exact.cells.marginal
    assert np.abs(bias).max() < 1e-13  # already in every cell, whatever the law of the answers


def test_trace_gradient_is_biased_at_temperature_08(cooled):
    exact = exact_moments(cooled, OBJECTIVE)
    assert np.linalg.norm(exact.b_t) > 0.05 * np.linalg.norm(exact.mu)


def test_selection_by_answer_reward_is_harmless():
    """Best of 2 or best of 9: b_t = 0 all the same."""
    for n_samples in (2, 9):
        oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=2, n_prompts=1, n_samples=n_samples))
        assert np.abs(exact_moments(oracle, OBJECTIVE).b_t).max() < 1e-14


def test_drift_law_by_step_halving(at_reference):
    """b_t(z) = (beta/2)(C+ - C-) delta + (beta^2/4)(C+ + C-) delta + O(norm(delta)^2)."""
    x, a, b = np.argwhere(at_reference.pair_law > 0)[0].tolist()
    direction = np.random.default_rng(0).normal(size=at_reference.theta.shape)
    law = drift_law(at_reference, (x, a, b), direction, BETA)

    def bias(step):
        cells = cell_moments(at(at_reference, at_reference.theta + step * direction), OBJECTIVE)
        return cells.mean_t[x, a, b] - cells.marginal[x, a, b]

    steps = 2e-3 / 2.0 ** np.arange(4)
    forward, backward = [bias(step) for step in steps], [bias(-step) for step in steps]
    errors = [np.linalg.norm(value - step * law) for value, step in zip(forward, steps, strict=True)]
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert (np.abs(ratios - 4) < 0.2).all(), ratios  # second order
    # The linear term itself: Richardson extrapolation of central differences over the halved steps.
    slopes = [(f - g) / (2 * step) for f, g, step in zip(forward, backward, steps, strict=True)]
    for order in (4, 16, 64):
        slopes = [(order * fine - coarse) / (order - 1) for coarse, fine in pairwise(slopes)]
    np.testing.assert_allclose(slopes[0], law, rtol=0, atol=TOL * np.abs(law).max())


def test_empty_trace_probability_cancels_in_the_empty_margin(drifted):
    """Margins and gradients of D_e pairs are those of log pi(y | x, empty), from the D_e prompt of Appendix C.3."""
    grammar, model = drifted.grammar, drifted.policy.model
    delta = drifted.table.log_ratio[:, 0]
    for x in range(grammar.n_prompts):
        prompt_ids = drifted.policy.template.prompt_ids(f"q{x}", "nothinking")

        def answers(ids=prompt_ids):
            return model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[list(grammar.answer_ids)]

        with torch.no_grad():
            policy = answers().numpy()
            with drifted.policy.reference():
                reference = answers().numpy()
        ratio = policy - reference
        for a, b in [(0, 1), (1, 2), (2, 0)]:
            assert abs((delta[x, a] - delta[x, b]) - (ratio[a] - ratio[b])) < 1e-12
            law = answers()
            gradient = flat_gradient(law[a] - law[b], drifted)
            scores = drifted.table.scores[x, 0]
            np.testing.assert_allclose(scores[a] - scores[b], gradient, rtol=0, atol=TOL)
    assert (
        np.abs(drifted.table.policy.trace[:, 0] - drifted.table.reference.trace[:, 0]).min() > 1e-3
    )  # it has to cancel


# --- Theorems 2 and 4 -------------------------------------------------------------------------------------------------


def test_mse_is_a_parabola_about_alpha_unc(moments, atoms):
    mu = expectation(atoms, lambda t, e, m: m)

    def mse(alpha):
        return expectation(atoms, lambda t, e, m: np.sum((alpha * t + (1 - alpha) * e - mu) ** 2, axis=-1))

    lowest = mse(moments.alpha_unc)
    for alpha in (-0.5, 0.0, 0.25, 1.0, 1.7):
        assert abs(mse(alpha) - lowest - moments.A * (alpha - moments.alpha_unc) ** 2) < TOL
        assert abs(mse(alpha) - moments.error(alpha)) < TOL


@pytest.mark.parametrize("batch", [2, 3])
def test_e_k_at_eta_l_1_is_the_mse_of_a_batch(minute, batch):
    """Theorem 4's per-step error at eta L = 1 against the MSE of a mean of B examples, all B-tuples enumerated."""
    exact, atoms, alpha = exact_moments(minute, OBJECTIVE), population_atoms(minute, OBJECTIVE), 0.4
    t, e, probability = atoms.product()
    mixed = alpha * atoms.t[t] + (1 - alpha) * atoms.e[e]
    mu = expectation(atoms, lambda t, e, m: m)
    mse = sum(
        np.prod(probability[list(tuples)]) * np.sum((mixed[list(tuples)].mean(axis=0) - mu) ** 2)
        for tuples in product(range(len(t)), repeat=batch)
    )
    eta_l = 1.0
    bias = exact.bias(alpha)
    e_k = bias @ bias + eta_l * exact.variance(alpha) / batch
    assert abs(e_k - mse) < TOL
    assert abs(exact.error(alpha, eta_l / batch) - mse) < TOL


def test_alpha_of_tau_is_a_weighted_average(moments):
    p0, p1, q0, q1 = moments.curve
    assert q0 > 0
    assert q1 > 0
    taus = np.geomspace(1e-4, 1e3, 40)
    curve = np.array([moments.alpha(tau) for tau in taus])
    averages = (q0 * (p0 / q0) + taus * q1 * (p1 / q1)) / (q0 + taus * q1)
    np.testing.assert_allclose(curve, averages, rtol=0, atol=1e-12)
    assert (np.diff(curve) * np.sign(p1 / q1 - p0 / q0) > 0).all()  # monotone between the two ends
    assert abs(moments.alpha(1.0) - moments.alpha_unc) < TOL
    for tau in (0.01, 1.0, 5.0):
        alpha, step = moments.alpha(tau), 1e-3
        assert moments.error(alpha, tau) < min(moments.error(alpha - step, tau), moments.error(alpha + step, tau))


def test_error_separates_over_parameter_blocks(drifted, moments):
    """alpha_l = B_l / A_l, and the gain of per-block weights is sum_l A_l (alpha_l - alpha)^2."""
    columns = np.eye(len(drifted.theta))
    parts = [exact_moments(in_coordinates(drifted, columns[:, block]), OBJECTIVE) for block in drifted.blocks.values()]
    assert abs(sum(part.A for part in parts) - moments.A) < TOL
    assert abs(sum(part.B for part in parts) - moments.B) < TOL
    parts = [part for part in parts if part.A > 1e-12]
    best = sum(part.error(part.alpha_unc) for part in parts)
    gain = sum(part.A * (part.alpha_unc - moments.alpha_unc) ** 2 for part in parts)
    assert abs(moments.error(moments.alpha_unc) - best - gain) < TOL
    assert gain > 1e-6


def test_short_coordinates_keep_every_inner_product(drifted, moments):
    short = exact_moments(shortened(drifted), OBJECTIVE)
    assert len(short.mu) < len(moments.mu) / 10
    for name in ("square_tt", "product_te", "product_tm", "trace_part", "A", "B", "alpha_unc"):
        assert abs(getattr(short, name) - getattr(moments, name)) < TOL, name


# --- speed ------------------------------------------------------------------------------------------------------------


def test_default_sizes_take_seconds(capsys):
    start = time.perf_counter()
    exact = exact_moments(build_oracle(OracleConfig(drift=0.05, temperature=0.8)))
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\noracle V=4 T=4: 4 x 341 x 3 sequences, {len(exact.mu)} parameters, all moments in {seconds:.1f} s")
    assert seconds < 30  # a few seconds on one core; the slack is for a loaded machine


def test_every_number_is_finite(default):
    exact = exact_moments(default)
    for field in dataclasses.fields(exact):
        if field.name not in ("objective", "cells"):
            assert np.isfinite(getattr(exact, field.name)).all(), field.name
