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


@pytest.mark.parametrize("field", ["temperature", "top_p", "model"])
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
