"""The marginal gradient's weights, by enumeration of all tuples of traces of an oracle's pair."""

from itertools import product
from math import comb

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.marginal import MarginalEstimator, SideTraces, diagnose_side, level_probabilities
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle import Oracle, OracleConfig, build_oracle
from bvpo_stats.lab.oracle.exact import ANSWER_TOKENS, marginal_responses, pair_gradients

TOL = 1e-10
OBJECTIVES = [Objective(beta=1.0), Objective("ipo", beta=0.5), Objective("simpo", beta=2.0, gamma=0.5)]


@pytest.fixture(scope="module")
def plain() -> Oracle:
    """Three traces at theta_ref, temperature 1."""
    return build_oracle(OracleConfig(n_symbols=2, max_trace=1, n_answers=2, n_prompts=2, seed=3))


@pytest.fixture(scope="module")
def warped() -> Oracle:
    """Three traces off theta_ref, at temperature 0.8."""
    return build_oracle(
        OracleConfig(n_symbols=2, max_trace=1, n_answers=2, n_prompts=2, seed=3, drift=0.1, temperature=0.8)
    )


@pytest.fixture(scope="module")
def minute() -> Oracle:
    """Two traces off theta_ref."""
    return build_oracle(OracleConfig(n_symbols=1, max_trace=1, n_answers=2, n_prompts=2, drift=0.1, seed=1))


