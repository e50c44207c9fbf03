"""The jackknife against closed forms, Fieller's sets against the inequality they solve."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.alpha import (
    alpha_from_gradients,
    alpha_from_summary,
    prompts_needed,
    trace_sampling_share,
)
from bvpo_stats.statistics.calibration import hall_transform
from bvpo_stats.statistics.estimates import LinearRatio, estimates
from bvpo_stats.statistics.intervals import (
    BOUNDED,
    COMPLEMENT,
    FEWEST,
    WHOLE_LINE,
    Tails,
    fieller_sets,
    jackknife_covariance,
    jackknife_normal,
    ratio_sets,
    size_slopes,
    t_quantile,
)
from bvpo_stats.statistics.moments import Moments, summary_of_arrays
from bvpo_stats.statistics.tails import effective_number, unseen_mean


def deleted_means(x, labels):
    """``[..., 1 + G]`` of the mean of x over examples, whole and without each group."""
    groups = sorted(set(labels))
    return np.stack([x.mean(-1), *(x[..., labels != g].mean(-1) for g in groups)], axis=-1)


def test_jackknife_of_means_is_the_textbook_covariance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 30)) + 1
    labels = np.arange(30)
    covariance = jackknife_covariance(deleted_means(x, labels), np.ones(30))
    np.testing.assert_allclose(covariance, np.cov(x) / 30, rtol=1e-10)


def test_equal_groups_give_the_textbook_formula_for_curved_statistics():
    x = np.random.default_rng(0).normal(size=40)
    theta = np.exp(deleted_means(x, np.arange(40) % 8))
    textbook = 7 / 8 * ((theta[1:] - theta[1:].mean()) ** 2).sum()
    assert jackknife_covariance(theta[None], np.full(8, 5.0))[0, 0] == pytest.approx(textbook, rel=1e-12)


def ratio_of(B, A, **more):
    """The ratio of two means ``[..., N]``, single prompts left out."""
    each = np.arange(B.shape[-1])
    return LinearRatio(deleted_means(B, each), deleted_means(A, each), np.ones(B.shape), **more)


def test_jackknife_with_unequal_groups_is_unbiased_for_a_mean():
    """Exact expectation over all 3^6 samples of a three-point population, groups of 1, 2 and 3."""
    points, w = np.array([0.0, 1.0, 5.0]), np.array([0.5, 0.3, 0.2])
    tuples = np.array(list(product(range(3), repeat=6)))
    labels, sizes = np.array([0, 1, 1, 2, 2, 2]), np.array([1.0, 2.0, 3.0])
    values = deleted_means(points[tuples], labels)[:, None, :]
    variance = jackknife_covariance(values, sizes)[:, 0, 0]
    truth = (w @ points**2 - (w @ points) ** 2) / 6
    assert w[tuples].prod(1) @ variance == pytest.approx(truth, rel=1e-12)
    # The formula for equal groups would be off.
    naive = 2 / 3 * ((values[:, 0, 1:] - values[:, 0, 1:].mean(1, keepdims=True)) ** 2).sum(1)
    assert abs(w[tuples].prod(1) @ naive - truth) > 0.01 * truth


def test_normal_interval_is_students():
    x = np.random.default_rng(1).normal(size=25)
    got = jackknife_normal(deleted_means(x, np.arange(25)), np.ones(25), 0.9)
    low, high = stats.t.interval(0.9, 24, x.mean(), x.std(ddof=1) / 5)
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))
    floored = jackknife_normal(deleted_means(x, np.arange(25)), np.ones(25), 0.9, floor=x.mean() + 0.1)
    assert floored.low == x.mean() + 0.1
    assert floored.value == pytest.approx(x.mean())  # the estimate itself is never clipped


@pytest.mark.parametrize(
    ("B", "A", "shape"),
    [
        (0.4, 1.0, BOUNDED),
        (-0.4, 3.0, BOUNDED),
        (1.0, 0.3, COMPLEMENT),
        (-1.0, 0.1, COMPLEMENT),
        (0.1, 0.05, WHOLE_LINE),
    ],
)
def test_fieller_set_solves_its_inequality(B, A, shape):
    covariance, q = np.array([[0.04, 0.01], [0.01, 0.05]]), 2.1
    sets = fieller_sets(np.asarray(B), np.asarray(A), covariance, q)
    assert sets.shape == shape
    grid = np.concatenate([np.linspace(-50, 50, 40001), [B / A, 1e6, -1e6]])
    variance = covariance[0, 0] - 2 * grid * covariance[0, 1] + grid**2 * covariance[1, 1]
    np.testing.assert_array_equal(sets.contains(grid), (B - grid * A) ** 2 <= q**2 * variance)
    low, high, identified = sets.clipped()
    if shape == BOUNDED:
        assert (low, high) == (np.clip(sets.low, 0, 1), np.clip(sets.high, 0, 1))
        assert identified == (low > 0 or high < 1)
    else:
        assert (low, high, bool(identified)) == (0, 1, False)


def test_an_impossible_or_empty_denominator_identifies_nothing():
    tiny = np.eye(2) * 1e-6
    assert fieller_sets(np.asarray(0.5), np.asarray(-1.0), tiny, 2.0).shape == WHOLE_LINE
    nothing = fieller_sets(np.asarray(0.0), np.asarray(0.0), np.zeros((2, 2)), 2.0)
    assert nothing.shape == WHOLE_LINE
    assert nothing.contains(0.3)
    bounded_but_silent = fieller_sets(np.asarray(0.5), np.asarray(1.0), np.diag([0.2, 0.01]), 2.0)
    assert bounded_but_silent.shape == BOUNDED
    assert not bounded_but_silent.clipped()[2]  # covers all of [0, 1]


def test_fieller_is_exact_for_normal_numerators_and_denominators():
    """With known covariance, P(set holds the ratio) = level exactly, whatever the signal."""
    rng = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.3], [0.3, 1.0]])
    draws = rng.multivariate_normal([1.0, 1.5], covariance, size=40000)
    sets = fieller_sets(draws[:, 0], draws[:, 1], covariance, stats.norm.ppf(0.975))
    # A significantly negative A (impossible here but for noise) is widened to the whole line: +0.0003.
    covered = sets.contains(1 / 1.5).mean()
    assert abs(covered - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 40000) + 0.0004
    assert set(np.unique(sets.shape)) == {BOUNDED, COMPLEMENT, WHOLE_LINE}


def test_sets_are_students_where_the_denominator_is_sharp():
    rng = np.random.default_rng(2)
    A = rng.normal(size=4000) * 0.1 + 2
    B = 0.4 * A + rng.normal(size=4000) * 0.1
    found = ratio_sets(ratio_of(B, A))
    standard_error = (B - B.mean() / A.mean() * A).std(ddof=1) / math.sqrt(4000) / A.mean()
    assert found.high - found.low == pytest.approx(2 * t_quantile(0.95, 4000) * standard_error, rel=0.01)
    assert found.n_eff == pytest.approx(4000 / 3, rel=0.1)
    assert found.largest == pytest.approx(12 / 4000, rel=0.5)


@pytest.mark.parametrize("skewness", [-3.0, -0.5, 1.0, 4.0])
def test_hall_transform_is_monotone_with_its_known_closed_form(skewness):
    """T + l T^2 / 3 + l^2 T^3 / 27 = ((1 + l T / 3)^3 - 1) / l (Hall 1992)."""
    T, slant = np.linspace(-6, 6, 101), skewness / math.sqrt(16)
    h = hall_transform(T, np.asarray(slant))
    np.testing.assert_allclose(h, ((1 + slant * T / 3) ** 3 - 1) / slant + slant / 6, rtol=1e-12, atol=1e-12)
    assert (np.diff(h) >= 0).all()


def test_ends_solve_the_inequality_of_the_hull():
    """Ends by bisection against T, its transform and the quantile, written out."""
    B, A = np.random.default_rng(4).lognormal(size=(2, 50, 30))
    found = ratio_sets(ratio_of(B, A))
    keep = found.shape == BOUNDED
    assert keep.mean() > 0.5
    for ends in (found.low[keep], found.high[keep]):
        x = B[keep] - ends[:, None] * A[keep]
        psi = (x - x.mean(1, keepdims=True)) / math.sqrt(30 * 29)
        se = np.sqrt((psi**2).sum(1))
        T, slant = x.mean(1) / se, (psi**3).sum(1) / se**3
        h = T + slant * T**2 / 3 + slant**2 * T**3 / 27 + slant / 6
        np.testing.assert_allclose(np.minimum(np.abs(T), np.abs(h)), t_quantile(0.95, 30), rtol=1e-6)


def test_a_skewed_mean_is_covered_better_than_by_students_interval():
    """Mean of lognormals, N = 40: a ratio with denominator one."""
    x, truth = np.random.default_rng(0).lognormal(size=(1500, 40)), math.exp(0.5)
    found = ratio_sets(ratio_of(x, np.ones_like(x), norms=x))
    low, high = stats.t.interval(0.95, 39, x.mean(1), x.std(1, ddof=1) / math.sqrt(40))
    assert ((low <= truth) & (truth <= high)).mean() < 0.905
    given = found.shape == BOUNDED
    assert given.mean() > 0.6
    assert found.contains(truth).mean() > 0.94


def test_no_interval_where_one_prompt_rules():
    """Equal influences, two heavy prompts, one with 99% of the variance: n_eff 40, about 7, 1."""
    one = np.ones(40)
    equal = np.tile([1.0, -1.0], 20)
    two = equal.copy()
    two[:4] *= 5.0
    ruled = equal * 1e-3
    ruled[0] = 10.0
    for influences, n_eff, given in ((equal, 40.0, True), (two, 7.3, True), (ruled, 1.0, False)):
        B = 0.5 + 0.1 * (influences - influences.mean())
        found = ratio_sets(ratio_of(B, one))
        assert found.n_eff == pytest.approx(n_eff, rel=0.1)
        assert bool(found.shape == BOUNDED) is given
        assert found.ratio == pytest.approx(0.5)  # shown all the same
        if not given:
            assert (found.low, found.high) == (-np.inf, np.inf)
            assert found.largest > 0.97
        else:
            half = t_quantile(0.95, 40) * influences.std(ddof=1) * 0.1 / math.sqrt(40)
            assert found.high - found.low == pytest.approx(2 * half, rel=0.01)


def test_a_set_reaches_to_where_larger_prompts_would_move_the_estimate():
    """Values that follow a heavy-tailed size: longer on that side only. Equal or light-tailed sizes: hardly longer."""
    rng = np.random.default_rng(3)
    sizes, noise, one = np.exp(0.7 * rng.normal(size=60)), 0.1 * rng.normal(size=60), np.ones(60)
    for sign in (1.0, -1.0):
        B = 0.5 + 0.1 * sign * (sizes / sizes.mean() - 1) + noise
        plain, longer = ratio_sets(ratio_of(B, one)), ratio_sets(ratio_of(B, one, norms=sizes))
        reach = [(longer.high - plain.high), (plain.low - longer.low)][:: int(sign)]
        assert reach[0] > 0.5 * (plain.high - plain.low)
        assert abs(reach[1]) < 1e-6
        same = ratio_sets(ratio_of(B, one, norms=np.full(60, 3.0)))
        assert (same.low, same.high) == (plain.low, plain.high)
    B, one = 0.5 + 0.1 * rng.normal(size=(40, 60)), np.ones((40, 60))
    plain, light = ratio_sets(ratio_of(B, one)), ratio_sets(ratio_of(B, one, norms=rng.chisquare(60, size=(40, 60))))
    assert np.median((light.high - light.low) / (plain.high - plain.low)) < 1.15


def test_the_slopes_in_size_are_those_of_weighted_least_squares_with_hc3():
    """Against a fit written out with one prompt left out at a time; and the slope beside the root where it is real."""
    rng = np.random.default_rng(5)
    w = np.exp(rng.normal(size=60))
    w /= w.mean()
    y = np.stack([2 * w + w * rng.normal(size=60), 1 - w + w * rng.normal(size=60)])
    slopes = size_slopes(y, w, np.array(0.5))
    difference = y[0] - 0.5 * y[1]
    x = np.stack([np.ones(60), w], axis=1)

    def fitted(keep):
        root = np.sqrt(w[keep])
        return np.linalg.lstsq(x[keep] / root[:, None], difference[keep] / root, rcond=None)[0]

    whole = fitted(np.ones(60, dtype=bool))[1]
    without = np.array([fitted(np.arange(60) != i)[1] for i in range(60)])
    error = np.sqrt(((without - whole) ** 2).sum())
    along = slopes[:, 0] - 0.5 * slopes[:, 1]
    np.testing.assert_allclose(along[:2], [whole - 2 * error, whole + 2 * error], rtol=1e-8)
    curved = 3 * w - 5 * np.sqrt(w)
    assert size_slopes(np.stack([curved, 0 * w]), w, np.array(0.0))[2] == pytest.approx([3.0, 0.0], abs=1e-6)


def test_what_a_mean_may_be_above_the_samples():
    rng = np.random.default_rng(6)
    gamma, tails = rng.chisquare(40, size=(200, 50)), np.exp(rng.normal(size=(200, 50)))
    light, heavy = unseen_mean(gamma), unseen_mean(tails)
    assert np.median(light) < 0.01
    assert np.median(heavy) > 0.1
    np.testing.assert_allclose(unseen_mean(tails * 1e6), heavy)
    for values in (np.full(9, 2.0), np.zeros(9), np.array([1.0, np.inf, 2.0]), np.array([1.0])):
        assert unseen_mean(values) == 0.0


@pytest.mark.parametrize("n", [3, 20])
def test_few_prompts_and_numbers_that_are_not_finite_identify_nothing(n):
    B, A = np.random.default_rng(0).normal(size=(2, n)) * 0.01 + 1
    found = ratio_sets(ratio_of(B, A))
    assert found.shape == BOUNDED
    if n == 3:  # Student's quantile of two degrees of freedom
        assert found.high - found.low > 2 * 4.3 * np.abs(B - found.ratio * A).std() / math.sqrt(3)
    for bad in (np.inf, np.nan):
        B[0] = bad
        found = ratio_sets(ratio_of(B, A))
        assert found.shape == WHOLE_LINE


def test_prompts_of_many_pairs_count_once():
    """Pairs of a prompt that are all alike: 12 prompts of 1, 12 of 20 pairs. The covariance over repeated samples."""
    rng = np.random.default_rng(0)
    counts = np.repeat([1, 20], 12)
    values = rng.normal(size=(4000, 24))
    theta = (values * counts).sum(1) / counts.sum()
    without = ((values * counts).sum(1, keepdims=True) - values * counts) / (counts.sum() - counts)
    variance = jackknife_covariance(np.c_[theta, without][:, None], np.broadcast_to(counts, (4000, 24)).astype(float))
    assert variance.mean() == pytest.approx(theta.var(), rel=0.1)


def test_prompts_needed_identifies_when_the_variance_shrinks_as_one_over_n():
    rng = np.random.default_rng(5)
    A = rng.normal(size=40) * 4 + 1.0
    B = 0.4 * A + rng.normal(size=40)
    A, B = A - A.mean() + 1.0, B - B.mean() + 0.4
    assert not ratio_sets(ratio_of(B, A)).clipped()[2]
    needed = prompts_needed(ratio_of(B, A), 40)
    assert not needed.at_least
    covariance = jackknife_covariance(np.stack([deleted_means(x, np.arange(40)) for x in (B, A)]), np.ones(40))
    q = t_quantile(0.95, 40)
    at = lambda n: bool(fieller_sets(np.asarray(0.4), np.asarray(1.0), covariance * 40 / n, q).clipped()[2])  # noqa: E731
    assert at(needed.prompts)
    assert not at(needed.prompts / (1.1 * 1.1))  # eighths of a doubling, then two digits


def test_prompts_needed_is_a_lower_bound_where_the_denominator_drowns():
    x = np.array([1.0, -1.0] * 10)
    needed = prompts_needed(ratio_of(x[::-1] + 0.1, x - 0.1), 20)
    assert needed.at_least
    assert needed.prompts > 20
    assert prompts_needed(ratio_of(np.zeros(20), np.zeros(20)), 20).prompts is None


def test_prompts_needed_are_more_than_there_are_in_two_digits():
    """Neither 39 to 38 nor a number that claims more digits than it has; the set itself says what is not identified."""
    rng, seen = np.random.default_rng(0), []
    for n in (7, 38, 150):
        for _ in range(12):
            vectors = rng.normal(size=(3, n, 30)) * rng.lognormal(size=(n, 1)) + 0.1
            summary = summary_of_arrays(dict(zip("tem", vectors, strict=True)))
            found = alpha_from_summary(summary, batch_size=64)
            if found.needed is not None and found.needed.prompts is not None:
                assert found.needed.prompts >= 1.08 * n
                assert len(str(found.needed.prompts).rstrip("0")) <= 2
                seen.append(n)
    assert {7, 38, 150} == set(seen)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_levels_outside_zero_and_one_are_refused(level):
    with pytest.raises(UserError, match="level"):
        t_quantile(level, 20)


def test_the_effective_number_of_clusters_and_the_largest_share():
    rng = np.random.default_rng(5)
    n_eff, share = effective_number(rng.normal(size=100_000) ** 2)
    assert n_eff == pytest.approx(100_000 / 3, rel=0.05)
    n_eff, share = effective_number(np.array([1e200, *[1e198 / 99] * 99]))  # one cluster with 99%
    assert share == pytest.approx(1 / 1.01)
    assert n_eff == pytest.approx(1.01**2, rel=1e-3)
    for squares in (np.zeros(7), np.full(7, 3.0)):
        n_eff, share = effective_number(squares)
        assert (n_eff, share) == (7.0, pytest.approx(1 / 7))
    for squares in (np.array([1.0, np.inf]), np.array([1.0, np.nan]), np.zeros(0)):
        n_eff, share = effective_number(squares)
        assert np.isnan(n_eff)
        assert np.isnan(share)


def gradients(rng, prompts, scale, d=12):
    """t, e and m of prompts whose noise has a scale each."""
    z = rng.normal(size=(2, prompts, d)) / math.sqrt(d)
    mu, s = np.eye(d)[0], np.asarray(scale)[:, None]
    return mu + s * z[0], 0.5 * mu + s * (0.4 * z[0] + 0.3 * z[1]), mu + 0.8 * s * z[0]


@pytest.mark.parametrize("rest", [12, 60])
def test_a_prompt_of_two_hundred_pairs_among_prompts_of_one_rules_alone(rest):
    """It has most examples, so no interval, whatever its pairs say: they are one draw of a prompt."""
    rng = np.random.default_rng(rest)
    clusters = [0] * 200 + list(range(1, rest + 1))
    own = rng.normal(size=(rest + 1, 12))[clusters]
    t, e, m = (x + 0.3 * own for x in gradients(rng, len(clusters), np.ones(len(clusters))))
    found = alpha_from_gradients(t, e, m, clusters=clusters)
    assert found.n_prompts == rest + 1
    assert found.n_eff < FEWEST
    assert not found.identified
    assert np.isfinite(found.unclipped)
    assert "effective prompts" in str(found)
    # Of 200 equal pairs each they would be as many prompts as of one pair each.
    singles = [x[200:] for x in (t, e, m)]
    many = alpha_from_gradients(
        *(np.repeat(x, 200, axis=0) for x in singles), clusters=np.repeat(range(rest), 200).tolist()
    )
    assert many.n_eff == pytest.approx(alpha_from_gradients(*singles).n_eff, rel=1e-6)


def test_an_infinite_fourth_moment_shows_in_the_effective_prompts():
    """Scales of a power law with tail index 3, of squares 1.5: n_eff / N falls with N; with normal noise it stays."""
    rng = np.random.default_rng(6)
    shares = {}
    for name in ("power", "normal"):
        for n in (30, 240):
            scales = [np.ones(n) if name == "normal" else rng.pareto(3.0, size=n) + 1 for _ in range(15)]
            vectors = zip("tem", map(np.stack, zip(*(gradients(rng, n, s) for s in scales), strict=True)), strict=True)
            tails = Tails.of(LinearRatio.alpha(summary_of_arrays(dict(vectors)), 1.0))
            shares[name, n] = np.median(tails.n_eff) / n
    assert shares["power", 240] < 0.6 * shares["power", 30]
    assert shares["normal", 240] > 0.8 * shares["normal", 30]
    assert shares["power", 240] < 0.3 * shares["normal", 240]


def test_the_share_of_trace_sampling_rests_on_the_prompts_with_second_draws():
    """Prompts without one have no influence on the sampled part, and n_eff does not count them."""
    rng = np.random.default_rng(7)
    sizes = np.exp(rng.normal(size=90))
    t, e, m = gradients(rng, 90, np.ones(90))
    moments = Moments.init(groups=None)
    second = t + sizes[:, None] * rng.normal(size=t.shape)
    for some, drawn in ((slice(0, 30), second[:30]), (slice(30, 90), None)):
        vectors = {name: x[some] for name, x in (("t", t), ("e", e), ("m", m))}
        prompts = [str(k) for k in range(90)][some]
        moments = moments.update(vectors, prompts, drawn)
    summary = moments.finalize()
    halved = ((t - second)[:30] ** 2).sum(axis=1) / 2
    assert estimates(summary).var_trace_sampling[0] == pytest.approx(halved.mean())
    alone = effective_number((halved - halved.mean()) ** 2)[0]
    assert trace_sampling_share(summary).n_eff == pytest.approx(float(alone), rel=0.1)
