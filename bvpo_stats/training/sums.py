"""Sums over one step's prompts of their trace and empty-trace gradients: the step's gradient, and what it varies by.

Per prompt i, with t_i and e_i its gradients: S_t = sum_i t_i, S_e = sum_i e_i and D_tt, D_te, D_ee = sum_i of the inner
products. The sums give the step's gradient, (alpha S_t + (1 - alpha) S_e) / n, and together with the D's the
U-statistics of :class:`~bvpo_stats.training.observations.StepSums`. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.model.sinks import Sink
from bvpo_stats.model.subset import Subset
from bvpo_stats.training.observations import StepSums


class PromptSums:
    """Running sums; memory: two vectors of the parameters, and the trace rows of one microbatch."""

    def __init__(self, subset: Subset) -> None:
        self._subset = subset
        self._totals: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._diagonal: list[Tensor] = []  # of each microbatch and weight: D_tt, D_te, D_ee
        self._examples, self._squares = 0.0, 0.0

    def trace_sink(self, rows: dict[str, Tensor]) -> Sink:
        """Takes trace gradients, one row a prompt, and keeps them in ``rows`` for the inner products with the others.

        Args:
            rows: Filled by weight.
        """

        def take(name: str, scores: Float[Tensor, "prompts ..."]) -> None:
            rows[name] = scores
            self._add(0, name, scores)
            square = torch.linalg.vector_norm(scores, dtype=torch.float64).square()
            self._diagonal.append(torch.stack([square, torch.zeros_like(square), torch.zeros_like(square)]))

        return take

    def empty_sink(self, rows: dict[str, Tensor]) -> Sink:
        """Takes empty-trace gradients of the same prompts; gives each weight of ``rows`` up once it has been used.

        Args:
            rows: What the trace sink kept, for the same prompts in the same order.
        """

        def take(name: str, scores: Float[Tensor, "prompts ..."]) -> None:
            self._add(1, name, scores)
            square = torch.linalg.vector_norm(scores, dtype=torch.float64).square()
            trace = rows.pop(name, None)
            cross = torch.zeros_like(square) if trace is None else (trace * scores).sum(dtype=torch.float64)
            self._diagonal.append(torch.stack([torch.zeros_like(square), cross, square]))

        return take

    def count(self, prompts: int) -> None:
        """Counts the prompts of a microbatch whose gradients the sinks have received."""
        self._examples += prompts
        self._squares += prompts

    def gradients(self, alpha: float) -> list[Tensor | None]:
        """(alpha S_t + (1 - alpha) S_e) / n by weight, in the weights' dtype; None for weights without gradient."""
        found: list[Tensor | None] = []
        for name, weight in self._subset.parameters.items():
            trace, empty = (totals.get(name) for totals in self._totals)
            parts = [share * part for share, part in ((alpha, trace), (1 - alpha, empty)) if part is not None]
            mixed = sum(parts[1:], parts[0]) / self._examples if parts else None
            found.append(None if mixed is None else mixed.to(weight.dtype))
        return found

    def merge(self, other: PromptSums) -> PromptSums:
        """Sums over both sets of prompts; takes ``other``'s over."""
        for mine, theirs in zip(self._totals, other._totals, strict=True):
            for name, total in theirs.items():
                mine[name] = mine[name].add_(total) if name in mine else total
        self._diagonal += other._diagonal
        self._examples += other._examples
        self._squares += other._squares
        return self

    def step_sums(self, reduce: Callable[[Tensor], Tensor] | None = None) -> StepSums:
        """The inner products, over all processes.

        Args:
            reduce: Adds a tensor up over processes; None for a single one.
        """
        device = next(iter(self._subset.parameters.values())).device
        diagonal = torch.stack(self._diagonal).sum(0) if self._diagonal else torch.zeros(3, dtype=torch.float64)
        counts = torch.tensor([self._examples, self._squares], dtype=torch.float64, device=device)
        numbers = torch.cat([diagonal.to(device), counts])
        totals = self._totals
        if reduce is not None:
            numbers = reduce(numbers)
            totals = tuple(self._reduced(part, reduce) for part in totals)  # type: ignore[assignment]
        products = [_dot(a, b) for a, b in ((totals[0], totals[0]), (totals[0], totals[1]), (totals[1], totals[1]))]
        tt, te, ee, examples, squares = numbers.tolist()
        return StepSums(examples, squares, (products[0], products[1], products[2]), (tt, te, ee))

    def _reduced(self, part: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Every process sends every weight: one that a process did not reach counts as zero there."""
        zero = {
            name: torch.zeros(w.shape, dtype=torch.float64, device=w.device)
            for name, w in self._subset.parameters.items()
        }
        return {name: reduce(part.get(name, zero[name])) for name in self._subset.parameters}

    def _add(self, side: int, name: str, scores: Tensor) -> None:
        total = scores.sum(0, dtype=torch.float64)
        sums = self._totals[side]
        sums[name] = sums[name].add_(total) if name in sums else total


def _dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    products = [a[name].flatten() @ b[name].flatten() for name in a if name in b]
    return float(torch.stack(products).sum()) if products else 0.0