class Pair:
    """One cell (x, y+, y-): laws of traces, log-probabilities, scores, and the exact m."""

    def __init__(self, oracle: Oracle, x: int = 0, answers: tuple[int, int] = (1, 0)) -> None:
        self.oracle, self.x, self.answers = oracle, x, answers

    def law(self, side: int, kind: str) -> np.ndarray:
        table = self.oracle.table
        if kind == "prior":
            return np.exp(table.sampling.trace[self.x])
        return {"posterior": table.sampling, "exact": table.policy}[kind].posterior[self.x, :, self.answers[side]]

    def laws(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        return self.law(0, kind), self.law(1, kind)

    def traces(self, side: int, chosen: tuple[int, ...], kind: str, anchored: bool = False) -> SideTraces:
        table, y, rows = self.oracle.table, self.answers[side], list(chosen)
        prior = kind == "prior"
        proposal = table.sampling.trace[self.x] if prior else table.sampling.joint[self.x, :, y]
        joint = [policy.joint[self.x, rows, y] for policy in (table.policy, table.reference)]
        return SideTraces(*joint, proposal[rows], ANSWER_TOKENS, anchored, normalised=prior)

    def gradient(self, chosen: tuple[tuple[int, ...], tuple[int, ...]], coefficients: tuple) -> np.ndarray:
        scores = [self.oracle.table.scores[self.x, list(rows), y] for rows, y in zip(chosen, self.answers, strict=True)]
        return coefficients[0] @ scores[0] + coefficients[1] @ scores[1]

    def exact(self, objective: Objective) -> np.ndarray:
        marginals = marginal_responses(self.oracle.table)
        return pair_gradients(objective, *(marginals[[self.x], [y]] for y in self.answers))[0][0]

    def mean(self, laws: tuple[list[str], list[str]], estimate, kind: str, anchored: bool = False) -> np.ndarray:
        """E m over independent traces of given laws, by enumeration of all tuples of both sides."""
        total = np.zeros(len(self.oracle.theta))
        tuples = [
            [
                (rows, np.prod([self.law(side, name)[r] for name, r in zip(laws[side], rows, strict=True)]))
                for rows in product(range(self.oracle.grammar.n_traces), repeat=len(laws[side]))
            ]
            for side in (0, 1)
        ]
        sides = [{rows: self.traces(side, rows, kind, anchored) for rows, _ in tuples[side]} for side in (0, 1)]
        for (plus, p), (minus, q) in product(*tuples):
            total += p * q * self.gradient((plus, minus), estimate(sides[0][plus], sides[1][minus]))
        return total


def run(estimator: MarginalEstimator):
    return lambda plus, minus: estimator(plus, minus, np.random.default_rng(0))


def shared(estimator: MarginalEstimator):
    """The plug-in that takes margin and scores from the same traces."""

    def estimate(plus: SideTraces, minus: SideTraces) -> tuple:
        rows = np.arange(len(plus)), np.arange(len(minus))
        return estimator.plug_in((plus, minus), rows, rows)

    return estimate


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
@pytest.mark.parametrize("fixture", ["plain", "warped"])
def test_all_traces_once_under_a_uniform_law_give_m_exactly(fixture, objective, request):
    pair = Pair(request.getfixturevalue(fixture))
    table, n = pair.oracle.table, pair.oracle.grammar.n_traces
    everything = tuple(range(n))
    sides = [
        SideTraces(
            table.policy.joint[0, :, y],
            table.reference.joint[0, :, y],
            np.full(n, -np.log(n)),
            ANSWER_TOKENS,
            normalised=True,
        )
        for y in pair.answers
    ]
    found = shared(MarginalEstimator(objective, "prior"))(*sides)
    np.testing.assert_allclose(pair.gradient((everything, everything), found), pair.exact(objective), rtol=0, atol=TOL)


@pytest.mark.parametrize("objective", OBJECTIVES[:2], ids=lambda objective: objective.name)
@pytest.mark.parametrize("further", ["prior", "posterior"])
def test_anchored_and_posterior_traces_are_unbiased_at_the_reference(plain, objective, further):
    pair, anchored = Pair(plain), further == "prior"
    estimator = MarginalEstimator(objective, "anchored" if anchored else "posterior", at_reference=True)
    mean = pair.mean((["posterior", further], ["posterior", further]), run(estimator), further, anchored)
    np.testing.assert_allclose(mean, pair.exact(objective), rtol=0, atol=TOL)


def test_prior_traces_are_biased_at_the_reference_by_what_their_law_predicts(plain):
    """K = 1 forgets the weights: the mean is that of g_t with traces of the prior. K = 2 removes a part of the bias."""
    pair, objective = Pair(plain), Objective(beta=1.0)
    estimator = run(MarginalEstimator(objective, "prior", at_reference=True))
    scores = pair.oracle.table.scores[0]
    mean_scores = [pair.law(side, "prior") @ scores[:, y] for side, y in enumerate(pair.answers)]
    one = pair.mean((["prior"], ["prior"]), estimator, "prior")
    np.testing.assert_allclose(one, -0.5 * (mean_scores[0] - mean_scores[1]), rtol=0, atol=TOL)
    two, exact = pair.mean((["prior"] * 2,) * 2, estimator, "prior"), pair.exact(objective)
    assert np.linalg.norm(one - exact) > 1.3 * np.linalg.norm(two - exact) > 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("kind", ["posterior", "prior"])
def test_margin_and_scores_use_disjoint_traces_off_the_reference(warped, kind):
    """At K = 2 each takes one trace, so the mean is a product of means; with shared traces it is not."""
    pair, objective = Pair(warped), Objective(beta=2.0)
    estimator = MarginalEstimator(objective, "posterior" if kind == "posterior" else "prior")
    laws = [pair.law(side, kind) for side in (0, 1)]
    table = pair.oracle.table
    ratios = [table.log_ratio[0, :, y] for y in pair.answers]
    sigmoid = 1 / (1 + np.exp(objective.beta * (ratios[0][:, None] - ratios[1][None, :])))
    weight = -objective.beta * (laws[0] @ sigmoid @ laws[1])
    scores = [law @ table.scores[0, :, y] for law, y in zip(laws, pair.answers, strict=True)]
    two = pair.mean(([kind] * 2, [kind] * 2), run(estimator), kind)
    np.testing.assert_allclose(two, weight * (scores[0] - scores[1]), rtol=0, atol=TOL)
    one = pair.mean(([kind], [kind]), run(estimator), kind)
    assert np.linalg.norm(one - two) > 1e-3 * np.linalg.norm(two)


def test_an_anchor_off_the_reference_leaves_a_bias_only_through_its_posterior_and_the_margin(minute):
    """With anchors of pi_theta's own posterior and beta -> 0 (no margin) anchored weights are exact at any drift."""
    pair, objective = Pair(minute, answers=(0, 1)), Objective(beta=1e-9)
    estimator = run(MarginalEstimator(objective, "anchored"))
    right = pair.mean((["exact", "prior", "prior"],) * 2, estimator, "prior", anchored=True)
    wrong = pair.mean((["posterior", "prior", "prior"],) * 2, estimator, "prior", anchored=True)
    exact = pair.exact(objective)
    np.testing.assert_allclose(right / 1e-9, exact / 1e-9, rtol=0, atol=1e-8)
    assert np.linalg.norm(wrong - exact) > 1e-3 * np.linalg.norm(exact)


class Level(np.random.Generator):
    """A generator that draws one level."""

    def __init__(self, level: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.level = level

    def choice(self, levels: int, p: np.ndarray) -> int:
        assert levels == len(p)
        return self.level - 1


@pytest.mark.parametrize("kind", ["posterior", "prior"])
def test_multilevel_telescopes_and_its_last_level_stands_for_those_that_would_follow(minute, kind):
    """With four traces: E f(4) + E Delta_2 = 2 E f(4) - E f(2), both nonlinearities included."""
    pair, objective = Pair(minute, answers=(0, 1)), Objective(beta=1.0)
    estimator = MarginalEstimator(objective, "multilevel")
    mean = sum(
        probability
        * pair.mean(([kind] * 4, [kind] * 4), lambda plus, minus, n=level: estimator(plus, minus, Level(n)), kind)
        for level, probability in enumerate(level_probabilities(2), start=1)
    )
    two, four = (pair.mean(([kind] * n, [kind] * n), shared(estimator), kind) for n in (2, 4))
    np.testing.assert_allclose(mean, 2 * four - two, rtol=0, atol=TOL)
    np.testing.assert_allclose(mean_by_counts(pair, estimator, kind, 4), four, rtol=0, atol=TOL)
    assert np.linalg.norm(four - two) > 1e-3 * np.linalg.norm(four)


def mean_by_counts(pair: Pair, estimator: MarginalEstimator, kind: str, n_traces: int) -> np.ndarray:
    """E of the plug-in from shared traces, for two traces: it depends on how often each was drawn, and no more."""
    total = np.zeros(len(pair.oracle.theta))
    for counts in product(range(n_traces + 1), repeat=2):
        tuples = tuple((1,) * count + (0,) * (n_traces - count) for count in counts)
        probability = np.prod(
            [
                comb(n_traces, c) * law[1] ** c * law[0] ** (n_traces - c)
                for c, law in zip(counts, pair.laws(kind), strict=True)
            ]
        )
        sides = [pair.traces(side, rows, kind) for side, rows in enumerate(tuples)]
        total += probability * pair.gradient(tuples, shared(estimator)(*sides))
    return total


@pytest.mark.parametrize("kind", ["posterior", "prior"])
def test_the_bias_of_multilevel_is_of_the_second_order(minute, kind):
    """Its mean from K traces is 2 E f(K) - E f(K / 2), see above; its bias falls fourfold as the plug-in's halves."""
    pair, objective = Pair(minute, answers=(0, 1)), Objective(beta=1.0)
    estimator, exact = MarginalEstimator(objective, "multilevel"), pair.exact(objective)
    plain = {n: mean_by_counts(pair, estimator, kind, n) for n in (4, 8, 16, 32)}
    bias = {n: np.linalg.norm(plain[n] - exact) for n in plain}
    multilevel = {n: np.linalg.norm(2 * plain[n] - plain[n // 2] - exact) for n in (8, 16, 32)}
    assert bias[16] / bias[32] == pytest.approx(2, abs=0.3)
    assert multilevel[16] / multilevel[32] == pytest.approx(4, abs=1)
    assert multilevel[32] < 0.1 * bias[32]


def test_jackknife_removes_the_first_order_of_the_bias_of_m(minute):
    """Plain: bias about c / K. Jackknife: smaller by far at the same K, and falling faster."""
    pair, objective = Pair(minute, answers=(0, 1)), Objective(beta=1.0)
    estimator, exact = MarginalEstimator(objective, "jackknife"), pair.exact(objective)

    def bias(estimate, n_traces: int) -> float:
        laws = (["posterior"] * n_traces, ["posterior"] * n_traces)
        return float(np.linalg.norm(pair.mean(laws, estimate, "posterior") - exact))

    plain = {n: bias(shared(estimator), n) for n in (2, 4)}
    jackknifed = {n: bias(run(estimator), n) for n in (2, 4)}
    assert 1.5 < plain[2] / plain[4] < 2.5
    assert jackknifed[4] < 0.2 * plain[4]
    assert jackknifed[2] / jackknifed[4] > 2.5


def test_half_splits_use_disjoint_traces(warped):
    pair = Pair(warped)
    plus, minus = (pair.traces(side, (0, 1, 2, 0, 1), "posterior") for side in (0, 1))
    first, second = MarginalEstimator(Objective(), "posterior").halves(plus, minus)
    for side in (0, 1):
        assert np.flatnonzero(first[side]).tolist() == [0, 2, 4]
        assert np.flatnonzero(second[side]).tolist() == [1, 3]


def test_what_cannot_be_had_is_refused(warped):
    pair = Pair(warped)
    single = [pair.traces(side, (0,), "posterior") for side in (0, 1)]
    rng = np.random.default_rng(0)
    for method in ("jackknife", "multilevel"):
        with pytest.raises(UserError, match="needs two traces"):
            MarginalEstimator(Objective(), method)(*single, rng)
    with pytest.raises(UserError, match="simpo needs log pi"):
        MarginalEstimator(OBJECTIVES[2], "posterior")(*single, rng)


def test_diagnostics_of_anchored_traces_keep_the_anchor_apart():
    side = SideTraces(np.array([-1.0, -3.0, -5.0]), np.zeros(3), np.zeros(3), ANSWER_TOKENS, anchored=True)
    found = diagnose_side(side)
    weights = np.exp(side.log_weights) / np.exp(side.log_weights).sum()
    assert found.traces == 3
    assert found.effective_size == pytest.approx(1 / (weights**2).sum())
    assert found.anchor_gap == pytest.approx(-1.0 - (-3.0 - 5.0) / 2)
    assert found.log_traces == pytest.approx(np.log(2))
