"""The yardstick: scores by ``torch.func``, plainly written, for any parameters.

``vmap(grad(functional_call))`` differentiates each sequence's log-probability on its own, with the model's own forward,
eager attention and full logits. (``torch.func`` is the present home of functorch.) It is obviously correct, and slow;
the fast engine is tested against it in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import Batch
from bvpo_stats.model.exact import plain_attention


def reference_scores(
    model: nn.Module, names: Sequence[str], batch: Batch, *, chunk_sequences: int | None = None
) -> dict[str, Float[Tensor, "sequences ..."]]:
    """Scores s_i = grad_theta log pi_theta(completion_i | prompt_i) for any named parameters.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not, with dropout off.
        names: Parameter names, as in ``model.named_parameters()``; norms, biases and embeddings included.
        batch: The sequences, on the model's device.
        chunk_sequences: Sequences differentiated at once; None for all.

    Returns:
        Scores by parameter name.

    Raises:
        UserError: No names, or one that is not a parameter.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in names if name not in parameters]
    if unknown or not names:
        raise UserError(f"Not a parameter of the model: {unknown[0]}." if unknown else "No parameters are selected.")
    chosen = {name: parameters[name].detach() for name in names}

    def logprob(
        theta: dict[str, Tensor], input_ids: Int[Tensor, " tokens"], completion: Float[Tensor, " targets"]
    ) -> Tensor:
        # Right padding under causal attention: no mask is needed, see Batch.
        output: Any = functional_call(model, theta, kwargs={"input_ids": input_ids[None, :-1], "use_cache": False})
        logps = torch.log_softmax(output.logits[0], dim=-1)
        return (logps.gather(1, input_ids[1:, None]).squeeze(1) * completion).sum()

    per_sequence = vmap(grad(logprob), in_dims=(None, 0, 0), chunk_size=chunk_sequences)
    dtype = next(iter(chosen.values())).dtype
    with plain_attention(model):
        return per_sequence(chosen, batch.input_ids, batch.completion_mask.to(dtype))
