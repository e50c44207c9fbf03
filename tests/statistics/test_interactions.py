"""Interactions of groups against brute force, and what they do for intervals near degeneracy."""

import numpy as np
import pytest

from bvpo_stats.statistics import summary_of_arrays
from bvpo_stats.statistics.calibration import (
    DifferenceSkew,
    interaction_variance,
    pair_matrix,
    u_centred,
    undo_interaction,
)
from bvpo_stats.statistics.estimates import LinearRatio, estimates
from bvpo_stats.statistics.intervals import BIAS_TRACE, MARGINAL, jackknife_normal, squared_norm, wilson_ends
from bvpo_stats.statistics.moments import DEFAULT_GROUPS, MOST_SINGLE_PROMPTS, Moments, group_of


def test_u_centred_values_have_no_part_of_one_group_alone():
    rng = np.random.default_rng(0)
    products = rng.normal(size=(3, 8, 8))
    products = products + np.swapaxes(products, 1, 2)
    matrix = pair_matrix(u_centred(products), 8)
    np.testing.assert_allclose(matrix.sum(axis=-1), 0, atol=1e-12)
    np.testing.assert_allclose(matrix, np.swapaxes(matrix, 1, 2))
    alone = rng.normal(size=8)
    shifted = products + alone[:, None] + alone + np.diag(rng.normal(size=8))
    np.testing.assert_allclose(u_centred(shifted), u_centred(products), atol=1e-12)


@pytest.mark.parametrize("sizes", [np.ones(12), np.array([1, 2, 3, 1, 5, 2, 2, 4, 1, 1, 3, 2.0])])
def test_second_order_variance_is_unbiased(sizes):
    """E r^2 of the kernel x.y is tr Sigma^2 whatever the mean; group means stand for their members."""
    rng, scales = np.random.default_rng(1), np.array([2.0, 1.0, 0.5])
    means = rng.normal(size=(4000, 12, 3)) * scales / np.sqrt(sizes[:, None]) + [3.0, -1.0, 0.5]
    found = interaction_variance(u_centred(means @ np.swapaxes(means, 1, 2)), np.broadcast_to(sizes, (4000, 12)))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - (scales**4).sum()) < 3.5 * error


def test_skew_of_a_difference_is_that_of_its_parts_combined():
    rng = np.random.default_rng(2)
    influences, interactions = rng.normal(size=(5, 2, 9)), rng.normal(size=(5, 2, 36))
    interactions[:, 0] += 3 * influences[:, 0, :8].mean(axis=-1, keepdims=True)
    skew = DifferenceSkew.of(influences, pair_matrix(interactions, 9))
    for a in (-0.7, 0.0, 1.3):
        psi = influences[:, 0] - a * influences[:, 1]
        r = pair_matrix(interactions[:, 0] - a * interactions[:, 1], 9)
        terms = 2 * psi * np.einsum("rgh,rh->rg", r, psi) / 8
        scale = (psi**2).mean(axis=-1) ** 1.5
        value, error = terms.mean(axis=-1), 4 * terms.var(axis=-1, ddof=1) / 9
        found = skew.at(np.full(5, a))
        np.testing.assert_allclose(found[0], value / scale, atol=1e-12)
        np.testing.assert_allclose(found[1], error / scale**2, atol=1e-12)


def test_correction_is_monotone():
    t = np.linspace(-8, 8, 400)
    for skew in (-6.0, -0.5, 0.0, 2.0, 9.0):
        assert (np.diff(undo_interaction(t, np.array(skew), 20)) >= -1e-12).all()


def test_streamed_interactions_are_those_of_group_means():
    rng = np.random.default_rng(3)
    vectors = {name: rng.normal(size=(60, 4)) + 0.3 for name in ("t", "e", "m")}
    ids = [f"q{i}" for i in range(60)]
    moments = Moments.init(groups=6).update({n: v[:25] for n, v in vectors.items()}, ids[:25])
    rest = Moments.init(groups=6).update({n: v[25:] for n, v in vectors.items()}, ids[25:])
    summary = rest.merge(moments).finalize()
    labels = np.array([group_of(i, 6) for i in ids])
    means = {n: np.stack([v[labels == g].mean(axis=0) for g in range(6)]) for n, v in vectors.items()}
    for a, name in enumerate(("t", "e", "m")):
        for b, other in enumerate(("t", "e", "m")):
            gram = means[name] @ means[other].T
            expected = u_centred((gram + gram.T) / 2)
            np.testing.assert_allclose(summary.interactions[:, 0, a, b], expected, atol=1e-12)


