"""Log-probabilities and scores of every sequence of the oracle's language, through the real model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import logsumexp

from bvpo_stats.lab.oracle.grammar import PROMPT_LENGTH, Grammar
from bvpo_stats.model.batching import Batch, TokenSequence, collate
from bvpo_stats.model.head import Head, head_logprobs, last_hidden_states, output_head
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import score_pass
from bvpo_stats.model.sinks import Keep
from bvpo_stats.model.subset import lora_subset

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


def enumerate_sequences(
    policy: Policy, grammar: Grammar, temperature: float, known: SequenceTable | None = None
) -> SequenceTable:
    """Runs the model over every sequence of every prompt.

    Args:
        policy: The policy, with an adapter whose parameters are the trainable ones.
        grammar: The language.
        temperature: Sampling temperature of :attr:`SequenceTable.sampling`.
        known: A table of the same model at other trainable parameters: what does not depend on them is taken from it.
    """
    at_theta, scores = _scored(policy.model, grammar)
    if known is not None:
        return replace(known, policy=at_theta, scores=scores)
    with torch.no_grad(), policy.reference() as reference:
        at_reference = _log_probs(reference, grammar, 1.0)
        sampling = at_reference if temperature == 1.0 else _log_probs(reference, grammar, temperature)
    trace_tokens = np.array([len(trace) + 1 for trace in grammar.traces()])
    return SequenceTable(at_theta, at_reference, sampling, scores, trace_tokens)


def _scored(
    model: torch.nn.Module, grammar: Grammar
) -> tuple[LogProbs, Float[np.ndarray, "prompts traces answers parameters"]]:
    """Log-probabilities at temperature 1 and scores, in one pass."""
    subset, found = lora_subset(model), _Table(grammar)
    scores = np.empty((grammar.n_prompts * grammar.n_traces, grammar.n_answers, subset.size))
    for part in _parts(grammar):
        kept = Keep()
        tokens = score_pass(model, subset, part.batch, [kept])
        found.fill(part, tokens[:, PROMPT_LENGTH - 1 :])
        scores[part.rows] = kept.flat(subset, len(part.batch)).numpy().reshape(len(part.rows), -1, subset.size)
    return found.log_probs, scores.reshape(grammar.n_prompts, grammar.n_traces, grammar.n_answers, subset.size)


def _log_probs(model: torch.nn.Module, grammar: Grammar, temperature: float) -> LogProbs:
    plain = output_head(model)
    head = Head(plain.weight / temperature, None)  # scaled weights are scaled logits
    found = _Table(grammar)
    for part in _parts(grammar):
        hidden = last_hidden_states(model, part.batch)[:, PROMPT_LENGTH - 1 :]
        targets = part.batch.input_ids[:, PROMPT_LENGTH:]
        found.fill(part, head_logprobs(hidden.flatten(0, 1), head, targets.flatten()).reshape(targets.shape))
    return found.log_probs


@dataclass(frozen=True)
class _Part:
    """Sequences of one trace length, so that there is no padding; all answers of a (prompt, trace) are together.

    Attributes:
        length: Symbols of the traces.
        rows: ``prompt * n_traces + trace`` of each group of answers.
        batch: The sequences.
    """

    length: int
    rows: Int[np.ndarray, " groups"]
    batch: Batch


class _Table:
    """Log-probabilities in table order, filled part by part."""

    def __init__(self, grammar: Grammar):
        self._shape = (grammar.n_prompts, grammar.n_traces, grammar.n_answers)
        self._trace = np.empty(grammar.n_prompts * grammar.n_traces)
        self._answer = np.empty((grammar.n_prompts * grammar.n_traces, grammar.n_answers))

    def fill(self, part: _Part, tokens: Float[torch.Tensor, "sequences completion"]) -> None:
        """Takes the log-probabilities of the completions' tokens."""
        n_answers = self._shape[-1]
        self._trace[part.rows] = tokens[::n_answers, : part.length + 1].sum(-1).numpy()
        self._answer[part.rows] = tokens[:, part.length + 1 :].sum(-1).numpy().reshape(-1, n_answers)

    @property
    def log_probs(self) -> LogProbs:
        """What was filled in."""
        return LogProbs(self._trace.reshape(self._shape[:2]), self._answer.reshape(self._shape))


def _parts(grammar: Grammar) -> Iterator[_Part]:
    """All sequences of all prompts."""
    groups_at_once = max(1, _CHUNK // grammar.n_answers)
    for length, numbered in groupby(enumerate(grammar.traces()), key=lambda entry: len(entry[1])):
        traces = list(numbered)
        groups = [(prompt, number, trace) for prompt in range(grammar.n_prompts) for number, trace in traces]
        for start in range(0, len(groups), groups_at_once):
            some = groups[start : start + groups_at_once]
            sequences = [
                TokenSequence(grammar.prompt_ids(prompt), grammar.completion_ids(trace, answer))
                for prompt, _, trace in some
                for answer in range(grammar.n_answers)
            ]
            rows = np.array([prompt * grammar.n_traces + number for prompt, number, _ in some])
            yield _Part(length, rows, collate(sequences, pad_id=grammar.pad_id))
