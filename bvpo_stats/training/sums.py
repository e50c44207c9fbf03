"""Sums over one step's prompts of their trace and empty-trace gradients: the step's gradient, and what it varies by.

Per prompt i, with t_i and e_i its gradients: S_t = sum_i t_i, S_e = sum_i e_i and D_tt, D_te, D_ee = sum_i of the inner
products. The sums give the step's gradient, (alpha S_t + (1 - alpha) S_e) / n, and together with the D's the
U-statistics of :class:`~bvpo_stats.training.alpha.StepSums`. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvpo_stats.model.sinks import Sink
from bvpo_stats.model.subset import Subset
from bvpo_stats.training.alpha import StepSums


class PromptSums:
    """Running sums; memory: two vectors of the parameters, and what `TraceRows` keep."""

    def __init__(self, subset: Subset) -> None:
        self._subset = subset
        self._trace: dict[str, Tensor] = {}
        self._empty: dict[str, Tensor] = {}
        self._products: dict[str, list[Tensor]] = {"tt": [], "te": [], "ee": []}
        self._examples = 0

    def trace_sink(self, rows: dict[str, Tensor], group: int, members: Int[Tensor, " prompts"]) -> Sink:
        """Takes the weighted scores of trace pairs, chosen and rejected in turn: their sums are the prompts' t_i.

        Args:
            rows: Where the t_i are kept for the inner products with the e_i, by weight: ``[group, *shape]``.
            group: Prompts that share ``rows``.
            members: Which of them these pairs belong to, in rising order.
        """

        def take(name: str, scores: Float[Tensor, "sequences ..."]) -> None:
            gradients = scores[0::2] + scores[1::2]
            if len(members) == group:  # members are in rising order
                rows[name] = gradients
            else:
                if name not in rows:
                    rows[name] = gradients.new_zeros((group, *gradients.shape[1:]))
                rows[name][members] = gradients
            _add(self._trace, name, gradients)
            self._products["tt"].append(_square(gradients))

        return take

    def empty_sink(self, rows: dict[str, Tensor], members: Int[Tensor, " prompts"]) -> Sink:
        """Takes the weighted scores of empty-trace pairs, likewise: the prompts' e_i.

        Args:
            rows: The t_i of the group.
            members: Which of the group's prompts these pairs belong to.
        """

        def take(name: str, scores: Float[Tensor, "sequences ..."]) -> None:
            gradients = scores[0::2] + scores[1::2]
            _add(self._empty, name, gradients)
            self._products["ee"].append(_square(gradients))
            if (trace := rows.get(name)) is not None:
                theirs = trace if len(members) == len(trace) else trace[members]
                self._products["te"].append((gradients * theirs).sum(dtype=torch.float64))

        return take

    def count(self, prompts: int) -> None:
        """Counts prompts whose gradients the sinks have received."""
        self._examples += prompts

    def gradients(self, alpha: float) -> list[Tensor | None]:
        """(alpha S_t + (1 - alpha) S_e) / n by weight, in the weights' dtype; None for weights without gradient."""
        found: list[Tensor | None] = []
        for name, weight in self._subset.parameters.items():
            sums = ((alpha, self._trace.get(name)), (1 - alpha, self._empty.get(name)))
            parts = [share * part for share, part in sums if part is not None]
            found.append(sum(parts[1:], parts[0]).div_(self._examples).to(weight.dtype) if parts else None)
        return found

    def merge(self, other: PromptSums) -> PromptSums:
        """Sums over both sets of prompts; takes ``other``'s over."""
        for mine, theirs in ((self._trace, other._trace), (self._empty, other._empty)):
            for name, total in theirs.items():
                mine[name] = mine[name].add_(total) if name in mine else total
        for name, products in other._products.items():
            self._products[name] += products
        self._examples += other._examples
        return self

    def step_sums(self, reduce: Callable[[Tensor], Tensor] | None = None) -> StepSums:
        """The inner products, over all processes.

        Args:
            reduce: Adds a tensor up over processes; None for a single one.
        """
        weights = self._subset.parameters
        device = next(iter(weights.values())).device
        diagonal = [torch.stack(found).sum() if found else torch.zeros(()) for found in self._products.values()]
        numbers = torch.tensor([*map(float, diagonal), self._examples], dtype=torch.float64, device=device)
        trace, empty = (_flat(part, weights) for part in (self._trace, self._empty))
        if reduce is not None:
            numbers, trace, empty = reduce(numbers), reduce(trace), reduce(empty)
        tt, te, ee, examples = numbers.tolist()
        total = (float(trace @ trace), float(trace @ empty), float(empty @ empty))
        return StepSums(examples, examples, total, (tt, te, ee))


def _add(sums: dict[str, Tensor], name: str, gradients: Tensor) -> None:
    total = gradients.sum(0, dtype=torch.float64)
    sums[name] = sums[name].add_(total) if name in sums else total


def _square(gradients: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradients, dtype=torch.float64).square()


def _flat(part: dict[str, Tensor], weights: dict[str, torch.nn.Parameter]) -> Float[Tensor, " parameters"]:
    """A sum as one vector; weights that were not reached count as zero."""
    pieces = [
        part[name].flatten() if name in part else torch.zeros(w.numel(), dtype=torch.float64, device=w.device)
        for name, w in weights.items()
    ]
    return torch.cat(pieces)
