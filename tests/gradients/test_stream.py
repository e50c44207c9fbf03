"""The stream of gradients against the oracle's tables: every prompt's t, e and m, whatever the batches."""

from dataclasses import replace

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.gradients import stream
from bvpo_stats.gradients.engine import OTHER, BlockLayout, block_of
from bvpo_stats.gradients.examples import join
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import gradient_batches
from bvpo_stats.lab.oracle import example_gradients
from bvpo_stats.lab.oracle.draws import Spelling
from bvpo_stats.statistics.moments import Moments
from tests.gradients.conftest import population

TOL = 1e-10
OBJECTIVES = [Objective(beta=1.0), Objective("ipo", beta=0.5), Objective("simpo", beta=2.0, gamma=0.5)]


def run(case, traces=(), pairs=None, done=frozenset(), **options):
    options = StreamOptions(**{"method": "none", **options})
    return list(
        gradient_batches(case.oracle.policy, case.subset, join(pairs or case.pairs, traces).examples, options, done)
    )


def every_trace_twice(case):
    """Prior traces that list the language: each half of them is a complete, uniform sample."""
    spelling = Spelling(case.oracle)
    traces = range(case.oracle.grammar.n_traces)
    bank = []
    for anchor in case.bank(0, "prior"):
        question, _, answer = spelling.locate(
            next(pair for pair in case.trace_pairs if pair.prompt_id == anchor.prompt_id), anchor.side
        )
        for index, trace in enumerate(np.repeat(traces, 2).tolist()):
            bank.append(
                replace(
                    anchor,
                    source="prior",
                    index=index,
                    completion_ids=spelling.completion(trace, answer),
                    answer_start=spelling.answer_start(trace),
                    trace_logp=-np.log(len(traces)),
                    joint_logp=float(case.oracle.table.reference.joint[question, trace, answer]),
                )
            )
    return bank


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
@pytest.mark.parametrize("fixture", ["plain", "warped"])
def test_gradients_are_the_oracles(fixture, objective, request):
    case = request.getfixturevalue(fixture)
    t, e, m = example_gradients(case.oracle, case.draws, objective)
    bank = every_trace_twice(case)
    batches = run(case, bank, method="prior", objective=objective, checked_records=0, second_traces=False)
    for member, truth in (("t", t), ("e", e), ("m", m)):
        np.testing.assert_allclose(case.rows(batches, member), truth, rtol=0, atol=TOL)


@pytest.mark.parametrize("fixture", ["plain", "warped"])
@pytest.mark.parametrize("method", ["posterior", "prior", "jackknife", "multilevel"])
def test_gradients_do_not_depend_on_batches_or_on_where_the_reference_comes_from(fixture, method, request):
    case = request.getfixturevalue(fixture)
    bank = case.bank(3, "prior" if method == "prior" else "same-answer")
    whole = run(case, bank, method=method, half_splits=True)
    for settings in (
        {"max_tokens": 40},
        {"max_padding": 0.0},
        {"max_padding": 0.9},
        {"reference": "adapter", "max_padding": 0.9},
        {"reference": "adapter", "max_tokens": 100},
    ):
        other = run(case, bank, method=method, half_splits=True, **settings)
        for member in ("t", "e", "m", "m1", "m2"):
            np.testing.assert_allclose(case.rows(other, member), case.rows(whole, member), rtol=0, atol=TOL)
        sides = [
            {(d.prompt_id, d.side): d.weights for b in batches for d in b.diagnostics} for batches in (whole, other)
        ]
        assert sides[0].keys() == sides[1].keys()
        for key, weights in sides[0].items():
            assert sides[1][key].effective_size == pytest.approx(weights.effective_size, abs=TOL)


