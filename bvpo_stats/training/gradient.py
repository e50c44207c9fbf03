"""The gradient of one step, L_c = alpha L_t + (1 - alpha) L_e, in microbatches of a token budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Example
from bvpo_stats.gradients.objectives import Objective, PairLogps, PairTerms
from bvpo_stats.gradients.pair_gradients import pair_sequences
from bvpo_stats.model.batching import Batch, collate, length_batches
from bvpo_stats.model.head import sequence_logprobs, token_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import check_finite
from bvpo_stats.records import Mode, PreferencePair

Reference = Callable[[Sequence[tuple[Batch, Sequence[PreferencePair], Sequence[str]]]], list[Tensor]]
"""log pi_ref of the rows of some batches of pairs (with their pairs and the names of their rows)."""

Observe = Callable[[list[Mode], Tensor, PairLogps, PairTerms], None]
"""Told about every microbatch: sets, shares in the loss, log-probabilities, losses and rewards."""


@dataclass(frozen=True)
class StepGradient:
    """A step's loss and its gradient, averaged over the step's prompts.

    Attributes:
        loss: alpha L_t + (1 - alpha) L_e.
        gradients: Its derivative by each trainable weight; None for weights it does not depend on.
    """

    loss: Tensor
    gradients: list[Tensor | None]


@dataclass(frozen=True)
class Microbatch:
    """Pairs that go through the model together.

    Attributes:
        members: Their numbers in the list that was planned.
        pairs: The pairs.
        batch: Their sequences, chosen and rejected in turn.
        names: How errors name the rows.
        reference: log pi_ref of the rows; None where the loss has no reference.
    """

    members: list[int]
    pairs: list[PreferencePair]
    batch: Batch
    names: list[str]
    reference: Tensor | None


@dataclass(frozen=True)
class PairModel:
    """The model, the loss of a pair, and how pairs go through.

    Attributes:
        policy: The policy, dropout off.
        objective: The loss.
        reference: log pi_ref; None where the loss has no reference.
        max_tokens: Budget of padded tokens per forward.
        max_padding: Largest share of padding per forward.
    """

    policy: Policy
    objective: Objective
    reference: Reference | None
    max_tokens: int
    max_padding: float = 0.25

    @functools.cached_property
    def weights(self) -> list[Tensor]:
        """The parameters that are trained."""
        model: Any = self.policy.model
        return [weight for weight in model.parameters() if weight.requires_grad]

    def plan(self, pairs: Sequence[PreferencePair]) -> list[Microbatch]:
        """Pairs as microbatches, longest first, with the reference's log-probabilities.

        Args:
            pairs: The pairs.

        Raises:
            UserError: A sequence is empty or too long, or a log-probability is not finite; the pair is named.
        """
        if not pairs:
            return []
        sequences, names = pair_sequences(pairs)
        batches = length_batches(
            [len(sequence) for sequence in sequences],
            max_tokens=self.max_tokens,
            groups=[index // 2 for index in range(len(sequences))],
            max_padding=self.max_padding,
        )
        policy, found = self.policy, []
        for indices in batches:
            members = sorted({index // 2 for index in indices})
            rows = [2 * member + side for member in members for side in (0, 1)]
            batch = collate(
                [sequences[row] for row in rows],
                pad_id=policy.pad_id,
                max_positions=policy.max_positions,
                names=[names[row] for row in rows],
                device=policy.device,
            )
            found.append((members, batch, [pairs[m] for m in members], [names[row] for row in rows]))
        reference: Sequence[Tensor | None] = [None] * len(found)
        if self.reference is not None:
            reference = self.reference([entry[1:] for entry in found])
        return [
            Microbatch(members, some, batch, some_names, logps)
            for (members, batch, some, some_names), logps in zip(found, reference, strict=True)
        ]

    def terms(self, micro: Microbatch, policy: Tensor) -> tuple[PairLogps, PairTerms]:
        """Losses and score weights of a microbatch.

        Args:
            micro: The pairs.
            policy: log pi_theta of its rows.
        """
        tokens = micro.batch.completion_mask.sum(dim=1).to(policy.dtype)
        reference = micro.reference
        contrast = (None, None) if reference is None else (reference[0::2], reference[1::2])
        logps = PairLogps(policy[0::2], policy[1::2], tokens[0::2], tokens[1::2], *contrast)
        return logps, self.objective(logps)


def mixed_gradient(pair_model: PairModel, prompts: Sequence[Example], alpha: float, observe: Observe) -> StepGradient:
    """Loss and gradient of a step with a given alpha; pairs without weight are not run.

    Args:
        pair_model: The model and the loss.
        prompts: The step's prompts.
        alpha: Weight of the trace loss.
        observe: Told about every microbatch.

    Raises:
        UserError: A log-probability, the loss or the gradient is not finite; the pairs are named.
    """
    weighted = [(pair, share / len(prompts)) for prompt in prompts for pair, share in shares(prompt, alpha) if share]
    pairs = [pair for pair, _ in weighted]
    weights = pair_model.weights
    gradients: list[Tensor | None] = [None] * len(weights)
    loss = torch.zeros((), dtype=torch.float64, device=pair_model.policy.device)
    for micro in pair_model.plan(pairs):
        share = torch.tensor([weighted[i][1] for i in micro.members], dtype=torch.float64, device=loss.device)
        with torch.enable_grad():
            policy = sequence_logprobs(token_logprobs(pair_model.policy.model, micro.batch))
            check_finite(policy.detach(), micro.names)
            logps, terms = pair_model.terms(micro, policy)
            part = (share * terms.loss).sum()
            found = torch.autograd.grad(part, weights, allow_unused=True)
        gradients = [g if total is None else _add(total, g) for total, g in zip(gradients, found, strict=True)]
        loss += part.detach()
        observe([pair.mode for pair in micro.pairs], share, logps, terms)
    check_gradient(loss, gradients, prompts)
    return StepGradient(loss, gradients)


def shares(prompt: Example, alpha: float) -> list[tuple[PreferencePair, float]]:
    """The prompt's pairs with their weight in its loss, alpha and 1 - alpha."""
    found = ((prompt.trace_pair, alpha), (prompt.empty_pair, 1 - alpha))
    return [(pair, share) for pair, share in found if pair is not None]


def check_gradient(loss: Tensor, gradients: Sequence[Tensor | None], prompts: Sequence[Example]) -> None:
    """Refuses a step whose loss or gradient is not finite, before it reaches the optimizer.

    Raises:
        UserError: Names the step's prompts.
    """
    # One number to look at: a norm is finite exactly if every entry is (float64 keeps float32's squares from overflow).
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    if bool(torch.isfinite(torch.stack([loss.detach().double(), *norms]).sum())):
        return
    what = "loss" if not bool(torch.isfinite(loss)) else "gradient"
    listed = ", ".join(prompt.prompt_id for prompt in prompts[:8])
    more = f" and {len(prompts) - 8} more" if len(prompts) > 8 else ""
    raise UserError(
        f"The {what} of the batch with prompts {listed}{more} is NaN or infinite; no step was taken. Lower the "
        "learning rate or use a wider dtype, and resume from the last checkpoint."
    )


def _add(total: Tensor, more: Tensor | None) -> Float[Tensor, "..."]:
    return total if more is None else total.add_(more)
