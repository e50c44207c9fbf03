"""Hessian-vector products and the largest eigenvalue, against a dense Hessian from differences of the score engine's
gradients: another code path, with the chunked head and hooks instead of double backward."""

import numpy as np
import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.curvature import CurvatureOptions, PairLoss, lanczos, measure_curvature
from bvpo_stats.gradients.examples import join
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import pair_gradients
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
