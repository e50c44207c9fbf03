"""What a trace bank holds: sources, order, log-probabilities, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle.build import ModelShape, Oracle, OracleConfig, build_oracle
from bvpo_stats.lab.oracle.draws import completion_records, draw_examples, pair_records
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.sampling.traces import BankOptions, BankTally, PairSide, TraceDrawer, pair_sides, trace_bank
from tests.sampling.laws import p_value

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    shape = ModelShape(sharpness=1.5)
    return build_oracle(
        OracleConfig(n_symbols=2, max_trace=3, n_answers=2, n_prompts=2, seed=2, temperature=TEMPERATURE, shape=shape)
    )


@pytest.fixture(scope="module")
def sides(oracle: Oracle) -> list[PairSide]:
    draws = draw_examples(oracle, 12, np.random.default_rng(0))
    pairs, _ = pair_records(oracle, draws)
    samples = [c for c in completion_records(oracle, draws) if c.mode == "thinking"]
    return [
        side
        for pair in pairs
        for side in pair_sides(pair, [c for c in samples if c.prompt_id == pair.prompt_id], oracle.policy.max_positions)
    ]


def bank(oracle: Oracle, sides: list[PairSide], options: BankOptions, batch_size: int = 64, seed: int = 0):
    tally = BankTally()
    drawer = TraceDrawer(oracle.policy, options.temperature, seed, batch_size)
    return list(trace_bank(sides, TEMPERATURE, drawer, options, tally)), tally


def of(records: list[TraceRecord], side: PairSide, source: str) -> list[TraceRecord]:
    return [r for r in records if (r.prompt_id, r.side, r.source) == (side.prompt_id, side.side, source)]


def test_sides_know_their_answer_and_what_the_samples_offer(oracle: Oracle) -> None:
    draws = draw_examples(oracle, 40, np.random.default_rng(1))
    pairs, _ = pair_records(oracle, draws)
    samples = [c for c in completion_records(oracle, draws) if c.mode == "thinking"]
    seen = 0
    for pair in pairs:
        mine = [c for c in samples if c.prompt_id == pair.prompt_id]
        for side in pair_sides(pair, mine, None):
            own = pair.chosen_index if side.side == "chosen" else pair.rejected_index
            ids = pair.chosen_ids if side.side == "chosen" else pair.rejected_ids
            assert side.anchor + side.answer_ids == ids
            assert side.completion(side.anchor) == ids
            others = [c for c in mine if c.sample_index != own]
            assert list(side.others) == [c.completion_ids[: c.answer_start] for c in others]
            expected = [
                c.completion_ids[: c.answer_start]
                for c in others
                if c.completion_ids[c.answer_start :] == side.answer_ids
            ]
            assert list(side.same_answer) == expected
            seen += len(expected)
    assert seen > 30


def test_posterior_sources_fill_up_to_k_best_first_and_prior_adds_k(oracle: Oracle, sides: list[PairSide]) -> None:
    k = 4
    records, tally = bank(oracle, sides, BankOptions(traces_per_answer=k, burn_in=0))
    for side in sides:
        anchors, same, chain, prior = (of(records, side, source) for source in ("anchor", "same-answer", "mh", "prior"))
        assert [r.completion_ids for r in anchors] == [side.completion(side.anchor)]
        assert [r.completion_ids for r in same] == [side.completion(trace) for trace in side.same_answer[: k - 1]]
        assert len(anchors) + len(same) + len(chain) == k
        assert len(prior) == k
        for group in (anchors, same, chain, prior):
            assert [r.index for r in group] == list(range(len(group)))
    assert tally.sides == len(sides) == 24
    assert sum(tally.by_source.values()) == len(records) == 24 * 2 * k
    assert 0 < tally.moved <= tally.accepted < tally.proposals
    assert tally.moved < tally.accepted  # 7 traces: a proposal is often the trace where the chain stands
    assert tally.unclosed == 0


def test_log_probabilities_are_the_oracles(oracle: Oracle, sides: list[PairSide]) -> None:
    records, _ = bank(oracle, sides, BankOptions(traces_per_answer=3, temperature=1.0, burn_in=0))
    numbers = {trace: number for number, trace in enumerate(oracle.grammar.traces())}
    prompts = {oracle.grammar.prompt_ids(prompt): prompt for prompt in range(2)}
    for record in records:
        sampled = record.source in ("anchor", "same-answer")
        assert record.temperature == (TEMPERATURE if sampled else 1.0)
        place = prompts[record.prompt_ids], numbers[record.completion_ids[: record.answer_start - 1]]
        answer = record.completion_ids[record.answer_start] - oracle.grammar.answer_ids.start
        table = oracle.table.sampling if sampled else oracle.table.reference
        assert record.trace_logp == pytest.approx(table.trace[place], abs=1e-10)
        assert record.joint_logp == pytest.approx(oracle.table.reference.joint[(*place, answer)], abs=1e-10)


def test_nothing_depends_on_the_batch_size_and_the_seed_decides(oracle: Oracle, sides: list[PairSide]) -> None:
    options = BankOptions(traces_per_answer=3, burn_in=1)
    first, _ = bank(oracle, sides, options, batch_size=64)
    assert [r.completion_ids for r in bank(oracle, sides, options, batch_size=5)[0]] == [
        r.completion_ids for r in first
    ]
    assert [r.completion_ids for r in bank(oracle, sides[4:9], options)[0]] == [
        r.completion_ids
        for r in first
        if r in [x for s in sides[4:9] for x in first if (x.prompt_id, x.side) == (s.prompt_id, s.side)]
    ]
    assert [r.completion_ids for r in bank(oracle, sides, options, seed=1)[0]] != [r.completion_ids for r in first]


def test_sources_can_be_chosen(oracle: Oracle, sides: list[PairSide]) -> None:
    records, _ = bank(oracle, sides, BankOptions(traces_per_answer=2, sources=("prior",), prior="samples"))
    assert {r.source for r in records} == {"prior"}
    for side in sides:
        assert [r.completion_ids for r in of(records, side, "prior")] == [side.completion(t) for t in side.others[:2]]
        assert all(r.temperature == TEMPERATURE for r in of(records, side, "prior"))
    records, tally = bank(oracle, sides, BankOptions(traces_per_answer=2, sources=("mh",), burn_in=2, mh_moves=2))
    assert all(len(of(records, side, "mh")) == 2 for side in sides)
    assert tally.proposals == len(sides) * (2 + 2 * 2)


def test_fresh_prior_traces_follow_the_prior_and_those_of_the_samples_do_not(oracle: Oracle) -> None:
    """With two responses per prompt the other one's answer is known to differ, which tilts the law of its trace."""
    duel = build_oracle(replace(oracle.config, n_samples=2, n_prompts=1, temperature=1.0))
    draws = draw_examples(duel, 1500, np.random.default_rng(3))
    pairs, _ = pair_records(duel, draws)
    samples: dict[str, list] = {}
    for completion in completion_records(duel, draws):
        if completion.mode == "thinking":
            samples.setdefault(completion.prompt_id, []).append(completion)
    chosen = [pair_sides(pair, samples[pair.prompt_id], None)[0] for pair in pairs]
    numbers = {trace: number for number, trace in enumerate(duel.grammar.traces())}
    law = np.exp(duel.table.reference.trace[0])

    def of_prior(prior: str) -> float:
        options = BankOptions(traces_per_answer=1, sources=("prior",), prior=prior)  # type: ignore[arg-type]
        drawer = TraceDrawer(duel.policy, 1.0, 0, 2000)
        records = trace_bank(chosen, 1.0, drawer, options, BankTally())
        counts = np.bincount([numbers[r.completion_ids[: r.answer_start - 1]] for r in records], minlength=15)
        return p_value(counts, law)

    assert of_prior("fresh") > 1e-6
    assert of_prior("samples") < 1e-6


