"""Building an oracle: a real Qwen2 with LoRA over a finite language, and every sequence's log-probability and score."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import logsumexp
from torch import Tensor
from transformers import Qwen2Config

from bvpo_stats.errors import UserError
from bvpo_stats.lab.acceptance.replicates import isometric_coordinates
from bvpo_stats.lab.oracle.language import ANSWER_TOKENS, N_STATES, PROMPT_LENGTH, Grammar, GrammarLM, build_tokenizer
from bvpo_stats.model.batching import Batch, TokenSequence, collate
from bvpo_stats.model.head import Head, completion_scores, head_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import score_pass
from bvpo_stats.model.sinks import Keep
from bvpo_stats.model.subset import LoraOptions, create_lora, lora_subset
from bvpo_stats.model.templates import find_template

_CHUNK = 1024  # sequences at a time: bounds the memory of their scores


def best_worst_law(
    probabilities: Float[np.ndarray, " answers"], rewards: Float[np.ndarray, " answers"], n_samples: int
) -> Float[np.ndarray, "answers answers"]:
    r"""Joint law of the best and the worst of n independent answers.

    With the answers in ascending order of reward and C(b, a) the sum of the probabilities from b to a, all n answers
    lie in [b, a] with probability C(b, a)^n, so

        P(best = a, worst = b) = C(b, a)^n - C(b+1, a)^n - C(b, a-1)^n + C(b+1, a-1)^n,

    and on the diagonal (all n answers equal) it is p_a^n. The reward looks at the answer only, so given its answer the
    trace of the selected response keeps its law q(r | x, y): selection does not touch it.

    Args:
        probabilities: Law of one answer; sums to 1.
        rewards: Distinct rewards of the answers.
        n_samples: n, at least 2.

    Returns:
        P[a, b] = P(best is answer a, worst is answer b); the diagonal holds the ties, from which no pair can be made.

    Raises:
        UserError: Fewer than two samples, or rewards with ties.

    >>> law = best_worst_law(np.array([0.25, 0.75]), np.array([1.0, 0.0]), 2)
    >>> law.tolist()
    [[0.0625, 0.375], [0.0, 0.5625]]
    """
    if n_samples < 2:
        raise UserError("A pair needs at least two samples per prompt; raise n_samples.")
    if len(set(np.asarray(rewards).tolist())) != len(rewards):
        raise UserError("Two answers have the same reward, so best and worst are ambiguous; give distinct rewards.")
    order = np.argsort(rewards)
    cumulative = np.concatenate([[0.0], np.cumsum(np.asarray(probabilities, dtype=np.float64)[order])])

    def all_between(low: int, high: int) -> float:
        return float((cumulative[high + 1] - cumulative[low]) ** n_samples) if low <= high else 0.0

    law = np.zeros((len(order), len(order)))
    for high, best in enumerate(order):
        for low, worst in enumerate(order[: high + 1]):
            inside = all_between(low, high) - all_between(low + 1, high)
            law[best, worst] = max(0.0, inside - all_between(low, high - 1) + all_between(low + 1, high - 1))
    return law


def distinct_pair_law(
    probabilities: Float[np.ndarray, " answers"], rewards: Float[np.ndarray, " answers"], n_samples: int
) -> Float[np.ndarray, "answers answers"]:
    """:func:`best_worst_law` given that the two answers differ, as in D_t and D_e: tied prompts are drawn again.

    >>> distinct_pair_law(np.array([0.25, 0.75]), np.array([1.0, 0.0]), 2).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    law = best_worst_law(probabilities, rewards, n_samples)
    np.fill_diagonal(law, 0.0)
    return law / law.sum()


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
    at_theta, scores = _scored(policy.model, grammar)
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
    for rows, batch in _batches(grammar):
        kept = Keep()
        found.fill(rows, batch, score_pass(model, subset, batch, [kept]))
        scores[rows] = kept.flat(subset, len(batch)).numpy().reshape(len(rows), -1, subset.size)
    return found.log_probs, scores.reshape(grammar.n_prompts, grammar.n_traces, grammar.n_answers, subset.size)