def test_posterior_traces_of_a_cooled_sampler_are_weighed_by_the_cooled_law(warped):
    """q_T(r, y | x) includes the answer at temperature T, which no record stores: an independent computation."""
    beta, case, bank = 1.0, warped, warped.bank(3, "same-answer")
    table, spelling = case.oracle.table, Spelling(case.oracle)
    numbers = {ids: number for number, ids in enumerate(spelling.traces)}
    expected = []
    for pair in case.trace_pairs:
        sides = []
        for side in ("chosen", "rejected"):
            x, _, y = spelling.locate(pair, side)
            traces = [t for t in bank if (t.prompt_id, t.side) == (pair.prompt_id, side)]
            r = np.array([numbers[t.completion_ids[: t.answer_start - 1]] for t in traces])
            w = np.exp(table.policy.joint[x, r, y] - table.sampling.joint[x, r, y])
            v = np.exp(table.reference.joint[x, r, y] - table.sampling.joint[x, r, y])
            sides.append((w, v, table.scores[x, r, y]))
        halves = []
        for margin, scores in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            ratio = [np.log(w[margin].sum() / v[margin].sum()) for w, v, _ in sides]
            S = [w[scores] @ s[scores] / w[scores].sum() for w, _, s in sides]
            halves.append(-beta / (1 + np.exp(beta * (ratio[0] - ratio[1]))) * (S[0] - S[1]))
        expected.append(np.mean(halves, axis=0))
    batches = run(case, bank, method="posterior", objective=Objective(beta=beta))
    np.testing.assert_allclose(case.rows(batches, "m"), expected, rtol=0, atol=TOL)


def z_scores(estimates, truth, directions):
    """Of the mean of paired differences along some directions."""
    along = (estimates - truth) @ directions.T
    return along.mean(0) / (along.std(0, ddof=1) / np.sqrt(len(along)))


@pytest.fixture(scope="module")
def many():
    return population(120)


@pytest.mark.parametrize("method", ["anchored", "posterior"])
def test_means_over_draws_are_exact_at_the_reference(many, method):
    objective = Objective(beta=1.0)
    source = "prior" if method == "anchored" else "same-answer"
    _, _, m = example_gradients(many.oracle, many.draws, objective)
    directions = np.vstack([m.mean(0), np.random.default_rng(2).normal(size=(3, m.shape[1]))])
    batches = run(many, many.bank(2, source), method=method, objective=objective)
    assert np.abs(z_scores(many.rows(batches, "m"), m, directions)).max() < 3.5


def test_single_prior_traces_have_the_bias_that_their_law_predicts(many):
    objective, oracle, draws = Objective(beta=1.0), many.oracle, many.draws
    _, _, m = example_gradients(oracle, draws, objective)
    law, scores = np.exp(oracle.table.sampling.trace), oracle.table.scores
    prior_scores = np.einsum("xr,xrad->xad", law, scores)
    x, (_, plus), (_, minus) = draws.prompt, draws.thinking.chosen_pair, draws.thinking.rejected_pair
    predicted = -0.5 * (prior_scores[x, plus] - prior_scores[x, minus])
    bias = predicted - m
    bias /= np.linalg.norm(bias, axis=1, keepdims=True)  # an own direction for every example: biases differ in sign
    banks = [many.bank(1, "prior", seed) for seed in range(1, 9)]
    found = [many.rows(run(many, bank, method="prior", objective=objective), "m") for bank in banks]
    apart = [np.concatenate([((rows - centre) * bias).sum(1) for rows in found])[:, None] for centre in (predicted, m)]
    from_predicted, from_exact = (z_scores(each, 0.0, np.ones((1, 1)))[0] for each in apart)
    assert abs(from_predicted) < 3.5
    assert from_exact > 5


def test_second_trace_draws(plain):
    case = plain
    t, _, _ = example_gradients(case.oracle, case.draws)
    bank = case.bank(1, "same-answer")
    lacking = {pair.prompt_id for pair in case.trace_pairs[::3]}
    some = [t for t in bank if not (t.prompt_id in lacking and t.side == "chosen" and t.source == "same-answer")]
    batches = run(case, some)
    swapped = []
    for pair in case.trace_pairs:
        second = {t.side: t.completion_ids for t in bank if t.prompt_id == pair.prompt_id and t.index == 0}
        second.update(
            {t.side: t.completion_ids for t in bank if t.prompt_id == pair.prompt_id and t.source != "anchor"}
        )
        swapped.append(replace(pair, chosen_ids=second["chosen"], rejected_ids=second["rejected"]))
    empty_pairs = [pair for pair in case.pairs if pair.mode == "nothinking"]
    cleared = [replace(pair, ref_chosen_logps=None, ref_rejected_logps=None) for pair in swapped]
    truth = case.rows(run(case, pairs=cleared + empty_pairs), "t")
    order = [pair.prompt_id for pair in case.trace_pairs]
    seen = set()
    for batch in batches:
        assert (batch.trace2 is None) == (batch.prompt_ids[0] in lacking)
        for row, prompt in enumerate(batch.prompt_ids):
            seen.add(prompt)
            if batch.trace2 is not None:
                found = np.concatenate([values[row] for values in batch.trace2.values()])
                np.testing.assert_allclose(found, truth[order.index(prompt)], rtol=0, atol=TOL)
    assert seen == set(order)
    np.testing.assert_allclose(case.rows(batches, "t"), example_gradients(case.oracle, case.draws)[0], rtol=0, atol=TOL)
    assert np.abs(truth - t).max() > 1e-3
    assert all(batch.trace2 is None for batch in run(case, bank, second_traces=False))


