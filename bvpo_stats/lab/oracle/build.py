"""Building an oracle: a real Qwen2 with LoRA over a finite language, and every sequence's log-probability and score."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Qwen2Config

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle.enumeration import SequenceTable, enumerate_sequences
from bvpo_stats.lab.oracle.grammar import PROMPT_LENGTH, Grammar, build_tokenizer
from bvpo_stats.lab.oracle.language_model import N_STATES, GrammarLM
from bvpo_stats.lab.oracle.pair_law import distinct_pair_law
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.subset import LoraOptions, create_lora, lora_subset
from bvpo_stats.model.templates import find_template


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


@dataclass(frozen=True)
class Oracle:
    """A policy at theta with everything that enumeration can know about it.

    Attributes:
        config: How it was built.
        grammar: The language.
        policy: Model, tokenizer and template, as any real policy; its reference is the adapter disabled.
        parameter_names: Names of the trainable (LoRA) parameters, in the order in which :attr:`theta` strings them.
        theta: The trainable parameters, flat.
        rewards: Reward of each answer by prompt; distinct within a prompt.
        table: Log-probabilities and scores of all sequences.
    """

    config: OracleConfig
    grammar: Grammar
    policy: Policy
    parameter_names: tuple[str, ...]
    theta: Float[np.ndarray, " parameters"]
    rewards: Float[np.ndarray, "prompts answers"]
    table: SequenceTable

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
        sizes = [weight.numel() for weight in lora_subset(self.policy.model).parameters.values()]
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
    grammar = Grammar(config.n_symbols, config.max_trace, config.n_answers, config.n_prompts)
    generator = torch.Generator().manual_seed(config.seed)
    model = _build_model(config.shape, grammar, generator)
    tokenizer = build_tokenizer(grammar)
    policy = Policy(model, tokenizer, find_template(tokenizer), f"oracle-{config.seed}", (grammar.eos_id,))
    parameters = lora_subset(model).parameters
    theta = _flatten(list(parameters.values()))
    if config.drift > 0:
        theta = theta + config.drift * torch.randn(theta.shape, generator=generator, dtype=torch.float64).numpy()
    rewards = torch.randn(config.n_prompts, config.n_answers, generator=generator, dtype=torch.float64).numpy()
    return _enumerated(config, grammar, policy, theta, rewards)


def at(oracle: Oracle, theta: Float[np.ndarray, " parameters"]) -> Oracle:
    """The same oracle at other trainable parameters; the reference and the data laws stay, the given oracle too.

    Args:
        oracle: Where the language, the base model and the rewards come from.
        theta: Trainable parameters, strung as :attr:`Oracle.theta`.

    Raises:
        UserError: ``theta`` has the wrong length.
    """
    policy = replace(oracle.policy, model=copy.deepcopy(oracle.policy.model))
    return _enumerated(oracle.config, oracle.grammar, policy, theta, oracle.rewards, oracle.table)


def _enumerated(
    config: OracleConfig,
    grammar: Grammar,
    policy: Policy,
    theta: Float[np.ndarray, " parameters"],
    rewards: Float[np.ndarray, "prompts answers"],
    known: SequenceTable | None = None,
) -> Oracle:
    parameters = lora_subset(policy.model).parameters
    _write(list(parameters.values()), theta)
    table = enumerate_sequences(policy, grammar, config.temperature, known)
    return Oracle(config, grammar, policy, tuple(parameters), np.array(theta, dtype=np.float64), rewards, table)


def _flatten(parameters: list[Tensor]) -> Float[np.ndarray, " parameters"]:
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters]).double().numpy().copy()


@torch.no_grad()
def _write(parameters: list[Tensor], theta: Float[np.ndarray, " parameters"]) -> None:
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
