"""What becomes of scores: linear combinations of them, and the sinks that take them, one weight at a time.

A sink is any callable ``sink(name, scores)``; it is called once per weight and pass, in the order in which backward
reaches the weights, with the scores [rows, *weight shape] in float32 or better. It must not keep a reference unless it
means to keep the memory. A weight that a pass does not use is not reported: its scores are zero.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bvpo_stats.model.subset import Subset

_SPARSE = 0.125
"""Share of nonzero weights up to which adding up single scores beats the matrix product."""


@dataclass(frozen=True)
class Mixture:
    """The map of scores [sequences, ...] to rows [rows, ...], ``row_i = sum_j w_ij score_j``.

    Attributes:
        weights: ``[rows, sequences]``, or the nonzero ones alone where there are few.
        columns: Sequence of each nonzero weight, row by row; None for a full matrix.
        starts: Where each row begins in ``columns``.
    """

    weights: Tensor
    columns: Int[Tensor, " nonzero"] | None = None
    starts: Int[Tensor, " rows"] | None = None

    @classmethod
    def of(cls, matrix: Float[Tensor, "rows sequences"]) -> Mixture:
        """From the full matrix: the rows of a microbatch of prompts are sparse, each made of its own prompt's scores.

        >>> matrix = torch.zeros(2, 20)
        >>> matrix[0, 3], matrix[1, 4] = 2.0, -1.0
        >>> mixture = Mixture.of(matrix)
        >>> mixture.columns.tolist(), mixture(torch.arange(20.0)[:, None]).tolist()
        ([3, 4], [[6.0], [-4.0]])
        """
        nonzero = torch.nonzero(matrix)
        if len(nonzero) > _SPARSE * matrix.numel():
            return cls(matrix)
        rows, columns = nonzero.unbind(dim=1)
        counts = torch.bincount(rows, minlength=len(matrix))
        return cls(matrix[rows, columns], columns, torch.cumsum(counts, dim=0) - counts)

    @classmethod
    def of_rows(
        cls, rows: Sequence[Mapping[int, float]], sequences: int, device: torch.device | str = "cpu"
    ) -> Mixture:
        """From sparse rows, sequence to weight.

        >>> Mixture.of_rows([{3: 2.0}, {}, {4: -1.0, 0: 0.0}], 20)(torch.arange(20.0)[:, None]).tolist()
        [[6.0], [0.0], [-4.0]]
        """
        entries = [sorted((column, weight) for column, weight in row.items() if weight) for row in rows]
        flat = [entry for row in entries for entry in row]
        weights = torch.tensor([weight for _, weight in flat], dtype=torch.float64, device=device)
        columns = torch.tensor([column for column, _ in flat], dtype=torch.long, device=device)
        counts = torch.tensor([len(row) for row in entries], dtype=torch.long, device=device)
        if len(flat) <= _SPARSE * len(rows) * sequences:
            return cls(weights, columns, torch.cumsum(counts, dim=0) - counts)
        matrix = torch.zeros(len(rows), sequences, dtype=torch.float64, device=device)
        matrix[torch.repeat_interleave(torch.arange(len(rows), device=device), counts), columns] = weights
        return cls(matrix)

    def __call__(self, scores: Float[Tensor, "sequences ..."]) -> Float[Tensor, "rows ..."]:
        """The rows, in the dtype of the scores."""
        flat, weights = scores.flatten(1), self.weights.to(scores.dtype)
        if self.columns is None:
            mixed = weights @ flat
        else:
            mixed = functional.embedding_bag(self.columns, flat, self.starts, mode="sum", per_sample_weights=weights)
        return mixed.unflatten(1, scores.shape[1:])


Sink = Callable[[str, Tensor], None]

_BLOCK = 1 << 16  # coordinates converted to float64 at a time


class Keep:
    """Keeps the scores of one pass: rows x parameters numbers of memory. For small subsets, tests and tables."""

    def __init__(self) -> None:
        self.scores: dict[str, Tensor] = {}

    def __call__(self, name: str, scores: Float[Tensor, "rows ..."]) -> None:
        """Stores the scores of one weight."""
        self.scores[name] = scores

    def flat(self, subset: Subset, rows: int) -> Float[Tensor, "rows parameters"]:
        """All scores as vectors, in the order of ``subset.parameters``; zero for unused weights.

        Args:
            subset: The subset of the pass.
            rows: Number of rows of the pass.
        """
        columns = []
        for name, parameter in subset.parameters.items():
            kept = self.scores.get(name)
            columns.append(
                parameter.new_zeros(rows, math.prod(subset.shapes[name]), dtype=_wide(parameter.dtype))
                if kept is None
                else kept.flatten(1)
            )
        return torch.cat(columns, dim=1)


class Sum:
    """Adds up the rows of any number of passes, S = sum_i s_i, in float64."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def __call__(self, name: str, scores: Float[Tensor, "rows ..."]) -> None:
        """Adds the rows of one weight."""
        total = scores.sum(0, dtype=torch.float64)
        self.totals[name] = self.totals[name].add_(total) if name in self.totals else total


class Dots:
    """All inner products of one pass's rows, G_ij = <s_i, s_j>, in float64: rows x rows numbers of memory."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None

    def __call__(self, name: str, scores: Float[Tensor, "rows ..."]) -> None:
        """Adds one weight's part of the inner products."""
        for block in _float64_blocks(scores.flatten(1)):
            part = block @ block.T
            self._gram = part if self._gram is None else self._gram.add_(part)

    @property
    def gram(self) -> Float[Tensor, "rows rows"]:
        """The inner products.

        Raises:
            RuntimeError: No pass has reported scores.
        """
        if self._gram is None:
            raise RuntimeError("No scores have been received.")
        return self._gram


class Project:
    """Count sketch of every row: p coordinates that preserve inner products in expectation (feature hashing).

    Coordinate j of theta is added, with a random sign, to one of p buckets. E <P s, P s'> = <s, s'>, with variance at
    most (norm(s)^2 norm(s')^2 + <s, s'>^2) / p. The map depends on the seed and the weight's name alone, so sketches of
    different passes and processes can be compared.

    Source: Weinberger et al. (2009), *Feature Hashing for Large Scale Multitask Learning*, Lemma 2.
    """

    def __init__(self, dimensions: int, seed: int = 0) -> None:
        self.dimensions = dimensions
        self.seed = seed
        self._sketch: Tensor | None = None

    def __call__(self, name: str, scores: Float[Tensor, "rows ..."]) -> None:
        """Adds one weight's part of the sketch."""
        flat = scores.flatten(1)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        bucket = torch.randint(self.dimensions, (flat.shape[1],), generator=generator).to(flat.device)
        sign = (2 * torch.randint(2, (flat.shape[1],), generator=generator) - 1).to(flat.device)
        if self._sketch is None:
            self._sketch = flat.new_zeros(flat.shape[0], self.dimensions, dtype=torch.float64)
        self._sketch.index_add_(1, bucket, flat.double() * sign)

    @property
    def sketch(self) -> Float[Tensor, "rows dimensions"]:
        """The sketches.

        Raises:
            RuntimeError: No pass has reported scores.
        """
        if self._sketch is None:
            raise RuntimeError("No scores have been received.")
        return self._sketch


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _float64_blocks(flat: Tensor) -> Iterator[Tensor]:
    for start in range(0, flat.shape[1], _BLOCK):
        yield flat[:, start : start + _BLOCK].double()
