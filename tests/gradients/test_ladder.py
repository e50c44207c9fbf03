"""Each rung of the ladder, on a case made for it."""

from dataclasses import replace

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import join
from bvpo_stats.gradients.ladder import Ladder, choose_marginal
from bvpo_stats.gradients.marginal import SideDiagnostics, SideTraces, aggregate, diagnose_side
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.options import StreamOptions
from tests.gradients.conftest import population

AUTO = StreamOptions()
IPO, SIMPO = (replace(AUTO, objective=Objective(name)) for name in ("ipo", "simpo"))


def choose(case, traces=(), options=AUTO):
    return choose_marginal(case.oracle.policy, join(case.pairs, traces).examples, options)


def collapsed(bank):
    """Every side's first prior trace outweighs all others."""
    return [replace(t, trace_logp=-1000.0) if t.source == "prior" and t.index == 0 else t for t in bank]


def test_reference_point_needs_no_bank(plain):
    choice = choose(plain)
    assert (choice.method, choice.rung, choice.estimable, choice.drift) == (
        "reference-point",
        "reference point",
        True,
        0.0,
    )
    assert "b_t = 0" in choice.reason


def test_cooled_pairs_leave_the_reference_point(plain):
    cooled = population(temperature=0.8)
    choice = choose(cooled, cooled.bank(4, "same-answer"))
    assert (choice.method, choice.rung) == ("posterior", "posterior traces")
    assert "temperature 0.8" in choice.reason
    nucleus = [replace(pair, top_p=0.95) for pair in plain.pairs]
    choice = choose_marginal(plain.oracle.policy, join(nucleus).examples, AUTO)
    assert (choice.method, choice.estimable) == ("none", False)
    assert "top-p 0.95" in choice.reason


def test_posterior_traces_carry_a_drift(drifted):
    choice = choose(drifted, drifted.bank(4, "same-answer"))
    assert (choice.method, choice.rung, choice.estimable) == ("posterior", "posterior traces", True)
    assert "off theta_ref" in choice.reason
    assert choice.drift > 0.1
    x, (r, y) = drifted.draws.prompt, drifted.draws.thinking.chosen_pair
    s, z = drifted.draws.thinking.rejected_pair
    ratio = np.abs(drifted.oracle.table.log_ratio)
    assert choice.drift == pytest.approx(max(ratio[x, r, y].max(), ratio[x, s, z].max()), abs=1e-10)


def test_prior_traces_where_posterior_ones_are_missing(drifted):
    choice = choose(drifted, drifted.bank(6, "prior"))
    assert (choice.method, choice.rung, choice.estimable) == ("prior", "prior traces", True)
    assert "fewer than two posterior traces" in choice.reason


def test_other_objectives(plain):
    assert choose(plain, (), IPO).method == "posterior"  # the pairs' own traces are enough at theta_ref
    assert choose(plain, plain.bank(4, "prior"), IPO).method == "anchored"
    assert choose(plain, plain.bank(4, "prior"), SIMPO).method == "prior"
    choice = choose(plain, plain.bank(4, "same-answer"), SIMPO)
    assert (choice.method, choice.rung) == ("none", "not estimable")
    assert "normaliser" in choice.reason


def test_small_drift_without_a_bank():
    choice = choose(population(drift=0.003))
    assert (choice.method, choice.rung, choice.estimable) == ("none", "small drift", False)
    assert 0 < choice.drift < 0.1


def test_nothing_bears(drifted):
    for bank in ((), collapsed(drifted.bank(6, "prior"))):
        choice = choose(drifted, bank)
        assert (choice.method, choice.rung, choice.estimable) == ("none", "not estimable", False)
        assert "mu is not estimable" in choice.reason
    assert "collapsed" in choice.reason


def test_a_method_that_is_asked_for(plain, drifted):
    bank = drifted.bank(6, "prior")
    assert choose(drifted, bank, replace(AUTO, method="prior")).rung == "asked for"
    refused = choose(drifted, collapsed(bank), replace(AUTO, method="prior"))
    assert (refused.method, refused.rung, refused.estimable) == ("prior", "not estimable", False)
    assert "order drift / K" in choose(drifted, bank, replace(AUTO, method="anchored")).reason
    cases = [
        (drifted, "reference-point", Objective(), "off theta_ref"),
        (plain, "reference-point", Objective("simpo"), "length"),
        (plain, "posterior", Objective("simpo"), "normaliser"),
        (plain, "prior", Objective(), "no prior traces"),
        (plain, "jackknife", Objective(), "fewer than 2 traces"),
        (population(temperature=0.8), "anchored", Objective(), "temperature 1"),
    ]
    for case, method, objective, message in cases:
        with pytest.raises(UserError, match=message):
            choose(case, (), StreamOptions(objective=objective, method=method))


