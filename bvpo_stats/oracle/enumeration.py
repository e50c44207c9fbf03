"""Log-probabilities and scores of every sequence of the oracle's language, through the real model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import logsumexp

from bvpo_stats.model.batching import Batch, TokenSequence, collate
from bvpo_stats.model.head import Head, head_logprobs, last_hidden_states, output_head
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import score_pass
from bvpo_stats.model.sinks import Keep
from bvpo_stats.model.subset import lora_subset
from bvpo_stats.oracle.grammar import PROMPT_LENGTH, Grammar

_CHUNK = 1024  # sequences at a time: bounds the memory of their scores


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of all sequences under one policy at one temperature, split where the answer begins.

    Attributes:
        trace: log pi(r | x), closing tag included.
        answer: log pi(y | x, r).
    """

    trace: Float[np.ndarray, "prompts traces"]
    answer: Float[np.ndarray, "prompts traces answers"]

    @functools.cached_property
    def joint(self) -> Float[np.ndarray, "prompts traces answers"]:
        """Log pi(r, y | x)."""
        return self.trace[..., None] + self.answer

    @functools.cached_property
    def marginal(self) -> Float[np.ndarray, "prompts answers"]:
        """Log pi(y | x) = log sum_r pi(r, y | x)."""
        return np.asarray(logsumexp(self.joint, axis=1))

    @functools.cached_property
    def answer_law(self) -> Float[np.ndarray, "prompts answers"]:
        """Pi(y | x)."""
        return np.exp(self.marginal)

    @functools.cached_property
    def posterior(self) -> Float[np.ndarray, "prompts traces answers"]:
        """Pi(r | x, y), which sums to 1 over traces."""
        return np.exp(self.joint - self.marginal[:, None])


@dataclass(frozen=True)
class SequenceTable:
    """All sequences (x, r, y): traces in the order of :meth:`Grammar.traces`, so trace 0 is the empty one.

    Attributes:
        policy: Under pi_theta at temperature 1.
        reference: Under pi_ref at temperature 1.
        sampling: Under pi_ref at the sampling temperature: the law q of the responses.
        scores: grad_theta log pi_theta(r, y | x), parameters in the order of ``Oracle.theta``.
        trace_tokens: Tokens of each trace, closing tag included.
    """

    policy: LogProbs
    reference: LogProbs
    sampling: LogProbs
    scores: Float[np.ndarray, "prompts traces answers parameters"]
    trace_tokens: Int[np.ndarray, " traces"]

    @functools.cached_property
    def log_ratio(self) -> Float[np.ndarray, "prompts traces answers"]:
        """Delta(r, y) = log pi_theta(r, y | x) - log pi_ref(r, y | x)."""
        return self.policy.joint - self.reference.joint

    @functools.cached_property
    def marginal_log_ratio(self) -> Float[np.ndarray, "prompts answers"]:
        """Log pi_theta(y | x) - log pi_ref(y | x)."""
        return self.policy.marginal - self.reference.marginal

    @functools.cached_property
    def marginal_scores(self) -> Float[np.ndarray, "prompts answers parameters"]:
        """S(y) = grad log pi_theta(y | x) = E_{r ~ pi_theta(r | x, y)} s(r, y), Fisher's identity."""
        return np.einsum("xra,xrad->xad", self.policy.posterior, self.scores)


def enumerate_sequences(policy: Policy, grammar: Grammar, temperature: float) -> SequenceTable:
    """Runs the model over every sequence of every prompt.

    Args:
        policy: The policy, with an adapter whose parameters are the trainable ones.
        grammar: The language.
        temperature: Sampling temperature of :attr:`SequenceTable.sampling`.
    """
    with torch.no_grad():
        at_theta = _log_probs(policy.model, grammar, 1.0)
        with policy.reference() as reference:
            at_reference = _log_probs(reference, grammar, 1.0)
            sampling = at_reference if temperature == 1.0 else _log_probs(reference, grammar, temperature)
    trace_tokens = np.array([len(trace) + 1 for trace in grammar.traces()])
    return SequenceTable(at_theta, at_reference, sampling, _scores(policy.model, grammar), trace_tokens)


def _log_probs(model: torch.nn.Module, grammar: Grammar, temperature: float) -> LogProbs:
    plain = output_head(model)
    head = Head(plain.weight / temperature, None)  # scaled weights are scaled logits
    trace, answer = [], []
    for length, batch in _batches(grammar):
        hidden = last_hidden_states(model, batch)[:, PROMPT_LENGTH - 1 :]
        targets = batch.input_ids[:, PROMPT_LENGTH:]
        tokens = head_logprobs(hidden.flatten(0, 1), head, targets.flatten()).reshape(targets.shape)
        trace.append(tokens[:: grammar.n_answers, : length + 1].sum(-1).numpy())
        answer.append(tokens[:, length + 1 :].sum(-1).numpy())
    shape = (grammar.n_prompts, grammar.n_traces)
    return LogProbs(np.concatenate(trace).reshape(shape), np.concatenate(answer).reshape(*shape, grammar.n_answers))


def _scores(model: torch.nn.Module, grammar: Grammar) -> Float[np.ndarray, "prompts traces answers parameters"]:
    subset = lora_subset(model)
    rows = []
    for _, batch in _batches(grammar):
        kept = Keep()
        score_pass(model, subset, batch, [kept])
        rows.append(kept.flat(subset, len(batch)).numpy())
    return np.concatenate(rows).reshape(grammar.n_prompts, grammar.n_traces, grammar.n_answers, subset.size)


def _batches(grammar: Grammar) -> Iterator[tuple[int, Batch]]:
    """(trace length, batch) over all sequences in table order: by prompt, trace, answer.

    A batch holds traces of one length, so there is no padding, and all answers of each of its traces.
    """
    traces_per_batch = max(1, _CHUNK // grammar.n_answers)
    for prompt in range(grammar.n_prompts):
        head = grammar.prompt_ids(prompt)
        for length, traces in groupby(grammar.traces(), key=len):
            remaining = list(traces)
            for start in range(0, len(remaining), traces_per_batch):
                rows = [
                    TokenSequence(head, grammar.completion_ids(trace, answer))
                    for trace in remaining[start : start + traces_per_batch]
                    for answer in range(grammar.n_answers)
                ]
                yield length, collate(rows, pad_id=grammar.pad_id)
