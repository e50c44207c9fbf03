"""Gradient checkpointing for a model in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bvpo_stats.errors import UserError
from bvpo_stats.model.head import causal_lm_of


@contextlib.contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Within it, decoder layers keep their inputs only and are computed again in backward (non-reentrant).

    Transformers checkpoints a layer only in training mode. Here the decoder layers themselves are marked as training
    while all they contain stays in evaluation mode, so no dropout wakes up.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not.

    Raises:
        UserError: The model has no layers that can be checkpointed.
    """
    causal_lm: Any = causal_lm_of(model)
    layers = [module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(causal_lm).__name__} has no layers that support gradient checkpointing; run without.")
    was_training = [layer.training for layer in layers]
    was_enabled = any(layer.gradient_checkpointing for layer in layers)
    if not was_enabled:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, training in zip(layers, was_training, strict=True):
            layer.training = training
        if not was_enabled:
            causal_lm.gradient_checkpointing_disable()
