"""What a model's passes need, in bytes and numbers, from its shape alone: the formulas of page "What a run needs".

A decoder layer of Llama's kind has hidden size h, MLP width f, and keys and values of k numbers a token (h without
grouped queries); the model has n layers and V words. `tests/model/test_needs.py` holds them against what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bvpo_stats.model.head import causal_lm_of
from bvpo_stats.model.policy import Policy, gradient_checkpointing

ROOM = 2 * 2**30
"""Bytes of activations that a pass may take whatever the model's size."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal LM of Llama's kind.

    Attributes:
        hidden: h.
        width: f, of the MLP.
        keys: k, numbers of a token's keys (and of its values).
        layers: n.
        words: V.
        tied: Whether the output head is the embedding.
    """

    hidden: int
    width: int
    keys: int
    layers: int
    words: int
    tied: bool = False

    @classmethod
    def of(cls, config: Any) -> ModelShape | None:
        """That of a transformers configuration; None where it names other sizes."""
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        try:
            h, heads = int(config.hidden_size), int(config.num_attention_heads)
            kv = int(getattr(config, "num_key_value_heads", None) or heads)
            head = int(getattr(config, "head_dim", None) or h // heads)
            return cls(h, int(config.intermediate_size), kv * head, int(config.num_hidden_layers),
                       int(config.vocab_size), bool(config.tie_word_embeddings))  # fmt: skip
        except (AttributeError, TypeError, ValueError):
            return None

    @property
    def linear(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of the Linear weights of one layer: q, k, v, o, gate, up, down."""
        h, f, k = self.hidden, self.width, self.keys
        return (h, h), (k, h), (k, h), (h, h), (f, h), (f, h), (h, f)

    @property
    def parameters(self) -> int:
        """All weights but biases: layers, norms, embedding and head."""
        layer = sum(out * inner for out, inner in self.linear) + 2 * self.hidden
        return self.layers * layer + self.hidden + self.words * self.hidden * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        """Weights of an adapter of that rank on all Linear layers."""
        return self.layers * rank * sum(out + inner for out, inner in self.linear)

    def moving(self, rank: int) -> int:
        """Those of its B: all that has a gradient at theta_ref."""
        return self.layers * rank * sum(out for out, _ in self.linear)

    def probed(self, rank: int) -> int:
        """Numbers that a probe of that rank takes of a gradient of all Linear weights: as many as an adapter's B."""
        return self.moving(rank)

    def kept(self, dtype: torch.dtype, rank: int = 16) -> int:
        """Bytes of activations that backward needs, a token and layer.

        ``6 h + 4 f + 2 k`` numbers of the model's dtype, low-rank ones in float32, a float32 copy at both norms.
        """
        numbers = 6 * self.hidden + 4 * self.width + 2 * self.keys
        wide = 0 if dtype.itemsize >= 4 else 4 * self.hidden
        return numbers * dtype.itemsize + wide + 28 * rank + 24

    def activations(self, tokens: int, dtype: torch.dtype, rank: int = 16, *, checkpointed: bool = False) -> int:
        """Bytes of activations of a pass over so many padded tokens, the head apart.

        Checkpointed: the input of each layer, and all of one.
        """
        layer = self.kept(dtype, rank) * tokens
        return layer + self.layers * self.hidden * dtype.itemsize * tokens if checkpointed else self.layers * layer

    def weights_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Of a whole copy."""
        return self.parameters * dtype.itemsize

    def training(self, gpus: int, tokens: int, rank: int | None, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of each GPU in training with AdamW: weights, gradients, both moments, gathered layers, activations.

        All weights: float32 masters, gradients and moments (16 bytes each) over all GPUs (FSDP2), two gathered layers
        and both word tables in `dtype`. LoRA: the base in it and an adapter in float32, whole on each GPU (DDP).
        Layers are computed again in backward; the head's logits come in chunks and are left out.

        Args:
            gpus: GPUs.
            tokens: Padded tokens of a microbatch.
            rank: Of the adapter; None for all weights.
            dtype: Of the arithmetic; in float32 the masters are what is multiplied.
        """
        held = self.activations(tokens, dtype, rank or 0, checkpointed=True)
        if rank is not None:
            return self.weights_bytes(dtype) + 16 * self.lora(rank) + held
        layer = sum(out * inner for out, inner in self.linear)
        gathered = dtype.itemsize * (2 * layer + self.words * self.hidden * (1 if self.tied else 2))
        copy = 0 if dtype.itemsize >= 4 else dtype.itemsize * self.parameters
        return 16 * self.parameters // gpus + (gathered if gpus > 1 else copy) + held

    def alpha_star(self, tokens: int, numbers: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the GPU of one process of `alpha-star`: the model, a pass, and one prompt's and one group's rows.

        Args:
            tokens: Padded tokens of a pass.
            numbers: Of a gradient that are carried (`moving`, or of all weights `probed`).
            dtype: Of the model.
        """
        held = self.activations(tokens, dtype, 16, checkpointed=True)
        return self.weights_bytes(dtype) + held + 4 * numbers * (4 + 3)  # t, e, m, t2 of a prompt; t, e, m of a group

    def closed(self, numbers: int, members: int = 3, groups: int = 20) -> int:
        """Bytes on disk of all groups' sums, in float16, the open one in float32 besides."""
        return (2 * groups + 4) * members * numbers

    def operations(self, tokens: float, *, trained: bool) -> float:
        """Floating-point operations of forward, recomputation and backward, 2 a weight and token each.

        And again 2 for the gradients of weights that are trained.
        """
        return 2.0 * self.parameters * tokens * (4 if trained else 3)


@contextmanager
def spared(policy: Policy, tokens: int) -> Iterator[bool]:
    """Within it, layers are computed again in backward where their activations would far outweigh the model.

    That is, where they would take more than twice its weights and more than `ROOM`: a fifth more time, and the same
    numbers, for a fraction of the memory.

    Args:
        policy: The policy.
        tokens: Padded tokens of the largest pass.

    Yields:
        Whether they are.
    """
    model = causal_lm_of(policy.model)
    shape = ModelShape.of(getattr(model, "config", None))
    weights = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    needed = 0 if shape is None else shape.activations(tokens, policy.model.dtype)
    if needed <= max(2 * weights, ROOM) or not any(hasattr(m, "gradient_checkpointing") for m in model.modules()):
        yield False
        return
    with gradient_checkpointing(policy.model):
        yield True
