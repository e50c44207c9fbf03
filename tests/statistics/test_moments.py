"""Streamed moments against brute force over pairs of examples, and against themselves in any order and partition."""

import io

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.moments import Moments, group_of, summary_of_arrays

NAMES = ("t", "e", "m")


def brute_force(vectors, prompts):
    """U and M by looking at every pair of examples."""
    prompts = np.asarray(prompts)
    elsewhere = prompts[:, None] != prompts[None, :]
    U, M = np.empty((3, 3)), np.empty((3, 3))
    for a, x in enumerate(vectors):
        for b, y in enumerate(vectors):
            products = x @ y.T
            U[a, b], M[a, b] = products[elsewhere].mean(), np.diagonal(products).mean()
    return U, M


@pytest.fixture
def sample():
    rng = np.random.default_rng(3)
    n, d = 90, 6
    vectors = rng.normal(size=(3, n, d)) + np.array([0.3, -0.2, 0.1])[:, None, None]
    prompts = [f"p{k}" for k in rng.integers(0, 45, n)]
    return vectors, prompts


def stream(vectors, prompts, rows, groups=20, blocks=None, trace2=None):
    named = dict(zip(NAMES, vectors, strict=True))
    ids = [prompts[i] for i in rows]
    if blocks is None:
        state = Moments.init(groups=groups)
        second = None if trace2 is None else trace2[rows]
        return state.update({k: v[rows] for k, v in named.items()}, ids, trace2=second)
    state = Moments.init(blocks=tuple(blocks), groups=groups)
    return state.update({k: {n: v[rows][:, s] for n, s in blocks.items()} for k, v in named.items()}, ids)


def whole(summary, which):
    return (getattr(summary, which) + summary.shift).sum(axis=-3)


def test_equals_brute_force_with_and_without_every_group(sample):
    vectors, prompts = sample
    summary = stream(vectors, prompts, np.arange(90)).finalize()
    groups = np.array([group_of(p) for p in prompts])
    assert summary.n_groups == len(set(groups)) < 20 + 1
    kept = [np.ones(90, bool)] + [groups != g for g in sorted(set(groups))]
    for row, keep in enumerate(kept):
        U, M = brute_force([v[keep] for v in vectors], np.array(prompts)[keep])
        np.testing.assert_allclose(whole(summary, "U")[row], U, atol=1e-12)
        np.testing.assert_allclose(whole(summary, "M")[row], M, atol=1e-12)


def test_arrays_leave_every_prompt_out(sample):
    vectors, prompts = sample
    summary = summary_of_arrays(dict(zip(NAMES, vectors, strict=True)), clusters=prompts)
    order = list(dict.fromkeys(prompts))
    assert summary.n_prompts == summary.n_groups == len(order)
    for row, name in [(0, None), (1, order[0]), (7, order[6]), (len(order), order[-1])]:
        keep = np.array([p != name for p in prompts])
        U, M = brute_force([v[keep] for v in vectors], np.array(prompts)[keep])
        np.testing.assert_allclose(whole(summary, "U")[row], U, atol=1e-12)
        np.testing.assert_allclose(whole(summary, "M")[row], M, atol=1e-12)


@pytest.mark.parametrize("clustered", [True, False])
def test_any_partition_order_and_merge_tree_gives_the_same(sample, clustered):
    vectors, prompts = sample
    prompts = prompts if clustered else [f"q{i}" for i in range(90)]
    reference = stream(vectors, prompts, np.arange(90)).finalize()
    rng = np.random.default_rng(0)
    for _ in range(5):
        part_of = dict(zip(dict.fromkeys(prompts), rng.integers(0, 6, 90), strict=False))
        parts = []
        for k in range(6):
            rows = rng.permutation([i for i in range(90) if part_of[prompts[i]] == k])
            if len(rows):
                parts.append(stream(vectors, prompts, rows))
        rng.shuffle(parts)
        while len(parts) > 1:  # a random merge tree
            i = rng.integers(0, len(parts) - 1)
            parts[i : i + 2] = [parts[i + 1].merge(parts[i])]
        merged = parts[0].finalize()
        for name in ("U", "M", "shift", "group_sizes"):
            np.testing.assert_allclose(getattr(merged, name), getattr(reference, name), rtol=0, atol=1e-12)
        assert merged.n_prompts == reference.n_prompts
        assert merged.n_examples == 90


def test_blocks_add_up_and_are_what_their_columns_give(sample):
    vectors, prompts = sample
    blocks = {"attention": slice(0, 2), "mlp": slice(2, 6)}
    split, joined = (stream(vectors, prompts, np.arange(90), blocks=b).finalize() for b in (blocks, None))
    np.testing.assert_allclose(whole(split, "U"), whole(joined, "U"), atol=1e-12)
    alone = stream(vectors[:, :, :2], prompts, np.arange(90)).finalize()
    np.testing.assert_allclose(split.block("attention").U, alone.U, atol=1e-12)
    arrays = summary_of_arrays(dict(zip(NAMES, vectors, strict=True)), clusters=prompts, blocks=blocks)
    np.testing.assert_allclose(arrays.U[0], split.U[0], atol=1e-12)


