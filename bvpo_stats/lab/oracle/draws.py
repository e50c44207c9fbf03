"""Samples from the oracle: examples as the data pipeline would draw them, as indices and in the package's records."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.exact import DPO, marginal_responses, pair_gradients, trace_responses
from bvpo_stats.lab.oracle.language import PROMPT_LENGTH
from bvpo_stats.records import MODES, Completion, Mode, PreferencePair, TraceRecord

Side = Literal["chosen", "rejected"]


@dataclass(frozen=True)
class Responses:
    """All responses of one mode, n per example, with the best and the worst singled out.

    Attributes:
        trace: Number of each response's trace; 0, the empty one, throughout D_e.
        answer: Number of each response's answer.
        chosen: Index of the best response (the first of equals).
        rejected: Index of the worst response (the first of equals).
    """

    trace: Int[np.ndarray, "examples samples"]
    answer: Int[np.ndarray, "examples samples"]
    chosen: Int[np.ndarray, " examples"]
    rejected: Int[np.ndarray, " examples"]

    @property
    def chosen_pair(self) -> tuple[Int[np.ndarray, " examples"], Int[np.ndarray, " examples"]]:
        """(r+, y+) of every example."""
        rows = np.arange(len(self.chosen))
        return self.trace[rows, self.chosen], self.answer[rows, self.chosen]

    @property
    def rejected_pair(self) -> tuple[Int[np.ndarray, " examples"], Int[np.ndarray, " examples"]]:
        """(r-, y-) of every example."""
        rows = np.arange(len(self.rejected))
        return self.trace[rows, self.rejected], self.answer[rows, self.rejected]


@dataclass(frozen=True)
class Draws:
    """Independent examples: a uniform prompt each, with a D_t pair and a D_e pair.

    Attributes:
        prompt: Number of each example's prompt.
        thinking: Responses with traces.
        nothinking: Responses given the empty trace.
    """

    prompt: Int[np.ndarray, " examples"]
    thinking: Responses
    nothinking: Responses

    def __len__(self) -> int:
        return len(self.prompt)


def draw_examples(oracle: Oracle, n_examples: int, rng: np.random.Generator) -> Draws:
    """Draws examples as the data pipeline would: n responses of pi_ref per mode, best and worst by reward.

    Examples whose n responses all give the same answer are drawn again in that mode, prompt kept. Nothing here uses the
    order-statistics law that the exact moments rest on, so each checks the other.

    Args:
        oracle: Where to draw from.
        n_examples: Number of examples.
        rng: Decides everything.
    """
    prompt = rng.integers(oracle.grammar.n_prompts, size=n_examples)
    sampling = oracle.table.sampling
    joint = np.exp(sampling.joint).reshape(oracle.grammar.n_prompts, -1)
    empty = np.exp(sampling.answer[:, 0])
    return Draws(prompt, _responses(oracle, prompt, joint, rng), _responses(oracle, prompt, empty, rng))


def _responses(
    oracle: Oracle,
    prompt: Int[np.ndarray, " examples"],
    law: Float[np.ndarray, "prompts outcomes"],
    rng: np.random.Generator,
) -> Responses:
    """Outcomes are numbered trace by trace, answers within a trace; without traces, outcomes are answers."""
    outcome = np.zeros((len(prompt), oracle.config.n_samples), dtype=np.int64)
    todo = np.arange(len(prompt))
    while len(todo):
        outcome[todo] = categorical(law, prompt[todo], oracle.config.n_samples, rng)
        answer = outcome[todo] % oracle.grammar.n_answers
        todo = todo[(answer == answer[:, :1]).all(axis=1)]
    trace, answer = np.divmod(outcome, oracle.grammar.n_answers)
    reward = oracle.rewards[prompt[:, None], answer]
    return Responses(trace, answer, reward.argmax(axis=1), reward.argmin(axis=1))


def categorical(
    law: Float[np.ndarray, "rows outcomes"], rows: Int[np.ndarray, " draws"], n: int, rng: np.random.Generator
) -> Int[np.ndarray, "draws n"]:
    """Draws n outcomes for each entry of ``rows``, by inversion of that row's cumulative law."""
    uniform = rng.random((len(rows), n))
    drawn = np.zeros(uniform.shape, dtype=np.int64)
    for row in np.unique(rows):
        cumulative = np.cumsum(law[row])
        where = rows == row
        drawn[where] = np.searchsorted(cumulative, uniform[where] * cumulative[-1], side="right")
    return np.minimum(drawn, law.shape[1] - 1)


