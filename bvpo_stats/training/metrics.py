"""Metrics between two log entries, under TRL's names: sums that add up over microbatches, steps and processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bvpo_stats.gradients.objectives import PairLogps, PairTerms
from bvpo_stats.records import Mode

PREFIXES: dict[Mode, str] = {"thinking": "trace", "nothinking": "empty"}
"""What the metrics of one set alone are called, e.g. ``trace/rewards/margins``."""

_NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "loss",
)


class PairMetrics:
    """Weighted means of what TRL logs for pairs: over all pairs as the loss weighs them, and for each set alone.

    With alpha = 1 the unprefixed metrics are those of TRL's DPOTrainer on D_t, with alpha = 0 those on D_e.
    """

    def __init__(self) -> None:
        self._keys = [name for name in _NAMES if name != "loss"]  # the Trainer logs the loss itself
        self._keys += [f"{prefix}/{name}" for prefix in PREFIXES.values() for name in _NAMES]
        self._sums = torch.zeros(len(self._keys), 2, dtype=torch.float64)

    def add(self, modes: list[Mode], weights: Tensor, logps: PairLogps, terms: PairTerms) -> None:
        """Adds pairs.

        Args:
            modes: The set of each pair.
            weights: Share of each pair in the step's loss; zero where it only serves the estimates.
            logps: Log-probabilities.
            terms: Losses and rewards.
        """
        values = torch.stack(
            [
                terms.chosen_reward,
                terms.rejected_reward,
                terms.margin,
                (terms.margin > 0).double(),
                logps.chosen,
                logps.rejected,
                terms.loss,
            ]
        )
        values, weights = values.detach().double().cpu(), weights.detach().double().cpu()
        self._add("", values, weights)
        for mode, prefix in PREFIXES.items():
            chosen = torch.tensor([found == mode for found in modes], dtype=torch.float64)
            self._add(f"{prefix}/", values, chosen)

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call.

        Args:
            reduce: Adds a tensor up over processes.
        """
        sums = reduce(self._sums)
        self._sums = torch.zeros_like(self._sums)
        return {key: float(total / weight) for key, (total, weight) in zip(self._keys, sums, strict=True) if weight > 0}

    def _add(self, prefix: str, values: Tensor, weights: Tensor) -> None:
        for name, row in zip(_NAMES, values, strict=True):
            if (key := prefix + name) in self._keys:
                self._sums[self._keys.index(key)] += torch.stack([(row * weights).sum(), weights.sum()])
