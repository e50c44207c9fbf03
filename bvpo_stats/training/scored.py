"""The gradient of a step together with each prompt's own trace and empty-trace gradients, out of the same backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bvpo_stats.data.records import PreferencePair
from bvpo_stats.estimators.objectives import PairLogps, PairTerms
from bvpo_stats.model.scores import ScoreOptions, score_pass
from bvpo_stats.model.sinks import Sink
from bvpo_stats.model.subset import Subset
from bvpo_stats.training.data import TrainingPrompt
from bvpo_stats.training.gradient import Observe, PairModel, StepGradient, check_gradient
from bvpo_stats.training.sums import PromptSums

_ROW_BYTES = 1 << 30  # memory for the trace gradients of one microbatch


def scored_gradient(
    pair_model: PairModel, subset: Subset, prompts: Sequence[TrainingPrompt], alpha: float, observe: Observe
) -> tuple[StepGradient, PromptSums]:
    """Loss and gradient of a step, and the sums that alpha is estimated from.

    A microbatch is a set of prompts: first their trace pairs go through, then their empty-trace pairs, so that the
    inner products of a prompt's two gradients can be formed weight by weight.

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
    for members in _microbatches(pair_model, subset, prompts):
        rows: dict[str, Tensor] = {}
        for share, pairs, sink in (
            (alpha, [p.trace for p in members], sums.trace_sink(rows)),
            (1 - alpha, [p.empty for p in members], sums.empty_sink(rows)),
        ):
            known = [pair for pair in pairs if pair is not None]
            assert len(known) == len(members)
            logps, terms = _pass(pair_model, subset, known, sink)
            shares = torch.full_like(terms.loss, share / len(prompts))
            loss += (shares * terms.loss).sum()
            observe([pair.mode for pair in known], shares, logps, terms)
        sums.count(len(members))
    gradients = sums.gradients(alpha)
    check_gradient(loss, gradients, prompts)
    return StepGradient(loss, gradients), sums


def _microbatches(
    pair_model: PairModel, subset: Subset, prompts: Sequence[TrainingPrompt]
) -> list[list[TrainingPrompt]]:
    """Prompts by the length of their trace pairs, within the budgets of tokens and of memory for rows."""
    planned = pair_model.microbatches([prompt.trace for prompt in prompts if prompt.trace is not None])
    most = max(1, _ROW_BYTES // (subset.size * 4))
    return [
        [prompts[i] for i in members[start : start + most]]
        for members in planned
        for start in range(0, len(members), most)
    ]


def _pass(
    pair_model: PairModel, subset: Subset, pairs: Sequence[PreferencePair], sink: Sink
) -> tuple[PairLogps, PairTerms]:
    """Hands each pair's gradient to the sink, one row a pair."""
    batch, names = pair_model.batch(pairs)
    reference = pair_model.reference_logps(batch, pairs, names)
    found: list[tuple[PairLogps, PairTerms]] = []

    def mix(policy: Tensor) -> Tensor:
        found.append(pair_model.terms(batch, policy, reference))
        terms = found[0][1]
        weights = terms.loss.new_zeros(len(pairs), 2 * len(pairs))
        row = torch.arange(len(pairs), device=weights.device)
        weights[row, 2 * row] = terms.chosen_weight
        weights[row, 2 * row + 1] = terms.rejected_weight
        return weights

    score_pass(pair_model.policy.model, subset, batch, [sink], ScoreOptions(mix=mix, names=names))
    return found[0]
