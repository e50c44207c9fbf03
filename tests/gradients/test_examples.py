from dataclasses import replace

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import check_identity, join
from bvpo_stats.gradients.marginal import select_traces
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.reference import check_stored_log_probs, stored_log_probs
from bvpo_stats.lab.oracle import OracleConfig, build_oracle
from tests.gradients.conftest import SMALL


def split(population):
    trace_pairs = population.trace_pairs
    return trace_pairs, [pair for pair in population.pairs if pair.mode == "nothinking"]


def test_prompts_in_one_set_only_are_counted_and_left_out(plain):
    trace_pairs, empty_pairs = split(plain)
    joined = join(trace_pairs[:8] + empty_pairs[3:], plain.bank(1, "prior"), unmatched="drop")
    assert [example.prompt_id for example in joined.examples] == [pair.prompt_id for pair in trace_pairs[3:8]]
    assert (joined.only_trace, joined.only_empty, joined.only_bank) == (3, len(empty_pairs) - 8, len(trace_pairs) - 5)


def test_several_pairs_of_a_prompt_are_paired_in_order(plain):
    trace_pairs, empty_pairs = split(plain)
    pairs = [replace(pair, prompt_id="q") for pair in (*trace_pairs[:3], *empty_pairs[:2])]
    with pytest.raises(UserError, match=r"Prompt q is in D_t more often \(3 times\) .*\(1 in D_t alone and 0 in D_e"):
        join(pairs)
    bank = [replace(trace, prompt_id="q") for t in trace_pairs[:3] for trace in plain.bank(2, "same-answer")
            if trace.prompt_id == t.prompt_id]  # fmt: skip
    joined = join(pairs, bank, unmatched="drop")
    assert (joined.prompts, joined.only_trace, joined.only_empty) == (1, 1, 0)
    assert [e.key for e in joined.examples] == ["q", "q#1"]
    for example, thinking, empty in zip(joined.examples, pairs, pairs[3:], strict=False):
        assert example.both == (thinking, empty)
        assert example.chosen.own.completion_ids == thinking.chosen_ids
        assert len(example.rejected.same_answer) >= 2
        assert {t.completion_ids[t.answer_start :] for t in example.traces if t.side == "chosen"} == {
            thinking.chosen_ids[thinking.chosen_answer_start :]
        }


def test_both_pairs_of_an_example_have_one_prompt(plain):
    trace_pairs, empty_pairs = split(plain)
    odd = replace(empty_pairs[1], prompt_ids=(*empty_pairs[1].prompt_ids[:-1], 3, 3))
    with pytest.raises(UserError, match=rf"pair of prompt {odd.prompt_id} have different prompts: .*from token \d+ on"):
        join([*trace_pairs, empty_pairs[0], odd, *empty_pairs[2:]])
    reworded = [replace(pair, prompt="the same ids, shown otherwise") for pair in empty_pairs]  # ids decide
    assert join([*trace_pairs, *reworded]).prompts == join(plain.pairs).prompts
    assert len(join([odd], needs=["nothinking"]).examples) == 1  # nothing to compare it with


def test_limit_and_longest_sequence(plain):
    assert [e.prompt_id for e in join(plain.pairs, limit=2).examples] == [p.prompt_id for p in plain.trace_pairs[:2]]
    lengths = sorted(example.longest for example in join(plain.pairs).examples)
    short = join(plain.pairs, max_length=lengths[0])
    assert (len(short.examples), short.too_long) == (
        lengths.count(lengths[0]),
        len(lengths) - lengths.count(lengths[0]),
    )
    with pytest.raises(UserError, match="limit"):
        join(plain.pairs, limit=0)
    with pytest.raises(UserError, match="more than 1 tokens"):
        join(plain.pairs, max_length=1)
    only = join(plain.trace_pairs, needs=["thinking"]).examples
    assert len(only) == len(plain.trace_pairs)
    with pytest.raises(UserError, match="both are needed"):
        _ = only[0].both


def test_sides_hold_their_own_traces(plain):
    bank = plain.bank(2, "same-answer") + [t for t in plain.bank(3, "prior") if t.source == "prior"]
    for example in join(plain.pairs, bank).examples:
        for side, found in example.sides:
            own = example.trace_pair.chosen_ids if side == "chosen" else example.trace_pair.rejected_ids
            assert found.own.completion_ids == own
            assert np.isfinite(found.own.trace_logp)
            assert (len(found.same_answer), len(found.chain), len(found.prior)) == (2, 0, 3)
            assert found.answer_tokens == 2


def test_without_a_bank_a_pair_supplies_its_own_trace(plain):
    example = join(plain.pairs).examples[0]
    assert example.chosen.own.joint_logp == example.trace_pair.ref_chosen_logps
    assert np.isnan(example.chosen.own.trace_logp)