def test_interactions_follow_linear_statistics():
    rng = np.random.default_rng(4)
    t, e, m = rng.normal(size=(3, 15, 4))
    found = LinearRatio.of(
        summary_of_arrays({"t": t, "e": e, "m": m}), lambda p: (p.numerator(0.3), p.denominator(0.3))
    )
    d, w = e - t, e - m - 0.3 * e
    for got, (x, y) in zip(found.interactions, ((d, w), (d, d * 0.7)), strict=True):
        gram = x @ y.T
        np.testing.assert_allclose(got, u_centred((gram + gram.T) / 2), atol=1e-12)


def test_more_prompts_than_groups_are_left_out_in_groups():
    rng = np.random.default_rng(5)
    n = MOST_SINGLE_PROMPTS + 100
    vectors = {name: rng.normal(size=(n, 3)) + 0.2 for name in ("t", "e", "m")}
    summary = summary_of_arrays(vectors)
    assert summary.n_groups == DEFAULT_GROUPS
    assert summary.n_prompts == n
    kept = np.array([group_of(i) != 7 for i in range(n)])
    without = estimates(summary_of_arrays({name: v[kept] for name, v in vectors.items()})).select(0)
    for name, value in vars(estimates(summary).select(8)).items():
        if value is not None:
            np.testing.assert_allclose(value, getattr(without, name), rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("strength", [0.0, 0.15, 0.5])
@pytest.mark.slow
def test_squared_norm_covers_where_the_jackknife_interval_does_not(strength):
    """A bias of a standard error or so in few dimensions: U +- t se misses the truth from below."""
    rng, replicates, n = np.random.default_rng(6), 2000, 100
    mean = strength * np.array([1.0, 0.0, 0.0])
    t = rng.normal(size=(replicates, n, 3)) * [1.0, 0.7, 0.4] + mean
    summary = summary_of_arrays({"t": t, "e": np.zeros_like(t), "m": np.zeros_like(t)})
    wilson = squared_norm(summary, BIAS_TRACE)
    plain = jackknife_normal(estimates(summary).bias_trace_sq, summary.group_sizes, floor=0.0)
    truth = strength**2
    covered, before = (np.mean((x.low <= truth + 1e-12) & (truth <= x.high)) for x in (wilson, plain))
    assert 0.93 <= covered <= 0.985
    if strength == 0.15:
        assert before < 0.92


def test_squared_norm_is_the_unbiased_estimate_and_settles_on_the_jackknife_interval():
    rng = np.random.default_rng(7)
    t, e, m = rng.normal(size=(3, 250, 3)) + np.array([5.0, -4.0, 2.0])
    summary = summary_of_arrays({"t": t, "e": e, "m": m})
    found, parts = squared_norm(summary, MARGINAL), estimates(summary)
    np.testing.assert_allclose(found.value, parts.marginal_sq[0])
    plain = jackknife_normal(parts.marginal_sq, summary.group_sizes)
    np.testing.assert_allclose([found.low, found.high], [plain.low, plain.high], rtol=0.02)


def test_wilson_ends_solve_their_equation():
    low, high = wilson_ends(np.array(1.0), np.array(0.3), np.array(1.4), np.array(0.05), 2.1)
    for end in (low, high):
        assert (1.0 - end) ** 2 == pytest.approx(2.1**2 * (0.3 * end / 1.4 + 0.05))
    at_point = wilson_ends(np.array(0.0), np.array(0.0), np.array(0.0), np.array(0.0), 2.0)
    assert [float(x) for x in at_point] == [0.0, 0.0]
