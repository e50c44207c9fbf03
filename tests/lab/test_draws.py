"""Samplers against the exact laws, and their records against the table."""

import numpy as np
import pytest
from scipy import stats

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.stream import pair_gradients
from bvpo_stats.lab.oracle import (
    OracleConfig,
    build_oracle,
    completion_records,
    draw_examples,
    draw_pairs,
    draw_traces,
    exact_moments,
    example_gradients,
    pair_records,
    population_atoms,
    shortened,
)
from bvpo_stats.lab.oracle.draws import draw_posterior_traces, draw_prior_traces
from bvpo_stats.model.batching import TokenSequence, collate
from bvpo_stats.model.head import sequence_logprobs, token_logprobs
from bvpo_stats.records import Completion, PreferencePair, TraceRecord, from_dict, to_dict

OBJECTIVE = Objective(beta=0.7)
N = 20_000


@pytest.fixture(scope="module")
def draws(drifted):
    return draw_examples(drifted, N, np.random.default_rng(11))


def assert_follows(counts, law):
    """Chi-square against an exact law; cells expected fewer than five times are pooled."""
    expected = law * counts.sum()
    rare = expected < 5
    pooled = [np.append(values[~rare], values[rare].sum()) for values in (counts, expected)]
    if pooled[1][-1] == 0:
        assert pooled[0][-1] == 0
        pooled = [values[:-1] for values in pooled]
    assert len(pooled[0]) > 2
    assert stats.chisquare(*pooled).pvalue > 1e-3


def test_selected_pairs_follow_the_order_statistics_law(drifted, draws):
    """(x, y+, r+, y-, r-) jointly: selection by simulation against the law the exact moments use."""
    grammar = drifted.grammar
    r_plus, y_plus = draws.thinking.chosen_pair
    r_minus, y_minus = draws.thinking.rejected_pair
    posterior = drifted.table.sampling.posterior
    law = np.einsum("xab,xra,xsb->xarbs", drifted.pair_law, posterior, posterior) / grammar.n_prompts
    counts = np.zeros(law.shape)
    np.add.at(counts, (draws.prompt, y_plus, r_plus, y_minus, r_minus), 1)
    assert_follows(counts.ravel(), law.ravel())
    counts = np.zeros(drifted.empty_pair_law.shape)
    np.add.at(counts, (draws.prompt, draws.nothinking.chosen_pair[1], draws.nothinking.rejected_pair[1]), 1)
    assert_follows(counts.ravel(), drifted.empty_pair_law.ravel() / grammar.n_prompts)


def test_pairs_of_one_prompt_are_conditionally_independent(drifted, draws):
    """(y+, y'+) given x: the D_t and the D_e pair share the prompt and nothing else."""
    x = draws.prompt == 0
    joint = np.zeros((drifted.grammar.n_answers,) * 2)
    np.add.at(joint, (draws.thinking.chosen_pair[1][x], draws.nothinking.chosen_pair[1][x]), 1)
    law = np.outer(drifted.pair_law[0].sum(axis=1), drifted.empty_pair_law[0].sum(axis=1))
    assert_follows(joint.ravel(), law.ravel())


def test_averages_over_draws_approach_the_exact_moments(drifted, draws):
    exact = exact_moments(drifted, OBJECTIVE)
    t, e, m = example_gradients(shortened(drifted), draws, OBJECTIVE)
    pairs = {
        "square_tt": (t, t),
        "square_ee": (e, e),
        "square_mm": (m, m),
        "product_te": (t, e),
        "product_tm": (t, m),
        "product_em": (e, m),
    }
    for name, (u, v) in pairs.items():
        products = np.sum(u * v, axis=1)
        z = (products.mean() - getattr(exact, name)) / (products.std() / N**0.5)
        assert abs(z) < 4, name


