"""Parameter blocks: the weights of one decoder layer strung together, and the sink that collects gradients by block."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.model.subset import Subset

_LAYER = re.compile(r"(?:^|\.)(layers|h|blocks|layer)\.(\d+)\.")
OTHER = "other"
"""Block of weights outside the decoder's layers."""


def block_of(name: str) -> str:
    """Block of a parameter: its decoder layer.

    >>> block_of("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight")
    'layers.3'
    """
    found = _LAYER.search(name)
    return OTHER if found is None else f"layers.{found.group(2)}"


@dataclass(frozen=True)
class BlockLayout:
    """Where each weight lies in its block.

    Attributes:
        sizes: Block to number of parameters, in the order of the model.
        places: Weight to (block, offset, parameters).
        dtype: float64 for float64 scores, else float32.
    """

    sizes: dict[str, int]
    places: dict[str, tuple[str, int, int]]
    dtype: type[np.floating]

    @classmethod
    def of(cls, subset: Subset) -> BlockLayout:
        """Layout of a subset."""
        sizes: dict[str, int] = {}
        places = {}
        for name, weight in subset.parameters.items():
            block = block_of(name)
            places[name] = (block, sizes.get(block, 0), weight.numel())
            sizes[block] = sizes.get(block, 0) + weight.numel()
        wide = all(weight.dtype == torch.float64 for weight in subset.parameters.values())
        return cls(sizes, places, np.float64 if wide else np.float32)

    @property
    def size(self) -> int:
        """Parameters of all blocks."""
        return sum(self.sizes.values())


class BlockRows:
    """A sink that adds up mixed scores by block, on the CPU: rows x parameters numbers of memory."""

    def __init__(self, layout: BlockLayout, rows: int) -> None:
        self._layout = layout
        self.blocks = {block: np.zeros((rows, size), dtype=layout.dtype) for block, size in layout.sizes.items()}

    def __call__(self, name: str, scores: Float[Tensor, "rows ..."]) -> None:
        """Adds one weight's rows."""
        block, offset, size = self._layout.places[name]
        self.blocks[block][:, offset : offset + size] += scores.flatten(1).cpu().numpy()

    def take(self, rows: list[int]) -> dict[str, Float[np.ndarray, "rows parameters"]]:
        """Some rows of every block; a view where they follow each other."""
        chosen = slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else rows
        return {block: values[chosen] for block, values in self.blocks.items()}