def test_prompts_that_are_done_are_left_out(plain):
    done = frozenset(pair.prompt_id for pair in plain.trace_pairs[:5])
    prompts = [prompt for batch in run(plain, done=done) for prompt in batch.prompt_ids]
    assert sorted(prompts) == sorted(pair.prompt_id for pair in plain.trace_pairs[5:])


def test_several_pairs_of_a_prompt_are_one_cluster(warped):
    """Two examples of a prompt have the gradients they would have as two prompts, and share every batch."""
    first, second = ([p.prompt_id for p in warped.trace_pairs][k::2] for k in (0, 1))
    home = dict(zip(second, first, strict=True))
    pairs, bank = (
        [replace(record, prompt_id=home.get(record.prompt_id, record.prompt_id)) for record in records]
        for records in (warped.pairs, warped.bank(2, "same-answer"))
    )
    examples = join(pairs, bank).examples
    assert [(e.prompt_id, e.number) for e in examples] == [(p, n) for p in first for n in (0, 1)]
    apart = run(warped, warped.bank(2, "same-answer"), method="posterior")
    for settings in ({}, {"max_tokens": 100}):
        options = StreamOptions(method="posterior", **settings)
        batches = list(gradient_batches(warped.oracle.policy, warped.subset, examples, options))
        assert all(batch.prompt_ids.count(prompt) == 2 for batch in batches for prompt in batch.prompt_ids)
        moments = Moments.init(("t", "e", "m"), ("layers.0", "layers.1"))
        for batch in batches:
            moments = moments.update(batch.vectors, batch.prompt_ids, batch.trace2)
        assert (moments.n_prompts, moments.n_examples) == (len(first), 2 * len(first))
        for member in ("t", "e"):
            total = [sum(b.vectors[member]["layers.0"].sum(axis=0) for b in found) for found in (batches, apart)]
            np.testing.assert_allclose(*total, rtol=0, atol=TOL)


def test_blocks_are_decoder_layers_and_feed_the_moments(warped):
    (first, *rest) = run(warped, warped.bank(2, "same-answer"), method="auto", max_tokens=400)
    assert list(first.vectors["t"]) == ["layers.0", "layers.1"]
    assert set(first.vectors) == {"t", "e", "m"}
    layout = BlockLayout.of(warped.subset)
    assert layout.size == warped.subset.size
    moments = Moments.init(("t", "e", "m"), tuple(layout.sizes))
    for batch in (first, *rest):
        moments = moments.update(batch.vectors, batch.prompt_ids, batch.trace2)
    assert moments.n_prompts == len(warped.trace_pairs)
    assert moments.finalize().n_prompts == len(warped.trace_pairs)
    assert block_of("lm_head.weight") == OTHER
    assert block_of("transformer.h.11.attn.c_attn.weight") == "layers.11"


def test_scores_are_checked_once(plain, monkeypatch):
    calls = []
    monkeypatch.setattr(stream, "check_scores", lambda model, subset, batch: calls.append(len(batch)))
    assert len(run(plain, max_tokens=60)) > 1
    assert len(calls) == 1


def test_bad_records_are_refused_before_any_gradient(plain, warped):
    foreign = [replace(plain.pairs[0], model="other@1"), *plain.pairs[1:]]
    with pytest.raises(UserError, match="sampled by other@1"):
        run(plain, pairs=foreign)
    assert run(plain, pairs=foreign, allow_mismatch=True)
    wrong = [replace(t, joint_logp=t.joint_logp + 1.0) for t in warped.bank(1, "prior")]
    with pytest.raises(UserError, match="but the reference gives"):
        run(warped, wrong, method="prior")
    assert run(warped, wrong, method="prior", reference="adapter")
    with pytest.raises(UserError, match="ruled out"):
        run(warped, method="reference-point")
