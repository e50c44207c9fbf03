"""Linear combinations of scores: each row a weighted sum of a few sequences' scores, or a matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

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

    def __call__(self, scores: Float[Tensor, "sequences ..."]) -> Float[Tensor, "rows ..."]:
        """The rows, in the dtype of the scores."""
        flat, weights = scores.flatten(1), self.weights.to(scores.dtype)
        if self.columns is None:
            mixed = weights @ flat
        else:
            mixed = functional.embedding_bag(self.columns, flat, self.starts, mode="sum", per_sample_weights=weights)
        return mixed.unflatten(1, scores.shape[1:])
