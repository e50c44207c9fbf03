"""Per-token log-probabilities of whole completions, at any temperature, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import Batch, TokenSequence, collate, length_batches
from bvpo_stats.model.head import Head, head_logprobs, last_hidden_states, output_head
from bvpo_stats.model.policy import Policy


@torch.inference_mode()
def completion_logprobs(
    policy: Policy,
    sequences: Sequence[TokenSequence],
    names: Sequence[str],
    *,
    temperatures: Sequence[float] = (1.0,),
    max_tokens: int | None = None,
) -> list[Float[np.ndarray, "temperatures tokens"]]:
    """Log softmax(logits / T)[token] of every completion token, for each temperature T, in nats.

    One forward pass serves all temperatures; the head is chunked and its log-softmax is in float32 or better.

    Args:
        policy: Who scores, as it stands (an adapter that is enabled counts).
        sequences: What to score, in any order; they are batched by length.
        names: How to name each of them in an error.
        temperatures: The temperatures.
        max_tokens: Padded tokens per batch; None for 8k on a CPU and 32k on an accelerator.

    Returns:
        One float64 array per sequence, in the order given.

    Raises:
        UserError: A sequence is empty or longer than the model's positions, or a log-probability is NaN or infinite.
    """
    budget = max_tokens or (8_192 if policy.device.type == "cpu" else 32_768)
    results: list[Float[np.ndarray, "temperatures tokens"] | None] = [None] * len(sequences)
    for rows in length_batches([len(sequence) for sequence in sequences], max_tokens=budget):
        batch = collate(
            [sequences[row] for row in rows],
            pad_id=policy.pad_id,
            max_positions=policy.max_positions,
            names=[names[row] for row in rows],
            device=policy.device,
        )
        for row, values in zip(rows, _batch(policy, batch, temperatures), strict=True):
            if not np.isfinite(values).all():
                raise UserError(
                    f"The model gives a NaN or infinite log-probability to {names[row]}. Check its weights, or load it "
                    "in a wider type (`dtype='float32'`)."
                )
            results[row] = values
    return [values for values in results if values is not None]


def _batch(
    policy: Policy, batch: Batch, temperatures: Sequence[float]
) -> list[Float[np.ndarray, "temperatures tokens"]]:
    head, mask = output_head(policy.model), batch.completion_mask
    hidden = last_hidden_states(policy.model, batch)[mask]
    targets = batch.input_ids[:, 1:][mask]
    scored = [_at_temperature(hidden, head, targets, temperature) for temperature in temperatures]
    table = torch.stack(scored).double().cpu().numpy()
    return np.split(table, np.cumsum(mask.sum(dim=1).cpu().numpy())[:-1], axis=1)


def _at_temperature(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> Tensor:
    if (
        temperature != 1.0
    ):  # logits / T = (hidden / T) @ weight.T + bias / T: scales the small factor, not the large one
        hidden = hidden / temperature
        head = Head(head.weight, None if head.bias is None else head.bias / temperature)
    return head_logprobs(hidden, head, targets)
