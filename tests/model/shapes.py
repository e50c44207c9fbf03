"""Tiny random models of every supported shape, built from configurations: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.exact import replace_norms, use_plain_attention

WORDS = 29
SHAPES = ("qwen2", "qwen2-tied", "qwen3", "llama", "gpt2")


def tiny_model(
    shape: str = "qwen2",
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A two-layer model with grouped-query attention (4 heads on 2) and weights large enough to matter.

    In float64 it is float64 throughout: norms in float64 and, in place of transformers' eager attention, whose softmax
    is float32, the package's plain one.
    """
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": WORDS, "attn_implementation": attention, "initializer_range": 0.3}
    if shape == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(**common, **sizes, **overrides))
    else:
        kinds: dict[str, Any] = {
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
        }
        config_kind, model_kind = kinds[shape]
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        tied = {"tie_word_embeddings": shape == "qwen2-tied"}
        model = model_kind(config_kind(**{**common, **sizes, **tied, **overrides}))
    if dtype == torch.float64:
        replace_norms(model)
        if attention == "eager":
            use_plain_attention(model)
    return model.to(dtype).eval()


def sequences_of(lengths: list[tuple[int, int]], *, seed: int = 0, words: int = WORDS) -> list[TokenSequence]:
    """Random sequences with the given (prompt, completion) lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(words, (n,), generator=generator).tolist())

    return [TokenSequence(draw(prompt), draw(completion)) for prompt, completion in lengths]