def _log_probs(model: torch.nn.Module, grammar: Grammar, temperature: float) -> LogProbs:
    def tempered(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        return head_logprobs(hidden, Head(head.weight / temperature, None), targets)  # scaled weights: scaled logits

    found = _Table(grammar)
    for rows, batch in _batches(grammar):
        tokens = torch.zeros(batch.completion_mask.shape, dtype=torch.float64)
        tokens[batch.completion_mask] = completion_scores(model, batch, tempered)
        found.fill(rows, batch, tokens)
    return found.log_probs


class _Table:
    """Log-probabilities in table order, filled batch by batch."""

    def __init__(self, grammar: Grammar):
        self._shape = (grammar.n_prompts, grammar.n_traces, grammar.n_answers)
        self._trace = np.empty(grammar.n_prompts * grammar.n_traces)
        self._answer = np.empty((grammar.n_prompts * grammar.n_traces, grammar.n_answers))

    def fill(self, rows: Int[np.ndarray, " groups"], batch: Batch, tokens: Float[Tensor, "sequences targets"]) -> None:
        """Takes the log-probabilities of the completions' tokens: a trace with its end, an answer with its end."""
        n_answers = self._shape[-1]
        to_come = batch.completion_mask.flip(-1).cumsum(-1).flip(-1)
        trace, answer = (
            torch.where(part, tokens, 0.0).sum(-1) for part in (to_come > ANSWER_TOKENS, to_come <= ANSWER_TOKENS)
        )
        self._trace[rows] = trace[::n_answers].numpy()
        self._answer[rows] = answer.numpy().reshape(-1, n_answers)

    @property
    def log_probs(self) -> LogProbs:
        """What was filled in."""
        return LogProbs(self._trace.reshape(self._shape[:2]), self._answer.reshape(self._shape))


@functools.lru_cache(maxsize=4)  # a path in theta asks for the same batches at every step
def _batches(grammar: Grammar) -> tuple[tuple[Int[np.ndarray, " groups"], Batch], ...]:
    """All sequences of all prompts, short traces first, so that there is little padding.

    Returns:
        ``prompt * n_traces + trace`` of each group of answers, and all answers of the groups.
    """
    groups_at_once, batches = max(1, _CHUNK // grammar.n_answers), []
    groups = [
        (number, trace, prompt) for number, trace in enumerate(grammar.traces()) for prompt in range(grammar.n_prompts)
    ]
    for start in range(0, len(groups), groups_at_once):
        some = groups[start : start + groups_at_once]
        sequences = [
            TokenSequence(grammar.prompt_ids(prompt), grammar.completion_ids(trace, answer))
            for _, trace, prompt in some
            for answer in range(grammar.n_answers)
        ]
        rows = np.array([prompt * grammar.n_traces + number for number, _, prompt in some])
        batches.append((rows, collate(sequences, pad_id=grammar.pad_id)))
    return tuple(batches)


@dataclass(frozen=True)
class ModelShape:
    """Size and temper of the oracle's Qwen2.

    Attributes:
        hidden_size: Width; a multiple of ``2 * heads``.
        layers: Decoder layers.
        heads: Attention heads (half as many key-value heads, so that grouped-query attention is covered).
        lora_rank: r of the LoRA adapters on every linear layer of the decoder.
        gain: Scale of the random weights; larger makes layers more nonlinear and traces matter more for the answer.
        sharpness: Scale of the head; larger makes the next-token laws more peaked.
    """

    hidden_size: int = 16
    layers: int = 2
    heads: int = 2
    lora_rank: int = 2
    gain: float = 1.5
    sharpness: float = 1.0


@dataclass(frozen=True)
class OracleConfig:
    """What to enumerate.

    Attributes:
        n_symbols: V, trace symbols.
        max_trace: T, longest trace.
        n_answers: Number of answers.
        n_prompts: Number of prompts; prompts are uniform.
        n_samples: n of best-of-n and worst-of-n.
        temperature: Sampling temperature tau_s of the responses, token by token.
        drift: Standard deviation of the Gaussian step that takes every LoRA parameter away from theta_ref.
        seed: Decides weights, rewards and the direction of the drift.
        shape: The model.
    """

    n_symbols: int = 4
    max_trace: int = 4
    n_answers: int = 3
    n_prompts: int = 4
    n_samples: int = 5
    temperature: float = 1.0
    drift: float = 0.0
    seed: int = 0
    shape: ModelShape = field(default_factory=ModelShape)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature {self.temperature}: must be positive.")
        if self.drift < 0:
            raise UserError(f"drift {self.drift}: must be 0 or more.")

    @property
    def grammar(self) -> Grammar:
        """The language.

        Raises:
            UserError: Its sizes are out of range, or too large to enumerate.
        """
        return Grammar(self.n_symbols, self.max_trace, self.n_answers, self.n_prompts)


@dataclass(frozen=True)
class Oracle:
    """A policy at theta with everything that enumeration can know about it.

    Attributes:
        config: How it was built.
        grammar: The language.
        built: The policy as :func:`build_oracle` left it: that of this oracle, or of the one it was moved from.
        parameter_names: Names of the trainable (LoRA) parameters, in the order in which :attr:`theta` strings them.
        theta: The trainable parameters, flat.
        rewards: Reward of each answer by prompt; distinct within a prompt.
        table: Log-probabilities and scores of all sequences.
        moved: Whether it stands elsewhere than ``built``.
    """

    config: OracleConfig
    grammar: Grammar
    built: Policy
    parameter_names: tuple[str, ...]
    theta: Float[np.ndarray, " parameters"]
    rewards: Float[np.ndarray, "prompts answers"]
    table: SequenceTable
    moved: bool = False

    @functools.cached_property
    def policy(self) -> Policy:
        """Model, tokenizer and template, as any real policy; its reference is the adapter disabled."""
        if not self.moved:
            return self.built
        policy = replace(self.built, model=copy.deepcopy(self.built.model))
        _write(list(lora_subset(policy.model).parameters.values()), self.theta)
        return policy

    @functools.cached_property
    def pair_law(self) -> Float[np.ndarray, "prompts answers answers"]:
        """P(y+ = a, y- = b | x) in D_t: best and worst of n answers of pi_ref at the sampling temperature."""
        return self._pair_law(self.table.sampling.answer_law)

    @functools.cached_property
    def empty_pair_law(self) -> Float[np.ndarray, "prompts answers answers"]:
        """P(y'+ = a, y'- = b | x) in D_e: the same with answers drawn given the empty trace."""
        return self._pair_law(np.exp(self.table.sampling.answer[:, 0]))

    @functools.cached_property
    def blocks(self) -> dict[str, slice]:
        """Where each parameter lies in :attr:`theta`, and so in every gradient."""
        sizes = [weight.numel() for weight in lora_subset(self.built.model).parameters.values()]
        ends = np.cumsum(sizes).tolist()
        starts = [end - size for end, size in zip(ends, sizes, strict=True)]
        return {name: slice(a, b) for name, a, b in zip(self.parameter_names, starts, ends, strict=True)}

    def _pair_law(self, answers: Float[np.ndarray, "prompts answers"]) -> Float[np.ndarray, "prompts answers answers"]:
        rows = zip(answers, self.rewards, strict=True)
        return np.stack([distinct_pair_law(law, rewards, self.config.n_samples) for law, rewards in rows])


def build_oracle(config: OracleConfig | None = None) -> Oracle:
    """Builds the model, adds LoRA, and enumerates every sequence of every prompt in float64.

    Args:
        config: What to build; the default has 341 traces, 3 answers and 4 prompts.

    Raises:
        UserError: Sizes out of range.
    """
    config = config or OracleConfig()
    grammar = config.grammar
    generator = torch.Generator().manual_seed(config.seed)
    model = _build_model(config.shape, grammar, generator)
    tokenizer = build_tokenizer(grammar)
    policy = Policy(model, tokenizer, find_template(tokenizer), f"oracle-{config.seed}", (grammar.eos_id,))
    weights = lora_subset(model).parameters
    parameters = list(weights.values())
    theta = _flatten(parameters)
    if config.drift > 0:
        theta = theta + config.drift * torch.randn(theta.shape, generator=generator, dtype=torch.float64).numpy()
    rewards = torch.randn(config.n_prompts, config.n_answers, generator=generator, dtype=torch.float64).numpy()
    _write(parameters, theta)
    table = enumerate_sequences(policy, grammar, config.temperature)
    return Oracle(config, grammar, policy, tuple(weights), theta, rewards, table)


def at(oracle: Oracle, theta: Float[np.ndarray, " parameters"]) -> Oracle:
    """The same oracle at other trainable parameters; the reference and the data laws stay, the given oracle too.

    Args:
        oracle: Where the language, the base model and the rewards come from.
        theta: Trainable parameters, strung as :attr:`Oracle.theta`.

    Raises:
        UserError: ``theta`` has the wrong length.
    """
    model, theta = oracle.built.model, np.array(theta, dtype=np.float64)
    parameters = list(lora_subset(model).parameters.values())
    there = _flatten(parameters)
    _write(parameters, theta)  # and back: a copy of the model would take longer than the enumeration
    try:
        policy, scores = _scored(model, oracle.grammar)
    finally:
        _write(parameters, there)
    # what does not depend on the trainable parameters is known
    return replace(oracle, theta=theta, table=replace(oracle.table, policy=policy, scores=scores), moved=True)


def _flatten(parameters: Sequence[Tensor]) -> Float[np.ndarray, " parameters"]:
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters]).double().numpy().copy()


