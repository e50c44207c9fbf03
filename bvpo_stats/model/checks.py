"""The check that every run makes on one batch: captured scores add up to autograd's gradient, and log-probs agree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bvpo_stats.model.batching import Batch
from bvpo_stats.model.head import causal_lm_of, sequence_logprobs, token_logprobs
from bvpo_stats.model.scores import score_pass
from bvpo_stats.model.sinks import Keep, Sum
from bvpo_stats.model.subset import Subset

# Two orders of the same sums: rounding differs, and by how much depends on the coarsest precision on the way. A layer
# that was missed, or counted twice, is off by 1.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 5e-2}

_CHECKED_TARGETS = 8  # targets per sequence whose full logits are formed to check the chunked head


class ScoreMismatchError(RuntimeError):
    """The engine disagrees with autograd: a fault of this package or an unsupported model, never of the data."""


def check_scores(model: nn.Module, subset: Subset, batch: Batch, *, tolerance: float | None = None) -> float:
    """Compares the sum of a batch's scores with autograd's gradient of the summed log-probabilities.

    It catches what capture can miss: a layer that the model bypasses, a weight used elsewhere, padding that leaks. The
    chunked head is compared with the model's own logits at a few positions.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not, with dropout off.
        subset: The parameters theta.
        batch: A small batch, on the model's device.
        tolerance: Largest norm(ours - autograd's) per weight, relative to the larger of norm(autograd's) and a
            hundredth of the largest weight's gradient norm; None for :data:`TOLERANCES` of the coarsest dtype.

    Returns:
        The largest relative difference found.

    Raises:
        ScoreMismatchError: Names the first weight that differs by more than the tolerance.
        UserError: As in :func:`~bvpo_stats.model.scores.score_pass`.
    """
    if tolerance is None:
        tolerance = max(TOLERANCES.get(p.dtype, 0.0) for p in model.parameters())
    check_log_probabilities(model, batch, tolerance=tolerance)
    total = Sum()
    score_pass(model, subset, batch, [total])
    weights = list(subset.parameters.values())
    with _requiring_gradients(weights):
        logps = sequence_logprobs(token_logprobs(model, batch))
        found = torch.autograd.grad(logps.sum(), weights, allow_unused=True)
    truth = {
        name: torch.zeros_like(weight, dtype=torch.float64) if gradient is None else gradient.double()
        for (name, weight), gradient in zip(subset.parameters.items(), found, strict=True)
    }
    floor = 0.01 * max(float(gradient.norm()) for gradient in truth.values())
    worst = 0.0
    for name, gradient in truth.items():
        ours = total.totals.get(name, torch.zeros_like(gradient))
        scale = max(float(gradient.norm()), floor)
        difference = float((ours - gradient).norm()) / scale if scale > 0 else float(ours.norm())
        if not difference <= tolerance:
            raise ScoreMismatchError(
                f"{name}: captured scores differ from autograd's gradient by {difference:.1e} of its norm "
                f"(allowed: {tolerance:.0e}). The model uses this weight in a way the engine does not see."
            )
        worst = max(worst, difference)
    return worst


def check_log_probabilities(model: nn.Module, batch: Batch, *, tolerance: float) -> None:
    """Compares the chunked head with the logits of the model's own forward, at the last targets of every sequence.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not.
        batch: A small batch, on the model's device.
        tolerance: Largest difference per token, in nats.

    Raises:
        ScoreMismatchError: The model does something to its logits that the chunked head does not.
    """
    last = torch.zeros_like(batch.completion_mask)
    for row in range(len(batch)):
        last[row, torch.nonzero(batch.completion_mask[row]).flatten()[-_CHECKED_TARGETS:]] = True
    positions = torch.nonzero(last.any(0)).flatten()
    with torch.no_grad():
        ours = token_logprobs(model, batch)[last]
        output = causal_lm_of(model)(
            input_ids=batch.input_ids[:, :-1], logits_to_keep=positions, use_cache=False, return_dict=True
        )
        logits = output.logits.to(ours.dtype)
        targets = batch.input_ids[:, 1:][:, positions, None]
        truth = torch.log_softmax(logits, dim=-1).gather(2, targets).squeeze(2)[last[:, positions]]
    difference = float((ours - truth).abs().max())
    if not difference <= tolerance * max(1.0, float(truth.abs().max())):
        raise ScoreMismatchError(
            f"Log-probabilities of the chunked head differ from the model's own logits by {difference:.1e} nats; the "
            f"output layer of {type(causal_lm_of(model)).__name__} is not supported."
        )


def batch_variation(model: nn.Module, subset: Subset, batch: Batch) -> Float[Tensor, " sequences"]:
    """How much a sequence's score depends on the batch it is scored in: norm(s_batch - s_alone) / norm(s_alone).

    Fused kernels and low precision round differently at different batch sizes and widths. The difference enters every
    variance of gradients, where it should be far below 1. Memory: sequences x parameters numbers.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not, with dropout off.
        subset: The parameters theta.
        batch: The sequences, on the model's device.
    """
    keep = Keep()
    score_pass(model, subset, batch, [keep])
    together = keep.flat(subset, len(batch))
    variation = together.new_zeros(len(batch))
    for row in range(len(batch)):
        tokens = int(batch.attention_mask[row].sum())
        single = Batch(
            batch.input_ids[row : row + 1, :tokens],
            batch.attention_mask[row : row + 1, :tokens],
            batch.position_ids[row : row + 1, :tokens],
            batch.completion_mask[row : row + 1, : tokens - 1],
        )
        keep = Keep()
        score_pass(model, subset, single, [keep])
        alone = keep.flat(subset, 1)[0]
        variation[row] = (together[row] - alone).norm() / alone.norm()
    return variation


@contextlib.contextmanager
def _requiring_gradients(weights: Iterable[Tensor]) -> Iterator[None]:
    weights = list(weights)
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
