"""Hessian-vector products and the largest eigenvalue, against a dense Hessian from differences of the score engine's
gradients: another code path, with the chunked head and hooks instead of double backward."""

import numpy as np
import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.curvature import CurvatureOptions, PairLoss, lanczos, measure_curvature, noise_curvature
from bvpo_stats.gradients.engine import BlockLayout
from bvpo_stats.gradients.examples import join
from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import pair_gradients, project_sides
from bvpo_stats.lab.oracle import OracleConfig, build_oracle, draw_pairs
from bvpo_stats.model.subset import lora_subset

N_PAIRS = 3


@pytest.fixture(scope="module")
def policy_and_pairs():
    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=2, n_answers=3, n_prompts=2, seed=3, drift=0.1))
    thinking, nothinking = draw_pairs(oracle, N_PAIRS, np.random.default_rng(0))
    return oracle.policy, [*thinking, *nothinking]


def dense_hessian(policy, subset, pairs, objective, step=1e-4):
    examples, options = join(pairs), StreamOptions(objective=objective, method="none", reference="adapter")

    def gradient():
        return pair_gradients(policy, examples, subset=subset, options=options).t.astype(float).mean(axis=0)

    rows = []
    with torch.no_grad():
        for weight in subset.parameters.values():
            flat = weight.view(-1)
            for place in range(flat.numel()):
                kept = flat[place].item()
                flat[place] = kept + step
                above = gradient()
                flat[place] = kept - step
                below = gradient()
                flat[place] = kept
                rows.append((above - below) / (2 * step))
    return np.array(rows)


@pytest.mark.parametrize("objective", [Objective(beta=1.0), Objective("simpo", beta=2.0, gamma=0.3)])
@pytest.mark.slow
def test_products_and_largest_eigenvalue_match_a_dense_hessian(policy_and_pairs, objective):
    policy, pairs = policy_and_pairs
    subset = lora_subset(policy.model, ["layers.0.self_attn.v_proj"])
    dense = dense_hessian(policy, subset, pairs, objective)
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=1e-6 * np.abs(dense).max())
    vector = np.random.default_rng(1).normal(size=subset.size)
    loss = PairLoss(policy, subset, pairs[:N_PAIRS], objective, max_tokens=20)  # several microbatches
    np.testing.assert_allclose(loss.product(vector), dense @ vector, rtol=0, atol=1e-6 * np.abs(dense @ vector).max())
    found = measure_curvature(policy, subset, pairs, objective, CurvatureOptions(learning_rate=0.5, steps=60))
    ends = np.linalg.eigvalsh(dense)
    assert found.largest_eigenvalue == pytest.approx(ends[-1], rel=1e-4)
    assert found.eta_l == pytest.approx(0.5 * ends[-1], rel=1e-4)
    assert found.residual < 1e-3
    assert found.n_pairs == N_PAIRS


def test_lanczos_finds_both_ends_of_a_random_symmetric_matrix():
    matrix = np.random.default_rng(0).normal(size=(50, 50))
    matrix = matrix + matrix.T
    found = lanczos(lambda v: matrix @ v, 50, steps=50, tolerance=1e-12)
    ends = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose([found.smallest, found.largest], ends[[0, -1]], rtol=1e-9)


def test_a_concave_loss_is_refused(policy_and_pairs, monkeypatch):
    policy, pairs = policy_and_pairs
    monkeypatch.setattr(PairLoss, "product", lambda self, vector: -vector)
    subset = lora_subset(policy.model, ["layers.0.self_attn.v_proj"])
    with pytest.raises(UserError, match="no curvature"):
        measure_curvature(policy, subset, pairs, Objective(), CurvatureOptions(learning_rate=1.0))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf")])
def test_a_learning_rate_must_be_positive(rate):
    with pytest.raises(UserError, match="learning_rate"):
        CurvatureOptions(learning_rate=rate)


def test_curvature_along_the_noise_is_that_of_the_matrices_and_has_no_self_terms():
    """The mean over samples is tr(H Sigma) of the population; pairs along their own noise would inflate it."""
    rng = np.random.default_rng(0)
    n, d, groups = 12, 30, 6
    root = rng.normal(size=(d, d)) / d**0.5
    H, sigma = np.eye(d), root @ root.T
    own = np.repeat(np.arange(groups), n // groups)
    sizes = np.full(groups, n / groups)
    found, inflated = [], []
    for _ in range(400):
        h = rng.normal(size=(n, d)) @ root.T + 0.5
        slopes_of = h - 0.5 + rng.normal(size=(n, d))  # shares its noise with h; E = H + sigma
        means = np.stack([h[own == g].mean(axis=0) for g in range(groups)])
        slopes = slopes_of @ means.T
        found.append(noise_curvature(slopes, own, sizes))
        inflated.append(noise_curvature(slopes, np.full(n, -1), sizes)[0])
    rows = np.array(found)
    truth = np.trace((H + sigma) @ sigma)
    assert rows.shape == (400, 1 + groups)
    assert abs(rows[:, 0].mean() - truth) < 3.5 * rows[:, 0].std() / 20
    assert np.mean(inflated) > 1.5 * truth
    # Leaving a group out is the same estimate of a sample without it.
    again = noise_curvature(slopes[own != 2][:, np.arange(groups) != 2], own[own != 2] - (own[own != 2] > 2), sizes[1:])
    np.testing.assert_allclose(again[0], rows[-1, 3], rtol=1e-12)
    with pytest.raises(UserError, match="four groups"):
        noise_curvature(slopes[:, :3], own, sizes[:3])


@pytest.mark.parametrize("objective", [Objective(beta=1.0), Objective("simpo", beta=2.0, gamma=0.3), Objective("ipo")])
def test_slopes_are_the_roots_of_the_loss_s_second_derivative(policy_and_pairs, objective):
    policy, pairs = policy_and_pairs
    subset = lora_subset(policy.model)
    layout, rng = BlockLayout.of(subset), np.random.default_rng(1)
    directions = {block: rng.normal(size=(2, size)) for block, size in layout.sizes.items()}
    options = StreamOptions(objective=objective, method="none", reference="adapter")
    sides = project_sides(policy, subset, join(pairs).examples, directions, options)
    t = pair_gradients(policy, join(pairs), subset=subset, options=options).t.astype(float)
    along = t @ np.concatenate(list(directions.values()), axis=1).T  # l'(z) dz
    logps = PairLogps(*sides.logps.T, *sides.tokens.T, *sides.references.T)
    terms = objective(logps)
    if objective.name == "ipo":
        first, second = 2 * np.sqrt(terms.loss) * np.sign(terms.chosen_weight), 2.0
    else:  # -log sigmoid(z): l' = -sigmoid(-z) = exp(-loss) - 1, l'' = sigmoid(z) sigmoid(-z)
        first = np.exp(-terms.loss) - 1
        second = -first * (1 + first)
    expected = np.sqrt(second / first**2)[:, None] * along * np.sign(first)[:, None]
    np.testing.assert_allclose(sides.slopes(objective), expected, rtol=1e-5, atol=1e-9)