def test_atom_draws_approach_the_exact_moments(drifted):
    exact, atoms = exact_moments(drifted, OBJECTIVE), population_atoms(drifted, OBJECTIVE)
    t, e = atoms.draw(N, np.random.default_rng(5))
    assert (atoms.t_prompt[t] == atoms.e_prompt[e]).all()
    squares = np.sum((atoms.t[t] - atoms.e[e]) ** 2, axis=1)
    assert abs(squares.mean() - exact.A) < 4 * squares.std() / N**0.5


def test_a_population_too_large_to_write_out_is_refused(default):
    with pytest.raises(UserError, match="draw examples instead"):
        population_atoms(default)


def test_records_give_back_the_table(drifted):
    """Scoring a record's token ids with the package's own head gives the example's g_t margin and reference values."""
    draws = draw_examples(drifted, 40, np.random.default_rng(2))
    trace_pairs, empty_pairs = pair_records(drifted, draws)
    model, table = drifted.policy.model, drifted.table
    for records, responses in [(trace_pairs, draws.thinking), (empty_pairs, draws.nothinking)]:
        for side, (traces, answers) in [("chosen", responses.chosen_pair), ("rejected", responses.rejected_pair)]:
            rows = [TokenSequence(pair.prompt_ids, getattr(pair, f"{side}_ids")) for pair in records]
            scored = sequence_logprobs(token_logprobs(model, collate(rows))).detach().numpy()
            at = (draws.prompt, traces, answers)
            np.testing.assert_allclose(scored, table.policy.joint[at], rtol=0, atol=1e-12)
            stored = [getattr(pair, f"ref_{side}_logps") for pair in records]
            np.testing.assert_allclose(stored, table.reference.joint[at], rtol=1e-15)
            for pair, answer in zip(records, answers, strict=True):
                ids, start = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_answer_start")
                assert ids[start - 1] == drifted.grammar.close_id
                assert ids[start] == drifted.grammar.answer_ids[answer]
    for pair, other in zip(trace_pairs, empty_pairs, strict=True):
        assert (pair.prompt_id, pair.prompt_ids) == (other.prompt_id, other.prompt_ids)
        assert pair.chosen_reward > pair.rejected_reward
        assert other.chosen_reward > other.rejected_reward
    assert len({pair.prompt_id for pair in trace_pairs}) == 40


@pytest.mark.parametrize("objective", [OBJECTIVE, Objective("simpo", 2.5, 1.0), Objective("ipo")], ids=lambda o: o.name)
@pytest.mark.parametrize("reference", ["adapter", "record"])
def test_estimators_run_on_the_records_unchanged(drifted, objective, reference):
    """g_t and g_e of drawn records through the package's estimator, against the table's vectors, example by example."""
    draws = draw_examples(drifted, 25, np.random.default_rng(12))
    t, e, _ = example_gradients(drifted, draws, objective)
    trace_pairs, empty_pairs = pair_records(drifted, draws)
    options = StreamOptions(objective=objective, method="none", reference=reference)
    found = pair_gradients(drifted.policy, [*trace_pairs, *empty_pairs], options=options)
    assert list(found.prompt_ids) == [pair.prompt_id for pair in trace_pairs]
    for gradients, vectors in ((found.t, t), (found.e, e)):
        np.testing.assert_allclose(gradients, vectors, rtol=0, atol=1e-10 * np.abs(vectors).max())


def test_texts_are_what_the_template_makes_of_the_tokens(drifted):
    draws = draw_examples(drifted, 20, np.random.default_rng(3))
    template = drifted.policy.template
    for pair in [*pair_records(drifted, draws)[0], *pair_records(drifted, draws)[1]]:
        assert pair.prompt_ids == tuple(template.tokenizer.encode(pair.prompt, add_special_tokens=False))
        assert pair.chosen == template.completion_text(pair.chosen_ids)
        assert pair.chosen_answer == template.answer_text(pair.chosen_ids[pair.chosen_answer_start :])
    for record in completion_records(drifted, draws):
        assert record.prompt_ids == template.prompt_ids(record.prompt, record.mode)
        assert (record.answer_start, record.trace, record.answer) == template.split(record.completion_ids, record.mode)
        assert record.text == template.completion_text(record.completion_ids)


