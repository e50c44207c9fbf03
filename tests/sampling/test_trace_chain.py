"""The Metropolis-Hastings kernel against exact enumeration of the posterior over traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from bvpo_stats.lab.oracle.build import ModelShape, Oracle, OracleConfig, build_oracle
from bvpo_stats.lab.oracle.draws import draw_posterior_traces
from bvpo_stats.sampling import traces as trace_module
from bvpo_stats.sampling.traces import PairSide, ScoredTrace, Trace, TraceDrawer, log_acceptance, metropolis_moves
from tests.sampling.laws import p_value

CHAINS = 1200
REJECTED = 1e-6  # p-values of a correct kernel fall below this once in a million runs; the seeds are fixed


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """15 traces of length 0 to 3; traces move the answer's probability a lot, and lengths differ."""
    shape = ModelShape(sharpness=1.5)
    return build_oracle(OracleConfig(n_symbols=2, max_trace=3, n_answers=2, n_prompts=1, seed=2, shape=shape))


def side_of(oracle: Oracle, chain: int, anchor: int, answer: int, max_trace: int = 4) -> PairSide:
    grammar = oracle.grammar
    ids = grammar.completion_ids(grammar.traces()[anchor], answer)
    return PairSide(
        prompt_id=f"chain-{chain}",
        side="chosen",
        question="q0",
        prompt_ids=grammar.prompt_ids(0),
        anchor=ids[:-2],
        answer_ids=ids[-2:],
        max_trace=max_trace,
        same_answer=(),
        others=(),
    )


class Forgetful(TraceDrawer):
    """Draws at its temperature but scores as if it had drawn at 1."""

    def score(
        self, sides: Sequence[PairSide], traces: Sequence[Trace], temperature: float | None = None
    ) -> list[ScoredTrace]:
        return super().score(sides, traces, 1.0)


def run_chains(
    oracle: Oracle,
    starts: np.ndarray,
    answer: int,
    moves: int,
    *,
    temperature: float,
    longest: int = 4,
    kind: type[TraceDrawer] = TraceDrawer,
) -> tuple[np.ndarray, float]:
    """Counts of final states by trace number, and the share of accepted moves."""
    sides = [side_of(oracle, chain, start, answer, longest) for chain, start in enumerate(starts.tolist())]
    drawer = kind(oracle.policy, temperature, seed=11, batch_size=CHAINS)
    states = drawer.score(sides, [side.anchor for side in sides])
    accepted = 0
    for step in range(moves):
        results = metropolis_moves(drawer, sides, states, step)
        states = [move.state for move in results]
        accepted += sum(move.accepted for move in results)
    numbers = {trace: number for number, trace in enumerate(oracle.grammar.traces())}
    final = [numbers[state.ids[:-1]] for state in states]
    return np.bincount(final, minlength=len(numbers)), accepted / (moves * len(sides))


@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("answer", [0, 1])
def test_chains_from_exact_draws_stay_exact_from_the_start(oracle: Oracle, answer: int, temperature: float) -> None:
    rng = np.random.default_rng(5)
    zeros = np.zeros(CHAINS, dtype=np.int64)
    starts = draw_posterior_traces(oracle, zeros, zeros + answer, 1, rng)[:, 0]
    counts, accepted = run_chains(oracle, starts, answer, 2, temperature=temperature)
    assert 0.05 < accepted < 0.99  # otherwise nothing was tested
    assert p_value(counts, oracle.table.reference.posterior[0, :, answer]) > REJECTED


def test_chains_forget_where_they_started(oracle: Oracle) -> None:
    starts = np.full(CHAINS, 14)
    law = oracle.table.reference.posterior[0, :, 1]
    assert p_value(np.bincount(starts, minlength=15), law) < REJECTED
    counts, _ = run_chains(oracle, starts, 1, 10, temperature=1.6)
    assert p_value(counts, law) > REJECTED


def test_a_cut_off_restricts_the_law_and_nothing_else(oracle: Oracle) -> None:
    longest = 3  # tokens with the closing tag: traces of up to two symbols
    short = np.array([len(trace) < longest for trace in oracle.grammar.traces()])
    law = np.where(short, oracle.table.reference.posterior[0, :, 1], 0.0)
    starts = np.random.default_rng(2).choice(15, size=CHAINS, p=law / law.sum())
    counts, _ = run_chains(oracle, starts, 1, 2, temperature=1.0, longest=longest)
    assert counts[~short].sum() == 0
    assert p_value(counts, law) > REJECTED


