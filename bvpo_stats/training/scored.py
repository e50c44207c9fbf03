"""The gradient of a step together with each prompt's own trace and empty-trace gradients, out of the same backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bvpo_stats.gradients.examples import Example
from bvpo_stats.gradients.objectives import PairLogps, PairTerms
from bvpo_stats.model.scores import ScoreOptions, score_pass
from bvpo_stats.model.sinks import Sink
from bvpo_stats.model.subset import Subset
from bvpo_stats.training.gradient import Microbatch, Observe, PairModel, StepGradient, check_gradient
from bvpo_stats.training.sums import PromptSums

_ROW_BYTES = 1 << 30  # memory for the trace gradients of a group of prompts


def scored_gradient(
    pair_model: PairModel, subset: Subset, prompts: Sequence[Example], alpha: float, observe: Observe
) -> tuple[StepGradient, PromptSums]:
    """Loss and gradient of a step, and the sums that alpha is estimated from.

    Prompts go through in groups: first all trace pairs of a group, then all its empty-trace pairs, so that the inner
    products of a prompt's two gradients can be formed weight by weight. A group's trace gradients are kept meanwhile.

    Args:
        pair_model: The model and the loss.
        subset: The weights that are trained.
        prompts: The step's prompts, each with both pairs.
        alpha: Weight of the trace loss.
        observe: Told about every microbatch.

    Raises:
        UserError: A log-probability, the loss or the gradient is not finite; the pairs are named.
    """
    sums = PromptSums(subset)
    loss = torch.zeros((), dtype=torch.float64, device=pair_model.policy.device)
    for group in _groups(subset, prompts):
        rows: dict[str, Tensor] = {}
        trace = pair_model.plan([example.both[0] for example in group])
        empty = pair_model.plan([example.both[1] for example in group])
        for share, part in ((alpha, trace), (1 - alpha, empty)):
            for micro in part:
                members = torch.tensor(micro.members, device=loss.device)
                sink = sums.trace_sink(rows, len(group), members) if part is trace else sums.empty_sink(rows, members)
                logps, terms = _pass(pair_model, subset, micro, sink)
                shares = torch.full_like(terms.loss, share / len(prompts))
                loss += (shares * terms.loss).sum()
                observe([pair.mode for pair in micro.pairs], shares, logps, terms)
        sums.count(len(group))
    gradients = sums.gradients(alpha)
    check_gradient(loss, gradients, prompts)
    return StepGradient(loss, gradients), sums


def _groups(subset: Subset, prompts: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Prompts whose trace gradients fit the memory for them."""
    most = max(1, _ROW_BYTES // (subset.size * 4))
    for start in range(0, len(prompts), most):
        yield prompts[start : start + most]


def _pass(pair_model: PairModel, subset: Subset, micro: Microbatch, sink: Sink) -> tuple[PairLogps, PairTerms]:
    """Hands the sink each sequence's score times its weight in its pair's gradient."""
    found: list[tuple[PairLogps, PairTerms]] = []

    def weigh(policy: Tensor) -> Tensor:
        found.append(pair_model.terms(micro, policy))
        terms = found[0][1]
        return torch.stack([terms.chosen_weight, terms.rejected_weight], dim=1).flatten()

    options = ScoreOptions(weigh=weigh, names=micro.names)
    score_pass(pair_model.policy.model, subset, micro.batch, [sink], options)
    return found[0]
