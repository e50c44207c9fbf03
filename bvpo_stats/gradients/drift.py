"""Log-ratios and projected scores of the D_t pairs: what the bound on g_t's bias is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.gradients.blocks import BlockLayout
from bvpo_stats.gradients.examples import Example
from bvpo_stats.gradients.forwards import to_numpy
from bvpo_stats.gradients.ladder import make_forwards
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.plans import Planner, RowRules, Sequences
from bvpo_stats.model.batching import length_batches
from bvpo_stats.model.head import sequence_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import ScoreOptions, score_pass
from bvpo_stats.model.subset import Subset
from bvpo_stats.progress import progress

PROJECTED_PROMPTS = 256
"""Most prompts, spread evenly, whose scores are projected: the bound needs variances, not means."""


@dataclass(frozen=True)
class TraceSides:
    """Chosen and rejected response of some D_t pairs.

    Attributes:
        log_ratios: log pi_theta / pi_ref, in nats.
        projections: Scores along a direction.
    """

    log_ratios: Float[np.ndarray, "prompts 2"]
    projections: Float[np.ndarray, "prompts 2"]


class Along:
    """A sink: every row's inner product with one vector, in float64."""

    def __init__(self, layout: BlockLayout, direction: Mapping[str, Float[np.ndarray, " parameters"]]) -> None:
        self._layout = layout
        self._direction = direction
        self.products: Tensor | float = 0.0

    def __call__(self, name: str, scores: Float[Tensor, "rows ..."]) -> None:
        """Adds one weight's part."""
        block, offset, size = self._layout.places[name]
        part = torch.as_tensor(self._direction[block][offset : offset + size], device=scores.device)
        self.products = self.products + scores.flatten(1).double() @ part.double()


def project_sides(
    policy: Policy,
    subset: Subset,
    examples: Sequence[Example],
    direction: Mapping[str, Float[np.ndarray, " parameters"]],
    options: StreamOptions,
) -> TraceSides:
    """Log-ratios and scores along a direction of both responses of the D_t pairs, one backward per batch.

    Args:
        policy: The policy at theta.
        subset: The parameters theta.
        examples: What `join` made of D_t and D_e.
        direction: Parameter block to its part of the vector.
        options: Loss and budgets.

    Raises:
        UserError: As in :func:`~bvpo_stats.gradients.stream.gradient_batches`.
    """
    places = np.unique(np.linspace(0, len(examples) - 1, min(PROJECTED_PROMPTS, len(examples))).round().astype(int))
    sequences = _sides([examples[place] for place in places], options)
    forwards, layout = make_forwards(policy, options), BlockLayout.of(subset)
    reference = forwards.reference(sequences)
    count = len(sequences.sequences)
    logps, projections = np.zeros(count), np.zeros(count)
    lengths = [len(sequence) for sequence in sequences.sequences]
    with progress("Bounding g_t's bias", count, "responses") as advance:
        for part in length_batches(lengths, max_tokens=options.max_tokens, max_padding=options.max_padding):
            sink = Along(layout, direction)
            names = [sequences.names[i] for i in part]
            batch = forwards.batch(sequences, part)
            found = score_pass(policy.model, subset, batch, [sink], ScoreOptions(names=names))
            logps[part] = to_numpy(sequence_logprobs(found))
            projections[part] = torch.as_tensor(sink.products).cpu().numpy()
            advance(len(part))
    ratios = logps - (logps if reference is None else reference)
    return TraceSides(ratios.reshape(-1, 2), projections.reshape(-1, 2))


def _sides(examples: Sequence[Example], options: StreamOptions) -> Sequences:
    """Both D_t responses of every example, chosen and rejected in turn."""
    planner = Planner(RowRules(options.objective, "none", at_reference=False, second_traces=False))
    rows = [row for example in examples for row in planner.add(example).trace]
    every = planner.sequences()
    return Sequences(
        [every.sequences[row] for row in rows],
        [every.names[row] for row in rows],
        every.stored[rows],
        every.temperature[rows],
    )
