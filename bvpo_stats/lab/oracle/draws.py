"""Samples from the oracle as indices: which traces and answers were drawn, and which were chosen and rejected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.scored import DPO, marginal_responses, pair_gradients, trace_responses


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
        outcome[todo] = _categorical(law, prompt[todo], oracle.config.n_samples, rng)
        answer = outcome[todo] % oracle.grammar.n_answers
        todo = todo[(answer == answer[:, :1]).all(axis=1)]
    trace, answer = np.divmod(outcome, oracle.grammar.n_answers)
    reward = oracle.rewards[prompt[:, None], answer]
    return Responses(trace, answer, reward.argmax(axis=1), reward.argmin(axis=1))


def _categorical(
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
    return _categorical(posterior.reshape(-1, posterior.shape[-1]), prompt * n_answers + answer, n_traces, rng)


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
    return _categorical(np.exp(oracle.table.sampling.trace), prompt, n_traces, rng)


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