def draw_posterior_traces(
    oracle: Oracle,
    prompt: Int[np.ndarray, " draws"],
    answer: Int[np.ndarray, " draws"],
    n_traces: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "draws n_traces"]:
    """Exact draws of q(r | x, y), the sampling model's law of the trace given the answer.

    Args:
        oracle: Where to draw from.
        prompt: Number of x for each row of draws.
        answer: Number of y for each row of draws.
        n_traces: Draws per row.
        rng: Decides everything.
    """
    posterior = np.moveaxis(oracle.table.sampling.posterior, 1, 2)
    n_answers = oracle.grammar.n_answers
    return categorical(posterior.reshape(-1, posterior.shape[-1]), prompt * n_answers + answer, n_traces, rng)


def draw_prior_traces(
    oracle: Oracle, prompt: Int[np.ndarray, " draws"], n_traces: int, rng: np.random.Generator
) -> Int[np.ndarray, "draws n_traces"]:
    """Draws of q(r | x), the sampling model's law of the trace whatever its answer.

    Args:
        oracle: Where to draw from.
        prompt: Number of x for each row of draws.
        n_traces: Draws per row.
        rng: Decides everything.
    """
    return categorical(np.exp(oracle.table.sampling.trace), prompt, n_traces, rng)


def example_gradients(
    oracle: Oracle, draws: Draws, objective: Objective = DPO
) -> tuple[
    Float[np.ndarray, "examples parameters"],
    Float[np.ndarray, "examples parameters"],
    Float[np.ndarray, "examples parameters"],
]:
    """(g_t, g_e, m) of each example, read off the table of scores.

    Args:
        oracle: The policy at theta.
        draws: The examples.
        objective: The preference loss.
    """
    x, responses, marginals = draws.prompt, trace_responses(oracle.table), marginal_responses(oracle.table)

    def gradients(pairs: Responses) -> Float[np.ndarray, "examples parameters"]:
        chosen, rejected = responses[(x, *pairs.chosen_pair)], responses[(x, *pairs.rejected_pair)]
        return pair_gradients(objective, chosen, rejected)[0]

    plus, minus = marginals[x, draws.thinking.chosen_pair[1]], marginals[x, draws.thinking.rejected_pair[1]]
    return gradients(draws.thinking), gradients(draws.nothinking), pair_gradients(objective, plus, minus)[0]