def test_completions_hold_the_pairs(drifted):
    """The chosen and rejected indices of a pair point at its completions."""
    draws = draw_examples(drifted, 15, np.random.default_rng(4))
    by_key = {record.key: record for record in completion_records(drifted, draws)}
    assert len(by_key) == 15 * 2 * drifted.config.n_samples
    for records in pair_records(drifted, draws):
        for pair in records:
            chosen = by_key[f"{pair.prompt_id}/{pair.mode}/{pair.chosen_index}"]
            rejected = by_key[f"{pair.prompt_id}/{pair.mode}/{pair.rejected_index}"]
            assert chosen.prompt_ids + chosen.completion_ids == pair.prompt_ids + pair.chosen_ids
            assert rejected.prompt_ids + rejected.completion_ids == pair.prompt_ids + pair.rejected_ids
            assert chosen.complete


def test_trace_banks(drifted):
    trace_pairs, empty_pairs = draw_pairs(drifted, 10, np.random.default_rng(6))
    table, grammar = drifted.table, drifted.grammar
    number = {trace: index for index, trace in enumerate(grammar.traces())}
    for source in ("same-answer", "prior"):
        bank = draw_traces(drifted, trace_pairs, 3, np.random.default_rng(7), source=source)
        assert [record.source for record in bank] == ["anchor", source, source, source] * 20
        for record, pair in zip(bank, np.repeat(np.array(trace_pairs, dtype=object), 8), strict=True):
            own = pair.chosen_ids if record.side == "chosen" else pair.rejected_ids
            assert record.prompt_id == pair.prompt_id
            assert record.completion_ids[record.answer_start :] == own[-2:]
            assert record.source != "anchor" or record.completion_ids == own
            x = pair.prompt_ids[2] - grammar.question_ids.start
            r = number[record.completion_ids[: record.answer_start - 1]]
            y = own[-2] - grammar.answer_ids.start
            assert record.trace_logp == table.sampling.trace[x, r]
            assert record.joint_logp == table.reference.joint[x, r, y]
    with pytest.raises(UserError, match="thinking pairs"):
        draw_traces(drifted, empty_pairs, 1, np.random.default_rng(0))
    assert draw_traces(drifted, [], 1, np.random.default_rng(0)) == []


def test_trace_draws_follow_their_laws(drifted):
    x, y = np.full(200, 1), np.full(200, 2)
    posterior = draw_posterior_traces(drifted, x, y, 50, np.random.default_rng(8))
    counts = np.bincount(posterior.ravel(), minlength=drifted.grammar.n_traces)
    assert_follows(counts, drifted.table.sampling.posterior[1, :, 2])
    prior = draw_prior_traces(drifted, x, 50, np.random.default_rng(9))
    counts = np.bincount(prior.ravel(), minlength=drifted.grammar.n_traces)
    assert_follows(counts, np.exp(drifted.table.sampling.trace[1]))


def test_the_generator_decides_everything(drifted):
    first = draw_pairs(drifted, 5, np.random.default_rng(1))
    assert first == draw_pairs(drifted, 5, np.random.default_rng(1))
    assert first != draw_pairs(drifted, 5, np.random.default_rng(2))


def test_records_survive_json(drifted):
    draws = draw_examples(drifted, 2, np.random.default_rng(0))
    pairs = pair_records(drifted, draws)[0]
    everything = [
        (PreferencePair, pairs[0]),
        (TraceRecord, draw_traces(drifted, pairs, 1, np.random.default_rng(0))[0]),
        (Completion, completion_records(drifted, draws)[0]),
    ]
    for kind, record in everything:
        assert from_dict(kind, to_dict(record)) == record


def test_strings_of_another_language_are_refused(drifted):
    wider = build_oracle(OracleConfig(n_symbols=4, max_trace=3, n_prompts=2))
    pairs, _ = draw_pairs(wider, 30, np.random.default_rng(0))
    with pytest.raises(UserError, match="not a sequence of this oracle"):
        draw_traces(drifted, pairs, 1, np.random.default_rng(0))
