"""alpha*, its curve, verdicts and variants against exact populations and brute minimisation."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from bvpo_stats.errors import UserError
from bvpo_stats.lab.acceptance.replicates import Population
from bvpo_stats.statistics.alpha import (
    adam_metric,
    alpha_curve,
    alpha_from_gradients,
    alpha_from_summary,
    alpha_j,
    alpha_limits,
    conditional_variance_ratio,
    curvature_alpha,
    direction_alpha,
    error_curve,
    error_table,
    fixed_alpha_verdict,
    half_split,
    in_metric,
    layer_alphas,
    minimiser,
    trace_sampling_share,
)
from bvpo_stats.statistics.estimates import estimates
from bvpo_stats.statistics.moments import SINGLE_PROMPT_BYTES, Moments, jackknife_groups, summary_of_arrays


def gradients(n=400, d=8, seed=0, bias=0.6, shared=0.5):
    """Unbiased noisy t, biased quiet e, m unbiased and sharing the noise of t."""
    rng = np.random.default_rng(seed)
    mu = rng.normal(size=d)
    noise = rng.normal(size=(n, d))
    t = mu + 0.05 * rng.normal(size=d) + noise
    e = mu + bias * rng.normal(size=d) + 0.3 * rng.normal(size=(n, d))
    m = mu + shared * noise + 0.2 * rng.normal(size=(n, d))
    return {"t": t, "e": e, "m": m}


@pytest.fixture
def vectors():
    return gradients()


@pytest.fixture
def population(vectors):
    return Population.from_vectors(vectors)


def test_alpha_minimises_the_exact_error(population):
    truth = estimates(population.exact()).select(0)
    for tau in (1.0, 1 / 8, 1 / 128):
        found = minimize_scalar(lambda a, tau=tau: float(truth.error(a, tau))).x
        assert float(truth.numerator(tau) / truth.denominator(tau)) == pytest.approx(found, abs=1e-7)


def test_arrays_and_stream_agree_and_the_fields_are_consistent(vectors):
    one = alpha_from_gradients(**vectors, batch_size=4, eta_l=0.5)
    streamed = Moments.init(groups=20).update(vectors, [str(i) for i in range(400)]).finalize()
    two = alpha_from_summary(streamed, batch_size=4, eta_l=0.5)
    assert same_interval(one, two)
    assert one.tau == two.tau == 0.125
    assert 0 < one.low < one.value == one.unclipped < one.high < 1
    assert (one.identified, one.needed, one.n_prompts) == (True, None, 400)
    assert "batch size 4, eta L = 0.5" in str(one)
    assert one.estimates.bias_empty_sq.shape == ()


def same_interval(one, two):
    numbers = ([x.unclipped, x.unclipped_low, x.unclipped_high, x.low, x.high] for x in (one, two))
    return np.allclose(*numbers, rtol=1e-9, atol=1e-12) and one.summary.n_groups == two.summary.n_groups


@pytest.mark.parametrize("n", [40, 256, 257, 400])
def test_one_interval_for_arrays_and_stream_however_many_prompts(n):
    """Single prompts up to 256, then twenty groups; several pairs a prompt, batches and processes do not matter."""
    vectors, rng = gradients(n + n // 4, seed=n), np.random.default_rng(n)
    ids = np.array([f"question {i}" for i in range(n)] + [f"question {i}" for i in range(n // 4)])
    groups = jackknife_groups(n, 8, 3)
    assert groups == (None if n <= 256 else 20)
    parts = []
    for share in np.array_split(rng.permutation(sorted(set(ids))), 3):
        part = Moments.init(groups=groups)
        for some in np.array_split(share, 4):
            rows = np.flatnonzero(np.isin(ids, some))
            part = part.update({name: x[rows] for name, x in vectors.items()}, list(ids[rows]))
        parts.append(Moments.from_arrays(part.to_arrays()))
    streamed = alpha_from_summary(parts[2].merge(parts[0]).merge(parts[1]).finalize(), batch_size=8)
    assert same_interval(alpha_from_gradients(**vectors, clusters=list(ids), batch_size=8), streamed)
    assert streamed.summary.n_groups == (n if groups is None else 20)
    assert streamed.n_prompts == n


def test_sums_of_single_prompts_must_fit_beside_the_model():
    most = SINGLE_PROMPT_BYTES // (100 * 3 * 8)
    assert jackknife_groups(100, most, 3) is None
    assert jackknife_groups(100, most + 1, 3) == 20
    assert jackknife_groups(100, most + 1, 2) is None
    assert jackknife_groups(100, 10, 3, asked=7) == 7


def test_a_prompt_that_comes_twice_is_refused_where_it_shows():
    vectors, ids = gradients(6), [f"q{i}" for i in range(6)]
    once = Moments.init(groups=None).update(vectors, ids)
    for again in (lambda: once.update(vectors, ids), lambda: once.merge(once)):
        with pytest.raises(UserError, match="q0"):
            again()


def test_curve_is_monotone_and_a_weighted_average_of_its_limits(vectors, population):
    summary = summary_of_arrays(vectors)
    batches = np.array([1, 2, 4, 8, 32, 128, 1024, 1e7])
    curve, limits = alpha_curve(summary, batches), alpha_limits(summary)
    assert (np.diff(curve.unclipped) > 0).all()
    parts = estimates(summary).select(0)
    weight = parts.Q0 / (parts.Q0 + parts.Q1 / batches)
    average = weight * limits.bias_only.unclipped + (1 - weight) * limits.variance_only.unclipped
    np.testing.assert_allclose(curve.unclipped, average, atol=1e-12)
    assert curve.unclipped[-1] == pytest.approx(limits.bias_only.unclipped, abs=1e-4)
    single = alpha_from_summary(summary, batch_size=32)
    assert (curve.low[4], curve.high[4]) == (pytest.approx(single.low), pytest.approx(single.high))
    # Only eta L / B matters.
    scaled = alpha_curve(summary, batches / 4, eta_l=0.25)
    np.testing.assert_allclose(scaled.unclipped, curve.unclipped, atol=1e-12)


def test_alpha_j_minimises_the_descent_bound_that_keeps_every_term(population):
    summary = population.exact()
    truth = estimates(summary).select(0)
    mean_t, mean_e = truth.trace_sq, truth.empty_sq

    def bound(a, rho, batch):
        mean_sq = a**2 * mean_t + 2 * a * (1 - a) * truth.trace_dot_empty + (1 - a) ** 2 * mean_e
        return float(truth.bias_sq(a) - (1 - rho) * mean_sq + rho * truth.variance(a) / batch)

    for rho, batch in [(1.0, 1), (0.5, 8), (0.9, 128)]:
        top, bottom = truth.alpha_j_parts(rho, batch)
        found = minimize_scalar(lambda a, rho=rho, batch=batch: bound(a, rho, batch)).x
        assert float(top / bottom) == pytest.approx(found, abs=1e-6)


def test_alpha_j_is_alpha_at_the_edge_and_refuses_beyond(vectors):
    summary = summary_of_arrays(vectors)
    edge, plain = alpha_j(summary, 1.0, batch_size=16), alpha_from_summary(summary, batch_size=16)
    assert edge.unclipped == pytest.approx(plain.unclipped, abs=1e-12)
    assert edge.low == pytest.approx(plain.low, abs=1e-10)
    with pytest.raises(UserError, match="Theorem 3"):
        alpha_j(summary, 1.5)


def test_curvature_alpha_minimises_the_second_order_loss(vectors):
    rng = np.random.default_rng(9)
    root = rng.normal(size=(8, 8))
    H, eta, batch = root @ root.T / 4, 0.05, 4
    named = dict(vectors, Ht=vectors["t"] @ H, He=vectors["e"] @ H)
    exact = Population.from_vectors(named).exact()
    t, e, m = (vectors[k] for k in "tem")
    mean, h = e.mean(0), t.mean(0) - e.mean(0)

    def loss(a):
        mix = a * t + (1 - a) * e
        noise = np.einsum("nd,de,ne->", mix - mix.mean(0), H, mix - mix.mean(0)) / len(mix)
        b = mean + a * h
        return -eta * m.mean(0) @ b + eta**2 / 2 * (b @ H @ b + noise / batch)

    found = minimize_scalar(loss, bounds=(-20, 20), method="bounded", options={"xatol": 1e-10}).x
    repeated = summary_of_arrays(named)
    got = curvature_alpha(repeated, eta, batch_size=batch)
    U, C = exact.U[0, 0], exact.covariance[0, 0]
    top = (U[2, 0] - U[2, 1]) / eta - (U[1, 3] - U[1, 4]) - (C[1, 3] - C[1, 4]) / batch
    bottom = (U + C / batch)[0, 3] - (U + C / batch)[0, 4] - (U + C / batch)[1, 3] + (U + C / batch)[1, 4]
    assert top / bottom == pytest.approx(found, rel=1e-5)
    assert got.unclipped_low <= found <= got.unclipped_high
    L = 3.0
    scaled = summary_of_arrays(dict(vectors, Ht=L * vectors["t"], He=L * vectors["e"]))
    same = curvature_alpha(scaled, 0.2, batch_size=batch)
    assert same.unclipped == pytest.approx(alpha_j(scaled, 0.6, batch_size=batch).unclipped, abs=1e-10)
    with pytest.raises(UserError, match="Ht"):
        curvature_alpha(summary_of_arrays(vectors), eta)


def test_layers_separate_and_their_gain_is_what_is_saved(vectors):
    blocks = {"a": slice(0, 3), "b": slice(3, 8)}
    summary = summary_of_arrays(vectors, blocks=blocks)
    layers = layer_alphas(summary, batch_size=4)
    for name, cut in blocks.items():
        alone = alpha_from_gradients(**{k: v[:, cut] for k, v in vectors.items()}, batch_size=4)
        assert layers.alphas[name].unclipped == pytest.approx(alone.unclipped, abs=1e-12)
        assert layers.alphas[name].low == pytest.approx(alone.low, abs=1e-12)
    # The gain is the error that per-layer weights save.
    parts = estimates(summary, per_block=True)
    B, A = parts.numerator(0.25)[0], parts.denominator(0.25)[0]
    glob = B.sum() / A.sum()
    saved = sum(
        float((estimates(summary.block(n)).select(0)).error(glob, 0.25))
        - float((estimates(summary.block(n)).select(0)).error(B[k] / A[k], 0.25))
        for k, n in enumerate(blocks)
    )
    assert (A * (B / A - glob) ** 2).sum() == pytest.approx(saved, abs=1e-12)
    assert layers.gain.low <= saved <= layers.gain.high
    assert layers.weights["a"] == pytest.approx(A[0])


@pytest.mark.slow
def test_layer_gain_is_not_inflated_where_all_layers_agree():
    """Same truth in every block: the plug-in gain is positive by noise, the corrected one centred at zero."""
    corrected, plugged = [], []
    rng = np.random.default_rng(0)
    for _ in range(100):
        t, e = 1 + rng.normal(size=(40, 12)), 0.3 + rng.normal(size=(40, 12))
        m = 1 + 0.5 * rng.normal(size=(40, 12))
        blocks = {str(k): slice(3 * k, 3 * k + 3) for k in range(4)}
        summary = summary_of_arrays({"t": t, "e": e, "m": m}, blocks=blocks)
        layers = layer_alphas(summary)
        p = estimates(summary, per_block=True)
        B, A = p.numerator()[0], p.denominator()[0]
        plugged.append((B**2 / A).sum() - B.sum() ** 2 / A.sum())
        corrected.append(float(layers.gain.value))
    error = np.std(corrected) / math.sqrt(100)
    assert abs(np.mean(corrected)) < 3.5 * error
    assert np.mean(plugged) > 10 * error


def test_a_layer_without_gradient_has_no_say():
    vectors = {k: np.hstack([v, np.zeros((400, 2))]) for k, v in gradients().items()}
    layers = layer_alphas(summary_of_arrays(vectors, blocks={"live": slice(0, 8), "dead": slice(8, 10)}))
    assert not layers.alphas["dead"].identified
    assert math.isnan(layers.alphas["dead"].value)
    assert layers.gain.value == pytest.approx(0, abs=1e-9)


def test_adam_metric_weights_coordinates(vectors):
    v = np.linspace(0.1, 2.0, 8) ** 2
    P = adam_metric(v, epsilon=0.01)
    np.testing.assert_allclose(P, 1 / (np.sqrt(v) + 0.01))
    scaled = in_metric(vectors, P)
    t, e, m = (vectors[k] for k in "tem")
    d, n = e - t, len(t)
    A = ((d**2) @ P).mean()
    U = ((d.sum(0) * P) @ m.sum(0) - ((d * m) @ P).sum()) / (n * (n - 1))
    B = ((d * e) @ P).mean() - U
    assert alpha_from_gradients(**scaled).unclipped == pytest.approx(B / A, abs=1e-12)
    with pytest.raises(UserError, match="second moments"):
        adam_metric(np.array([1.0, -1.0]))


def test_direction_alpha_is_the_direction_of_the_best_free_combination(vectors, population):
    summary = population.exact()
    p = estimates(summary).select(0)
    tau = 1 / 8
    M = np.array([
        [p.trace_sq + tau * p.var_trace, p.trace_dot_empty + tau * p.var_cross],
        [p.trace_dot_empty + tau * p.var_cross, p.empty_sq + tau * p.var_empty],
    ])  # fmt: skip
    c = np.linalg.solve(M, [p.trace_dot_marginal, p.empty_dot_marginal])
    sample = direction_alpha(summary_of_arrays(vectors), batch_size=8)
    assert sample.unclipped == pytest.approx(c[0] / c.sum(), abs=0.05)
    assert sample.unclipped_low <= c[0] / c.sum() <= sample.unclipped_high


def test_minimiser_is_the_minimum_over_the_unit_interval():
    grid = np.linspace(0, 1, 100001)
    rng = np.random.default_rng(0)
    for B, A in rng.normal(size=(50, 2)):
        best = grid[np.argmin(A * grid**2 - 2 * B * grid)]
        assert float(minimiser(B, A)) == pytest.approx(best, abs=2e-5)
    assert math.isnan(float(minimiser(0.0, 0.0)))


def test_verdict_on_a_fixed_alpha_follows_the_window(population, vectors):
    summary = summary_of_arrays(vectors)
    truth = estimates(population.exact()).select(0)
    answers = set()
    for batch in (1, 4, 16, 64, 1024):
        unclipped = float(truth.numerator(1 / batch) / truth.denominator(1 / batch))
        for alpha in (0.05, 0.3, 0.5, 0.7, 0.95):
            errors = [float(truth.error(a, 1 / batch)) for a in (alpha, 1.0, 0.0)]
            both = errors[0] < min(errors[1:])
            assert both == (2 * unclipped - 1 < alpha < 2 * unclipped)
            verdict = fixed_alpha_verdict(summary, alpha, batch_size=batch)
            answers |= {verdict.beats_trace, verdict.beats_empty}
            # This sample is the population itself, so a decided answer is the right one.
            if "undecided" not in (verdict.beats_trace, verdict.beats_empty):
                assert (verdict.beats_trace == verdict.beats_empty == "yes") == both
            assert str(batch) in verdict.sentence
    assert answers == {"yes", "no", "undecided"}
    with pytest.raises(UserError, match="between 0 and 1"):
        fixed_alpha_verdict(summary, 1.0)


def test_error_table_holds_every_candidate(vectors):
    summary = summary_of_arrays(vectors)
    table = error_table(summary, alpha=0.5, batch_size=16)
    parts = estimates(summary).select(0)
    assert table["zero"].value == pytest.approx(float(parts.marginal_sq))
    assert table["trace"].value == pytest.approx(float(parts.error(1.0, 1 / 16)))
    assert table["fixed"].value == pytest.approx(float(parts.error(0.5, 1 / 16)))
    assert table["alpha_star"].value <= min(table[k].value for k in ("trace", "empty", "fixed"))
    assert table["shrunk_trace"].value <= min(table["trace"].value, table["zero"].value)
    assert all(row.low <= row.value <= row.high for row in table.values())
    curve = error_curve(summary, [0.0, 0.5, 1.0], tau=1 / 16)
    np.testing.assert_allclose(curve.value, [table[k].value for k in ("empty", "fixed", "trace")])
    np.testing.assert_allclose(curve.low, [table[k].low for k in ("empty", "fixed", "trace")])


def test_shrinking_wins_where_noise_drowns_the_signal():
    """At low signal-to-noise the zero vector beats both gradients, which a user must see."""
    rng = np.random.default_rng(0)
    mu = np.full(20, 0.05)
    t, e, m = mu + rng.normal(size=(500, 20)), mu + rng.normal(size=(500, 20)), np.tile(mu, (500, 1))
    table = error_table(summary_of_arrays({"t": t, "e": e, "m": m}))
    assert table["shrunk_trace"].value <= table["zero"].value < table["alpha_star"].low


def test_trace_sampling_share_and_conditional_variances():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(600, 4))  # the data part of t
    t, t2 = (data + 2 * rng.normal(size=(600, 4)) for _ in range(2))
    e = rng.normal(size=(600, 4))
    summary = summary_of_arrays({"t": t, "e": e}, clusters=[i // 2 for i in range(600)], trace2=t2)
    share = trace_sampling_share(summary)
    assert share.unclipped_low < 4 / 5 < share.unclipped_high
    ratio = conditional_variance_ratio(summary, 0.5)
    assert ratio.sets.contains(1 / 5)
    assert (ratio.threshold, ratio.holds) == (3.0, "yes")
    swapped = summary_of_arrays({"t": e, "e": t}, clusters=[i // 2 for i in range(600)])
    assert conditional_variance_ratio(swapped, 0.5).holds == "no"
    with pytest.raises(UserError, match="second trace draw"):
        trace_sampling_share(swapped)
    with pytest.raises(UserError, match="two pairs"):
        conditional_variance_ratio(summary_of_arrays({"t": t, "e": e}))


def test_reference_point_needs_no_marginal_gradient():
    rng = np.random.default_rng(0)
    mu = np.array([1.0, 0.0, -1.0])
    t, e = mu + rng.normal(size=(3000, 3)), np.zeros((3000, 3))
    found = alpha_from_gradients(t, e, batch_size=8)
    assert found.reference_point
    assert found.low < 2 / (2 + 3 / 8) < found.high
    assert float(found.estimates.bias_trace_sq) == pytest.approx(0, abs=1e-12)


def test_small_samples_at_gentle_steps_are_not_identified():
    rng = np.random.default_rng(1)
    t, e, m = (0.01 + rng.normal(size=(12, 50)) for _ in range(3))
    found = alpha_from_gradients(t, e, m, batch_size=1000)
    assert not found.identified
    assert (found.low, found.high) == (0.0, 1.0)
    assert "not identified" in str(found)
    assert found.needed.prompts is None or found.needed.prompts > 12


def test_identical_estimators_make_every_alpha_optimal():
    t = np.random.default_rng(0).normal(size=(30, 4))
    found = alpha_from_gradients(t, t, t)
    assert math.isnan(found.value)
    assert not found.identified


def test_half_split_sees_disagreement_but_not_noise():
    """Its difference is that of the two alphas; its test needs no more than h . E(m1 - m2)."""
    vectors = gradients(n=300)
    rng = np.random.default_rng(3)
    m1, m2 = (vectors["m"] + 0.3 * rng.normal(size=(300, 8)) for _ in range(2))
    t, e = vectors["t"], vectors["e"]
    whole = summary_of_arrays({"t": t, "e": e})

    def split(first, second):
        return half_split(whole, summary_of_arrays({"h": t - e, "d": first - second}), batch_size=4)

    fair, biased = split(m1, m2), split(m1, m2 + 0.5)
    assert fair.agrees
    assert fair.low < 0 < fair.high
    assert not biased.agrees
    one, other = (alpha_from_gradients(t, e, m, batch_size=4).unclipped for m in (m1, m2))
    assert fair.difference == pytest.approx(one - other, abs=1e-12)