def diagnostics(log_weights, anchor=None, prompt="p"):
    log_weights = np.asarray(log_weights, dtype=float)
    zeros = np.zeros_like(log_weights)
    return SideDiagnostics(prompt, "chosen", diagnose_side(SideTraces(log_weights, zeros, zeros, 2), anchor))


def test_aggregate_of_sides():
    even, uneven = diagnostics(np.zeros(8)), diagnostics([0.0, *[-30.0] * 7])
    found = aggregate([even, even, uneven])
    assert found.effective_size == pytest.approx(17 / 3)
    assert found.median_effective_size == pytest.approx(8)
    assert (found.collapsed_share, found.collapsed) == (pytest.approx(1 / 3), False)
    assert aggregate([even, uneven, uneven]).collapsed
    assert not aggregate([diagnostics([0.0])]).collapsed  # one trace has nothing to collapse


def test_draws_that_all_miss_the_posterior_are_a_red_flag():
    """Equal weights, so a perfect effective size; only the anchor knows that they are far away."""
    found = aggregate([diagnostics(np.full(8, -40.0), anchor=0.0)])
    assert found.effective_size == pytest.approx(8)
    assert found.anchor_gap == pytest.approx(40)
    assert found.collapsed
    assert not aggregate([diagnostics(np.full(8, -1.0), anchor=0.0)]).collapsed


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("temperature", "the temperature of D_t is not recorded"),
        ("top_p", "the top-p of D_t is not recorded"),
        ("top_k", "the top-k of D_t (0 for none) is not recorded"),
        ("cut_share", "which share of the responses behind D_t was cut (`cut_share`) is not recorded"),
        ("unclosed_share", "which share of the responses behind D_t never closed its trace (`unclosed_share`) is not"),
        ("model", "the model that sampled D_t is not recorded"),
        ("chosen_answer_start", "where the chosen answers of D_t begin is not recorded"),
    ],
)
def test_unknown_provenance_rules_out_the_reference_point(plain, field, words):
    """What is not recorded is never taken for a default; other rungs still bear where they do not depend on it."""
    unknown = [replace(pair, **{field: None}) if pair.mode == "thinking" else pair for pair in plain.pairs]
    choice = choose_marginal(plain.oracle.policy, join(unknown).examples, AUTO)
    assert choice.rung != "reference point"
    assert words in choice.reason[0].lower() + choice.reason[1:]
    with pytest.raises(UserError, match="is not recorded"):
        choose_marginal(plain.oracle.policy, join(unknown).examples, replace(AUTO, method="reference-point"))
    if field in ("temperature", "top_p", "model"):
        bank = plain.bank(6, "prior")
        assert choose_marginal(plain.oracle.policy, join(unknown, bank).examples, AUTO).method == "prior"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 50}, "pairs were sampled with top-k 50, not without"),
        ({"cut_share": 0.021}, "2.1% of the responses behind D_t were cut and 0.0% never closed their trace"),
        ({"unclosed_share": 0.03}, "0.0% of the responses behind D_t were cut and 3.0% never closed their trace"),
        ({"cut_share": 0.015, "unclosed_share": 0.015}, "selects by trace (up to 2% is taken for none)"),
    ],
)
def test_what_selects_by_trace_rules_out_the_reference_point(plain, changes, words):
    """b_t = 0 needs all of pi_ref's law: a limit on tokens, or answers dropped for their trace's length, cut it."""
    selected = [replace(pair, **changes) if pair.mode == "thinking" else pair for pair in plain.pairs]
    choice = choose_marginal(plain.oracle.policy, join(selected).examples, AUTO)
    assert (choice.rung, choice.estimable) == ("not estimable", False)
    assert words in choice.reason[0].lower() + choice.reason[1:]
    assert Ladder(plain.oracle.policy, join(selected).examples, AUTO).by_records()[0] == "none"  # as training asks
    with pytest.raises(UserError, match="ruled out"):
        choose_marginal(plain.oracle.policy, join(selected).examples, replace(AUTO, method="anchored"))


@pytest.mark.parametrize("changes", [{"cut_share": 0.02}, {"cut_share": 0.01, "unclosed_share": 0.01}, {"top_k": 0}])
def test_what_is_taken_for_none(plain, changes):
    nearly = [replace(pair, **changes) for pair in plain.pairs]
    assert choose_marginal(plain.oracle.policy, join(nearly).examples, AUTO).method == "reference-point"


def test_responses_lost_in_d_e_do_not_matter_to_b_t(plain):
    pairs = [replace(pair, cut_share=0.3) if pair.mode == "nothinking" else pair for pair in plain.pairs]
    assert choose_marginal(plain.oracle.policy, join(pairs).examples, AUTO).method == "reference-point"