def test_bad_records_are_named(plain):
    trace_pairs, empty_pairs = split(plain)
    first, bank = trace_pairs[0], plain.bank(1, "same-answer")
    other = next(trace for trace in bank if trace.side == "rejected" and trace.prompt_id == first.prompt_id)
    cases = [
        (trace_pairs, [], "both are needed"),
        (trace_pairs, [replace(pair, prompt_id=f"z{pair.prompt_id}") for pair in empty_pairs], "share no prompts"),
        ([first, *trace_pairs], empty_pairs, "more often .2 times. than in the other set"),
        ([replace(first, chosen_ids=())], empty_pairs, "no token ids"),
    ]
    for thinking, nothinking, message in cases:
        with pytest.raises(UserError, match=message):
            join([*thinking, *nothinking])
    for trace, message in [
        (replace(other, side="chosen"), "another answer"),
        (replace(other, prompt_ids=(1,)), "another answer or prompt"),
        (replace(other, completion_ids=()), "no token ids"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            join(plain.pairs, [trace])
        assert first.prompt_id in str(error.value)
    foreign = next(
        trace
        for trace in bank
        if trace.source == "same-answer"
        for pair in trace_pairs
        if pair.prompt_id == trace.prompt_id and trace.side == "chosen" and trace.completion_ids != pair.chosen_ids
    )
    with pytest.raises(UserError, match="not the pair's own"):
        join(plain.pairs, [replace(foreign, source="anchor")])


def test_another_model_or_template_is_refused(plain):
    bank = plain.bank(1, "prior")
    check_identity(plain.oracle.policy, join(plain.pairs, bank).examples)
    for changed, message in [({"model": "other@1"}, "was sampled by other@1"), ({"template": "r1"}, "template r1")]:
        for pairs, traces in [
            ([replace(plain.pairs[0], **changed), *plain.pairs[1:]], bank),
            (plain.pairs, [*bank[:-1], replace(bank[-1], **changed)]),
        ]:
            with pytest.raises(UserError, match=message):
                check_identity(plain.oracle.policy, join(pairs, traces).examples)


def test_records_of_the_base_fit_a_policy_with_a_stored_adapter(plain):
    policy = replace(plain.oracle.policy, identity=f"{plain.oracle.policy.identity}+adapter@2")
    check_identity(policy, join(plain.pairs).examples)


def test_the_reference_point_is_recognised(plain, drifted):
    assert plain.oracle.policy.at_reference
    assert not drifted.oracle.policy.at_reference
    fresh = build_oracle(OracleConfig(**SMALL)).policy
    assert replace(fresh, model=fresh.model.get_base_model()).at_reference


@pytest.mark.parametrize("fixture", ["plain", "warped"])
def test_stored_log_probs_of_the_oracle_match(fixture, request):
    population = request.getfixturevalue(fixture)
    bank = population.bank(1, "same-answer") + [t for t in population.bank(1, "prior") if t.source == "prior"]
    examples = join(population.pairs, bank).examples
    stored = len(list(stored_log_probs(examples)))
    assert stored == len(examples) * (4 + 2 * 3 * 2)
    assert check_stored_log_probs(population.oracle.policy, examples, stored, tolerance=1e-10) == stored


def test_a_record_that_does_not_match_is_named(warped):
    bank = warped.bank(1, "prior")
    for field in ("joint_logp", "trace_logp"):
        wrong = replace(bank[-1], **{field: getattr(bank[-1], field) - 0.5})
        examples = join(warped.pairs, [*bank[:-1], wrong]).examples
        with pytest.raises(UserError, match=rf"{field} of the prior trace .* of prompt {wrong.prompt_id} \(rejected\)"):
            check_stored_log_probs(warped.oracle.policy, examples, 10_000)
    pairs = [replace(warped.pairs[0], ref_chosen_logps=-1.0), *warped.pairs[1:]]
    with pytest.raises(UserError, match=f"ref_chosen_logps of the thinking pair of prompt {pairs[0].prompt_id}"):
        check_stored_log_probs(warped.oracle.policy, join(pairs).examples, 1)


def test_traces_of_a_method(plain, warped):
    def bank(population, *sources):
        traces = [t for source, n in sources for t in population.bank(n, source) if t.source in ("anchor", source)]
        unique = {(t.prompt_id, t.side, t.source, t.index): t for t in traces}
        return join(population.pairs, unique.values()).examples[0].chosen

    def kinds(side, method, most=None):
        return [trace.source for trace in select_traces(side, method, most)]

    both = bank(plain, ("same-answer", 2), ("prior", 4))
    assert kinds(both, "posterior") == ["anchor", "same-answer", "same-answer"]
    assert kinds(both, "posterior", 2) == ["anchor", "same-answer"]
    assert kinds(both, "anchored", 3) == ["anchor", "prior", "prior"]
    assert kinds(both, "prior") == ["prior"] * 4
    assert kinds(both, "multilevel") == kinds(both, "jackknife") == ["prior"] * 4
    chain = tuple(replace(trace, source="mh") for trace in both.prior)
    assert kinds(replace(both, chain=chain), "posterior")[-4:] == ["mh"] * 4
    cooled = replace(bank(warped, ("same-answer", 2)), chain=chain)
    assert kinds(cooled, "posterior") == ["mh"] * 4  # of another law than own and same-answer traces: never mixed
    assert kinds(replace(cooled, chain=chain[:2]), "posterior") == ["anchor", "same-answer", "same-answer"]
    with pytest.raises(UserError, match="no prior traces"):
        select_traces(bank(plain, ("same-answer", 1)), "prior", None)
    with pytest.raises(UserError, match="no anchor"):
        select_traces(replace(both, own=replace(both.own, trace_logp=float("nan"))), "anchored", None)


def test_options_are_checked():
    for bad in ({"method": "magic"}, {"traces_per_answer": 0}, {"max_tokens": 0}, {"max_padding": 1.0}):
        with pytest.raises(UserError):
            StreamOptions(**bad)