@torch.no_grad()
def _write(parameters: Sequence[Tensor], theta: Float[np.ndarray, " parameters"]) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    if sum(sizes) != len(theta):
        raise UserError(f"theta has {len(theta)} numbers, but the oracle has {sum(sizes)} trainable parameters.")
    for parameter, values in zip(parameters, np.split(np.asarray(theta), np.cumsum(sizes)[:-1]), strict=True):
        parameter.copy_(torch.as_tensor(values, dtype=parameter.dtype).reshape(parameter.shape))


def _build_model(shape: ModelShape, grammar: Grammar, generator: torch.Generator) -> Any:
    config = Qwen2Config(
        vocab_size=grammar.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=2 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 2),
        max_position_embeddings=PROMPT_LENGTH + grammar.max_trace + 3,
        tie_word_embeddings=False,
        pad_token_id=grammar.pad_id,
        eos_token_id=grammar.eos_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights, which are replaced below
        base = GrammarLM(config, grammar)
    model = create_lora(base, LoraOptions(r=shape.lora_rank)).double()
    _draw_weights(model, shape, generator)
    base.write_grammar()
    return model


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, shape: ModelShape, generator: torch.Generator) -> None:
    """Own initial weights, so that a seed means the same oracle under every version of the libraries."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if "embed_tokens" in name:
                scale = 1.0
            elif "lm_head" in name:
                scale = shape.sharpness / (parameter.shape[-1] - N_STATES) ** 0.5
            else:
                scale = (1.0 if "lora_A" in name else shape.gain) / parameter.shape[-1] ** 0.5
            parameter.copy_(noise * scale)


def in_coordinates(oracle: Oracle, map_: Float[np.ndarray, "parameters dimensions"]) -> Oracle:
    """Maps every score linearly; all gradients, means and biases follow, since they are linear in the scores.

    Columns of the identity give a layer's block, diag(sqrt(p)) gives inner products in the metric diag(p), as Adam's.

    Args:
        oracle: The oracle; its laws, log-probabilities and ``theta`` stay as they are.
        map_: Right factor of the scores.

    >>> from bvpo_stats.lab.oracle import OracleConfig, build_oracle, exact_moments
    >>> oracle = build_oracle(OracleConfig(n_symbols=1, max_trace=1, n_prompts=1))
    >>> half = in_coordinates(oracle, np.eye(len(oracle.theta))[:, :512])
    >>> bool(np.allclose(exact_moments(half).mu, exact_moments(oracle).mu[:512]))
    True
    """
    return _with_scores(oracle, oracle.table.scores @ map_)


def shortened(oracle: Oracle) -> Oracle:
    """Writes the scores in an orthonormal basis of their span: the same inner products in as few numbers as can be.

    Args:
        oracle: The oracle; a small one gains most, with fewer sequences than parameters.
    """
    scores = oracle.table.scores
    short = isometric_coordinates(scores.reshape(-1, scores.shape[-1]))
    return _with_scores(oracle, short.reshape(*scores.shape[:-1], -1))


def _with_scores(oracle: Oracle, scores: Float[np.ndarray, "prompts traces answers dimensions"]) -> Oracle:
    return replace(oracle, table=replace(oracle.table, scores=scores))