def draw_pairs(
    oracle: Oracle, n_examples: int, rng: np.random.Generator
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Draws D_t and D_e: one pair each per example, joined by ``prompt_id``.

    Args:
        oracle: Where to draw from.
        n_examples: Number of examples; each has its own ``prompt_id``, though questions repeat.
        rng: Decides everything.
    """
    return pair_records(oracle, draw_examples(oracle, n_examples, rng))


def pair_records(oracle: Oracle, draws: Draws) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """The pairs of given draws as (D_t, D_e) records, reference log-probabilities included."""
    spelling = Spelling(oracle)
    examples = range(len(draws))
    return (
        [_pair_record(spelling, draws, index, "thinking") for index in examples],
        [_pair_record(spelling, draws, index, "nothinking") for index in examples],
    )


def completion_records(oracle: Oracle, draws: Draws, seed: int = 0) -> list[Completion]:
    """Every response behind given draws, both modes, as a sampling run would have put them on record.

    Args:
        oracle: Where the draws come from.
        draws: The examples.
        seed: What the records say about their seed.
    """
    spelling = Spelling(oracle)
    return [
        _completion_record(spelling, draws, (index, sample), mode, seed)
        for index in range(len(draws))
        for mode in MODES
        for sample in range(oracle.config.n_samples)
    ]


def draw_traces(
    oracle: Oracle,
    pairs: Sequence[PreferencePair],
    n_traces: int,
    rng: np.random.Generator,
    source: Literal["same-answer", "prior"] = "same-answer",
) -> list[TraceRecord]:
    """A trace bank: for each side of each D_t pair its own trace (the anchor) and ``n_traces`` further ones.

    Args:
        oracle: Where to draw from.
        pairs: D_t records of this oracle.
        n_traces: Traces per side besides the anchor; may be 0.
        rng: Decides everything.
        source: ``same-answer`` draws q(r | x, y), ``prior`` draws q(r | x) and puts y after it.

    Returns:
        Records grouped by pair and side, the anchor first.

    Raises:
        UserError: A pair that is not of D_t.
    """
    spelling = Spelling(oracle)
    sides: tuple[Side, Side] = ("chosen", "rejected")
    owners = [(pair, side) for pair in pairs for side in sides]
    located = np.array([spelling.locate(pair, side) for pair, side in owners], dtype=np.int64).reshape(-1, 3)
    if source == "same-answer":
        drawn = draw_posterior_traces(oracle, located[:, 0], located[:, 2], n_traces, rng)
    else:
        drawn = draw_prior_traces(oracle, located[:, 0], n_traces, rng)
    records = []
    for (pair, side), (prompt, anchor, answer), traces in zip(owners, located.tolist(), drawn.tolist(), strict=True):
        bank: list[tuple[Literal["anchor", "same-answer", "prior"], int, int]] = [("anchor", 0, anchor)]
        bank += [(source, index, trace) for index, trace in enumerate(traces)]
        for kind, index, trace in bank:
            records.append(
                TraceRecord(
                    prompt_id=pair.prompt_id,
                    side=side,
                    source=kind,
                    index=index,
                    prompt_ids=pair.prompt_ids,
                    completion_ids=spelling.completion(trace, answer),
                    answer_start=spelling.answer_start(trace),
                    trace_logp=float(oracle.table.sampling.trace[prompt, trace]),
                    joint_logp=float(oracle.table.reference.joint[prompt, trace, answer]),
                    temperature=oracle.config.temperature,
                    model=oracle.policy.identity,
                    template=oracle.policy.template.name,
                )
            )
    return records


@dataclass(frozen=True, eq=False)
class Spelling:
    """Between the oracle's numbers for prompts, traces and answers and the tokens and texts of records."""

    oracle: Oracle

    @functools.cached_property
    def traces(self) -> list[tuple[int, ...]]:
        """All traces in table order."""
        return self.oracle.grammar.traces()

    @functools.cached_property
    def words(self) -> list[str]:
        """Spelling of every token."""
        return self.oracle.grammar.words()

    @functools.cached_property
    def _numbers(self) -> dict[tuple[int, ...], int]:
        return {trace: number for number, trace in enumerate(self.traces)}

    def completion(self, trace: int, answer: int) -> tuple[int, ...]:
        """Token ids of (r, y) by number."""
        return self.oracle.grammar.completion_ids(self.traces[trace], answer)

    def answer_start(self, trace: int) -> int:
        """Trace tokens, closing tag included."""
        return len(self.traces[trace]) + 1

    def text(self, ids: Sequence[int]) -> str:
        """What the tokenizer decodes, end of sequence left out."""
        return "".join(self.words[token] for token in ids if token != self.oracle.grammar.eos_id)

    def locate(self, pair: PreferencePair, side: Side) -> tuple[int, int, int]:
        """(prompt, trace, answer) numbers of one side of a D_t pair.

        Raises:
            UserError: The pair is of D_e, or not of this language.
        """
        if pair.mode != "thinking":
            raise UserError(f"Pair {pair.prompt_id} is a {pair.mode} pair; trace banks belong to thinking pairs (D_t).")
        ids = pair.chosen_ids if side == "chosen" else pair.rejected_ids
        grammar = self.oracle.grammar
        trace = self._numbers.get(ids[:-3])
        if trace is None or ids[-2] not in grammar.answer_ids or len(pair.prompt_ids) != PROMPT_LENGTH:
            raise UserError(f"Pair {pair.prompt_id} ({side}) is not a sequence of this oracle's language.")
        return pair.prompt_ids[2] - grammar.question_ids.start, trace, ids[-2] - grammar.answer_ids.start


def example_id(draws: Draws, index: int) -> str:
    """Name of an example: unique even where questions repeat, since every example is a cluster of its own."""
    return f"{index:06d}-q{draws.prompt[index]}"


def _pair_record(spelling: Spelling, draws: Draws, index: int, mode: Mode) -> PreferencePair:
    oracle = spelling.oracle
    prompt = int(draws.prompt[index])
    responses = draws.thinking if mode == "thinking" else draws.nothinking
    plus, minus = int(responses.chosen[index]), int(responses.rejected[index])
    r_plus, y_plus = int(responses.trace[index, plus]), int(responses.answer[index, plus])
    r_minus, y_minus = int(responses.trace[index, minus]), int(responses.answer[index, minus])
    chosen, rejected = spelling.completion(r_plus, y_plus), spelling.completion(r_minus, y_minus)
    prompt_ids = oracle.grammar.prompt_ids(prompt)
    reference = oracle.table.reference.joint[prompt]
    return PreferencePair(
        prompt_id=example_id(draws, index),
        mode=mode,
        prompt=spelling.text(prompt_ids),
        chosen=spelling.text(chosen),
        rejected=spelling.text(rejected),
        prompt_ids=prompt_ids,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_answer_start=spelling.answer_start(r_plus),
        rejected_answer_start=spelling.answer_start(r_minus),
        chosen_answer=f"y{y_plus}",
        rejected_answer=f"y{y_minus}",
        chosen_reward=float(oracle.rewards[prompt, y_plus]),
        rejected_reward=float(oracle.rewards[prompt, y_minus]),
        chosen_index=plus,
        rejected_index=minus,
        temperature=oracle.config.temperature,
        top_p=1.0,
        top_k=0,
        cut_share=0.0,
        unclosed_share=0.0,
        model=oracle.policy.identity,
        template=oracle.policy.template.name,
        ref_chosen_logps=float(reference[r_plus, y_plus]),
        ref_rejected_logps=float(reference[r_minus, y_minus]),
    )


def _completion_record(spelling: Spelling, draws: Draws, where: tuple[int, int], mode: Mode, seed: int) -> Completion:
    oracle, (index, sample) = spelling.oracle, where
    prompt = int(draws.prompt[index])
    responses = draws.thinking if mode == "thinking" else draws.nothinking
    trace, answer = int(responses.trace[index, sample]), int(responses.answer[index, sample])
    completion, prompt_ids = spelling.completion(trace, answer), oracle.grammar.prompt_ids(prompt)
    if mode == "nothinking":  # the sampler saw the closed empty trace as the end of its prompt
        prompt_ids, completion = (*prompt_ids, completion[0]), completion[1:]
    return Completion(
        prompt_id=example_id(draws, index),
        sample_index=sample,
        mode=mode,
        prompt=f"q{prompt}",
        prompt_ids=prompt_ids,
        completion_ids=completion,
        text=spelling.text(completion),
        finish_reason="stop",
        answer_start=spelling.answer_start(trace) if mode == "thinking" else 0,
        trace=spelling.text(spelling.traces[trace]) if mode == "thinking" else None,
        answer=f"y{answer}",
        seed=seed,
        temperature=oracle.config.temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=oracle.grammar.max_trace + 3,
        model=oracle.policy.identity,
        template=oracle.policy.template.name,
        engine="file",
    )
