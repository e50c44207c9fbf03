"""The backward passes of one microbatch of prompts: in one rectangle, or in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.gradients.blocks import BlockLayout, BlockRows
from bvpo_stats.gradients.forwards import Forwards, to_numpy
from bvpo_stats.gradients.plans import LogProbs, Sequences
from bvpo_stats.model.batching import length_batches, padding_share
from bvpo_stats.model.scores import Mix, ScoreOptions, score_pass
from bvpo_stats.model.subset import Subset

Mixing = Callable[[LogProbs], Float[np.ndarray, "rows sequences"]]
"""From log-probabilities to the weight of every sequence's score in every gradient."""


@dataclass(frozen=True)
class Passes:
    """The parameters and the model.

    Attributes:
        forwards: The model and how it is run.
        subset: The parameters theta.
        layout: Their blocks.
    """

    forwards: Forwards
    subset: Subset
    layout: BlockLayout

    def run(self, sequences: Sequences, rows: int, mixing: Mixing, known: LogProbs | None = None) -> BlockRows:
        """The gradients of one microbatch.

        Where the weights depend on log-probabilities, they are taken between forward and backward of one pass if all
        sequences fit one rectangle without much padding, and from a forward of their own otherwise.

        Args:
            sequences: What to run.
            rows: Number of gradients.
            mixing: Weights of the scores.
            known: Log-probabilities, where the weights need no pass.

        Raises:
            UserError: As in :func:`~bvpo_stats.model.scores.score_pass`.
        """
        forwards, sink = self.forwards, BlockRows(self.layout, rows)
        lengths = [len(sequence) for sequence in sequences.sequences]
        parts = length_batches(lengths, max_tokens=self.forwards.max_tokens, max_padding=self.forwards.max_padding)
        if known is None and self._fits(lengths):
            everything = list(range(len(lengths)))
            others = forwards.reference(sequences), forwards.tempered(sequences)
            device = self.forwards.policy.device

            def mix(found: Tensor) -> Tensor:
                policy = to_numpy(found)
                logps = LogProbs(policy, policy if others[0] is None else others[0], others[1])
                return torch.as_tensor(mixing(logps), device=device)

            self._scores(sequences, everything, mix, sink)
            return sink
        weights = torch.as_tensor(mixing(forwards.log_probs(sequences) if known is None else known))
        for part in parts:
            some = weights[:, part].to(forwards.policy.device)
            self._scores(sequences, part, _always(some), sink)
        return sink

    def _fits(self, lengths: list[int]) -> bool:
        return (
            len(lengths) * max(lengths) <= self.forwards.max_tokens
            and padding_share(lengths) <= self.forwards.max_padding
        )

    def _scores(self, sequences: Sequences, part: list[int], mix: Mix, sink: BlockRows) -> None:
        options = ScoreOptions(mix=mix, names=[sequences.names[i] for i in part])
        score_pass(self.forwards.policy.model, self.subset, self.forwards.batch(sequences, part), [sink], options)


def _always(weights: Tensor) -> Mix:
    return lambda _: weights