def any_pair(oracle: Oracle) -> tuple[PreferencePair, list]:
    draws = draw_examples(oracle, 1, np.random.default_rng(0))
    return pair_records(oracle, draws)[0][0], [c for c in completion_records(oracle, draws) if c.mode == "thinking"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "nothinking"}, "has no traces"),
        ({"top_p": 0.95}, "`top_p=1`"),
        ({"chosen_index": 77}, r"chosen response of pair .* \(sample 77\) is not in `samples`"),
        ({"rejected_ids": (1, 2)}, "rejected response"),
    ],
)
def test_pairs_that_have_no_bank(oracle: Oracle, changes: dict, words: str) -> None:
    pair, samples = any_pair(oracle)
    with pytest.raises(UserError, match=words):
        pair_sides(replace(pair, **changes), samples, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"traces_per_answer": 0}, "`traces_per_answer=0`"),
        ({"sources": ("anchor", "dream")}, r"`sources=\('anchor', 'dream'\)`"),
        ({"sources": ()}, "`sources="),
        ({"temperature": 0.0}, "`temperature=0.0`"),
        ({"mh_moves": 0}, "`mh_moves=0`"),
        ({"burn_in": -1}, "burn-in"),
    ],
)
def test_options_that_make_no_sense(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        BankOptions(**changes)


def test_burn_in_is_needed_only_off_temperature_one() -> None:
    assert BankOptions().burn_in_moves(1.0) == 0
    assert BankOptions().burn_in_moves(0.8) == 10
    assert BankOptions(burn_in=3).burn_in_moves(1.0) == 3