def without_lengths(state: ScoredTrace, proposal: ScoredTrace, cut: int) -> float:
    return log_acceptance(state, proposal, cut) - np.log(len(state.ids)) + np.log(len(proposal.ids))


def without_answer(state: ScoredTrace, proposal: ScoredTrace, cut: int) -> float:
    return float(np.log(len(state.ids)) - np.log(len(proposal.ids)))


@pytest.mark.parametrize(
    ("rule", "kind", "temperature"),
    [(without_lengths, TraceDrawer, 1.0), (without_answer, TraceDrawer, 1.0), (log_acceptance, Forgetful, 1.6)],
)
def test_the_check_catches_wrong_acceptance_rules(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch, rule: object, kind: type[TraceDrawer], temperature: float
) -> None:
    monkeypatch.setattr(trace_module, "log_acceptance", rule)
    rng = np.random.default_rng(5)
    zeros = np.zeros(CHAINS, dtype=np.int64)
    starts = draw_posterior_traces(oracle, zeros, zeros + 1, 1, rng)[:, 0]
    counts, _ = run_chains(oracle, starts, 1, 4, temperature=temperature, kind=kind)
    assert p_value(counts, oracle.table.reference.posterior[0, :, 1]) < REJECTED


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_the_kernel_leaves_the_posterior_invariant_exactly(oracle: Oracle, temperature: float) -> None:
    """The move's transition matrix, summed over cuts and suffixes by hand: posterior @ P = posterior."""
    traces = oracle.grammar.traces()
    sides = [side_of(oracle, 0, number, 1) for number in range(len(traces))]
    scored = TraceDrawer(oracle.policy, temperature, 0, 64).score(sides, [side.anchor for side in sides])
    law = oracle.table.reference.posterior[0, :, 1]
    matrix = np.zeros((len(traces), len(traces)))
    for a, state in enumerate(scored):
        for b, proposal in enumerate(scored):
            for cut in range(len(state.ids)):
                if state.ids[:cut] != proposal.ids[:cut] or cut >= len(proposal.ids):
                    continue
                suffix = np.exp(proposal.token_logps[cut:].sum())
                matrix[a, b] += suffix / len(state.ids) * min(1.0, np.exp(log_acceptance(state, proposal, cut)))
        matrix[a, a] += 1 - matrix[a].sum()
    assert (matrix >= -1e-12).all()
    np.testing.assert_allclose(law @ matrix, law, rtol=0, atol=1e-12)
    np.testing.assert_allclose(law[:, None] * matrix, (law[:, None] * matrix).T, rtol=0, atol=1e-12)


def test_scores_are_the_table_of_the_oracle(oracle: Oracle) -> None:
    sides = [side_of(oracle, 0, number, 0) for number in range(15)]
    for temperature in (1.0, 0.8):
        scored = TraceDrawer(oracle.policy, temperature, 0, 64).score(sides, [side.anchor for side in sides])
        joint = [trace.joint_logp for trace in scored]
        np.testing.assert_allclose(joint, oracle.table.reference.joint[0, :, 0], rtol=0, atol=1e-10)
        if temperature == 1.0:
            logps = [trace.trace_logp for trace in scored]
            np.testing.assert_allclose(logps, oracle.table.reference.trace[0], rtol=0, atol=1e-10)
        assert abs(sum(np.exp(trace.trace_logp) for trace in scored) - 1) < 1e-10


def test_moves_do_not_depend_on_the_batch(oracle: Oracle) -> None:
    starts = np.arange(15)
    sides = [side_of(oracle, chain, start, 0) for chain, start in enumerate(starts.tolist())]

    def steps(batch_size: int) -> Iterator[list[tuple[int, ...]]]:
        drawer = TraceDrawer(oracle.policy, 1.0, 7, batch_size)
        states = drawer.score(sides, [side.anchor for side in sides])
        for step in range(4):
            states = [move.state for move in metropolis_moves(drawer, sides, states, step)]
            yield [state.ids for state in states]

    assert list(steps(1)) == list(steps(4)) == list(steps(64))