def test_a_bank_for_some_prompts_only_is_said_before_the_first_forward(drifted, plain, monkeypatch, capsys):
    bank = drifted.bank(4, "same-answer")
    few = [trace for trace in bank if trace.prompt_id != drifted.pairs[0].prompt_id]
    with monkeypatch.context() as patch:
        patch.setattr("bvpo_stats.gradients.ladder.log_probs", None)  # whoever runs the model fails
        with pytest.raises(UserError, match=r"covers 11 of 12 pairs of D_t \(not that of prompt 000000-q"):
            choose(drifted, few)
        with pytest.raises(UserError, match=r"no traces of these pairs' prompts, but of others, e\.g\. 'elsewhere'"):
            join(drifted.pairs, [replace(trace, prompt_id="elsewhere") for trace in bank])
    assert choose(plain, plain.bank(4, "same-answer")[9:]).method == "reference-point"  # where it is not needed
    assert capsys.readouterr().err == ""
    choose(drifted)
    assert "There is no trace bank, and the policy is off theta_ref" in capsys.readouterr().err


def test_a_bank_put_behind_itself_is_counted_once(drifted):
    bank = drifted.bank(4, "same-answer")
    twice = join(drifted.pairs, [*bank, *bank])
    assert twice.repeated == len(bank)
    assert twice.examples == join(drifted.pairs, bank).examples


def test_a_pair_of_two_equal_sides_is_refused(plain):
    for mode in ("thinking", "nothinking"):
        same = [replace(p, rejected_ids=p.chosen_ids) if p.mode == mode else p for p in plain.pairs]
        with pytest.raises(UserError, match=f"The {mode} pair of prompt .* has the same tokens as chosen and as rej"):
            join(same)


def test_copies_of_a_trace_are_one_effective_trace():
    zeros = np.zeros(8)
    stuck = diagnose_side(SideTraces(zeros, zeros, zeros, 2, names=np.zeros(8, dtype=int)))
    assert (stuck.traces, stuck.distinct, stuck.effective_size, stuck.draws_size) == (
        8,
        1,
        pytest.approx(1),
        pytest.approx(8),
    )
    mixed = diagnose_side(SideTraces(zeros, zeros, zeros, 2, names=np.array([3, 3, 3, 3, 5, 5, 7, 7])))
    assert (mixed.distinct, mixed.effective_size) == (3, pytest.approx(1 / (0.5**2 + 2 * 0.25**2)))
    assert not aggregate([SideDiagnostics("p", "chosen", stuck)]).collapsed  # one likely trace is no bad weight


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "model"])
def test_an_unknown_law_leaves_the_pairs_own_traces_out(plain, field):
    unknown = [replace(pair, **{field: None}) for pair in plain.pairs]
    for method in ("posterior", "jackknife"):
        with pytest.raises(UserError, match=r"not counting the pairs' own: .* is not recorded"):
            choose_marginal(plain.oracle.policy, join(unknown).examples, StreamOptions(method=method))
    assert choose_marginal(plain.oracle.policy, join(unknown).examples, IPO).method == "none"


def test_other_missing_fields_rule_nothing_out(plain):
    missing = ("chosen_reward", "rejected_reward", "chosen_index", "rejected_index", "chosen_answer", "template")
    pairs = [replace(pair, **dict.fromkeys(missing)) for pair in plain.pairs]
    examples = join(pairs).examples
    assert choose_marginal(plain.oracle.policy, examples, AUTO).method == "reference-point"


def test_training_climbs_the_same_rungs(plain, drifted):
    """By the records alone the ladder stops where the choice does, as long as the weights bear; else one rung early."""
    cases = [
        (plain, (), AUTO),
        (plain, plain.bank(4, "prior"), IPO),
        (plain, plain.bank(4, "prior"), SIMPO),
        (plain, plain.bank(4, "same-answer"), SIMPO),
        (drifted, drifted.bank(4, "same-answer"), AUTO),
        (drifted, drifted.bank(6, "prior"), AUTO),
        (drifted, (), AUTO),
    ]
    for case, bank, options in cases:
        ladder = Ladder(case.oracle.policy, join(case.pairs, bank).examples, options)
        assert ladder.by_records()[0] == choose(case, bank, options).method
    late = collapsed(drifted.bank(6, "prior"))
    ladder = Ladder(drifted.oracle.policy, join(drifted.pairs, late).examples, AUTO)
    assert (ladder.by_records()[0], choose(drifted, late).method) == ("prior", "none")
    ladder = Ladder(plain.oracle.policy, join(plain.pairs, plain.bank(4, "same-answer")).examples, AUTO)
    assert [ladder.by_records(off_reference=away)[0] for away in (False, True)] == ["reference-point", "posterior"]