def test_trace_draws_and_repeated_prompts(sample):
    vectors, prompts = sample
    trace2 = vectors[0] + np.random.default_rng(1).normal(size=vectors[0].shape)
    rows = np.arange(90)
    summary = stream(vectors, prompts, rows, trace2=trace2).finalize()
    expected = ((vectors[0] - trace2) ** 2).sum(1).mean() / 2
    np.testing.assert_allclose(summary.trace_sampling[0].sum(), expected, rtol=1e-12)
    names = np.array(prompts)
    spreads = []
    for p in dict.fromkeys(prompts):
        its = [v[names == p] for v in vectors]
        if len(its[0]) > 1:
            spreads.append([[np.trace(np.cov(x.T, y.T)[:6, 6:]) for y in its] for x in its])
    np.testing.assert_allclose(summary.within_prompt[0].sum(0), np.mean(spreads, axis=0), rtol=1e-10)
    arrays = summary_of_arrays(dict(zip(NAMES, vectors, strict=True)), clusters=prompts, trace2=trace2)
    np.testing.assert_allclose(arrays.trace_sampling[0], summary.trace_sampling[0], rtol=1e-12)
    np.testing.assert_allclose(arrays.within_prompt[0], summary.within_prompt[0], rtol=1e-10, atol=1e-12)
    assert stream(vectors, [str(i) for i in range(90)], rows).finalize().within_prompt is None


def test_resume_from_npz_continues_bit_for_bit(sample):
    vectors, prompts = sample
    first = [i for i in range(90) if hash_free_half(prompts[i])]
    second = [i for i in range(90) if not hash_free_half(prompts[i])]
    state = stream(vectors, prompts, first)
    file = io.BytesIO()
    np.savez(file, **state.to_arrays())
    file.seek(0)
    with np.load(file) as arrays:
        resumed = Moments.from_arrays(arrays)
    named = {k: v[second] for k, v in zip(NAMES, vectors, strict=True)}
    ids = [prompts[i] for i in second]
    one, other = resumed.update(named, ids).finalize(), state.update(named, ids).finalize()
    np.testing.assert_array_equal(one.U, other.U)
    restored = type(one).from_arrays(one.to_arrays())
    np.testing.assert_array_equal(restored.M, one.M)
    assert (restored.members, restored.n_prompts) == (one.members, one.n_prompts)


def hash_free_half(prompt):
    return int(prompt[1:]) % 2 == 0


def test_memory_does_not_grow_with_examples():
    rng = np.random.default_rng(0)
    sizes = []
    state = Moments.init()
    for step in range(6):
        batch = {k: rng.normal(size=(200, 5)) for k in NAMES}
        state = state.update(batch, [f"{step}-{i}" for i in range(200)])
        sizes.append(
            (state.nbytes, sum(v.nbytes for k, v in state.to_arrays().items() if not k.startswith("prompts/")))
        )
    assert len(set(sizes)) == 1
    assert sizes[0][0] == 3 * 20 * 5 * 8


def test_a_large_common_offset_costs_no_digits(sample):
    """Naive sums of squares would lose all digits of the variances here: (1e8)^2 = 1e16."""
    vectors, _ = sample
    # Whole numbers, so that adding the offset is exact and the truth is that of the sample without it. Prompts have
    # equal numbers of pairs: with unequal ones M - U itself, not its rounding, depends on the offset.
    vectors = np.round(vectors * 100)
    for names in ([str(i // 2) for i in range(90)], [str(i) for i in range(90)]):
        plain = stream(vectors, names, np.arange(90)).finalize()
        moved = stream(vectors + 1e8, names, np.arange(90)).finalize()
        np.testing.assert_allclose(moved.covariance, plain.covariance, rtol=1e-6)
        arrays = summary_of_arrays(dict(zip(NAMES, vectors + 1e8, strict=True)), clusters=names)
        np.testing.assert_allclose(arrays.covariance[0], plain.covariance[0], rtol=1e-6)


def test_float32_vectors_are_summed_in_float64(sample):
    vectors, prompts = sample
    single = vectors.astype(np.float32)
    a = stream(single, prompts, np.arange(90)).finalize()
    b = stream(single.astype(np.float64), prompts, np.arange(90)).finalize()
    np.testing.assert_array_equal(a.U, b.U)


def test_groups_of_prompts_are_stable_and_spread():
    assert [group_of("x"), group_of("x"), group_of(7)] == [group_of("x"), group_of("x"), group_of("7")]
    assert group_of(np.int64(7)) == group_of(7)
    counts = np.bincount([group_of(f"prompt {i}") for i in range(20000)], minlength=20)
    # Each count is binomial(20000, 1/20): mean 1000, standard deviation 31.
    assert np.abs(counts - 1000).max() < 5 * 31


def test_bad_input_is_named(sample):
    vectors, prompts = sample
    state = Moments.init()
    good = {k: v[:4] for k, v in zip(NAMES, vectors, strict=True)}
    with pytest.raises(UserError, match="missing"):
        state.update({"t": good["t"], "e": good["e"]}, prompts[:4])
    with pytest.raises(UserError, match="shape"):
        state.update(good, prompts[:3])
    bad = dict(good, e=np.where(np.arange(4)[:, None] == 2, np.inf, good["e"]))
    with pytest.raises(UserError, match=r"'e' of example 2 .* not finite"):
        state.update(bad, prompts[:4])
    with pytest.raises(UserError, match="no examples"):
        state.finalize()
    with pytest.raises(UserError, match="too few"):
        state.update({k: v[:2] for k, v in good.items()}, ["a", "b"]).finalize()
    with pytest.raises(UserError, match="merge"):
        state.merge(Moments.init(groups=10))
    with pytest.raises(UserError, match="at least 2"):
        Moments.init(groups=1)
    with pytest.raises(UserError, match="one shape"):
        summary_of_arrays({"t": vectors[0], "e": vectors[1][:5]})
