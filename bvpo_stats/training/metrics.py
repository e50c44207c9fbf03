"""Metrics of pairs under TRL's names: of the steps between two log entries, and of an evaluation.

Without a prefix they are over all pairs as the loss weighs them, under ``trace/`` and ``empty/`` over one set alone.
With alpha = 1 the unprefixed metrics are those of TRL's DPOTrainer on D_t, with alpha = 0 those on D_e.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
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


def pair_values(logps: PairLogps[Tensor], terms: PairTerms[Tensor]) -> dict[str, Tensor]:
    """What is logged of pairs, by name, one value a pair."""
    found = (
        terms.chosen_reward,
        terms.rejected_reward,
        terms.margin,
        (terms.margin > 0).double(),
        logps.chosen,
        logps.rejected,
        terms.loss,
    )
    return dict(zip(_NAMES, found, strict=True))


class PairMetrics:
    """Weighted means over training steps: sums that add up over microbatches, steps and processes."""

    def __init__(self) -> None:
        self._keys = [name for name in _NAMES if name != "loss"]  # the Trainer logs the loss itself
        self._keys += [f"{prefix}/{name}" for prefix in PREFIXES.values() for name in _NAMES]
        self._sums = torch.zeros(len(self._keys), 2, dtype=torch.float64)

    def add(self, modes: list[Mode], weights: Tensor, logps: PairLogps[Tensor], terms: PairTerms[Tensor]) -> None:
        """Adds pairs.

        Args:
            modes: The set of each pair.
            weights: Share of each pair in the step's loss; zero where it only serves the estimates.
            logps: Log-probabilities.
            terms: Losses and rewards.
        """
        values = torch.stack(list(pair_values(logps, terms).values()))
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


def evaluation_metrics(values: Mapping[str, np.ndarray], alpha: float) -> dict[str, float]:
    """Means over an evaluation's examples: of each set, and of all pairs weighed by alpha and 1 - alpha.

    Where only one set is evaluated, its pairs have all the weight.

    Args:
        values: ``trace/loss``, ``empty/rewards/margins``, ...: one value an example (see :func:`pair_values`).
        alpha: Weight of the trace loss.
    """
    found = {name: float(np.mean(value, dtype=np.float64)) for name, value in values.items()}
    shares = {"trace": alpha, "empty": 1 - alpha}
    shares = {prefix: share for prefix, share in shares.items() if f"{prefix}/loss" in found}
    total = sum(shares.values())
    if total == 0:  # alpha has given all weight to the set that is not evaluated
        shares, total = dict.fromkeys(shares, 1.0), float(len(shares))
    weighed = {
        name: sum(share / total * found[f"{prefix}/{name}"] for prefix, share in shares.items()) for name in _NAMES
    }
    return weighed | found
