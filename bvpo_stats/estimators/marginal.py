"""The marginal gradient m of one prompt as weights on the scores of its traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bvpo_stats.statistics.weight_diagnostics import WeightDiagnostics


@dataclass(frozen=True)
class SideDiagnostics:
    """Can the traces of one answer be trusted?

    Attributes:
        prompt_id: The prompt.
        side: Which answer of its D_t pair.
        weights: Effective size, largest weight, anchor gap, k-hat.
    """

    prompt_id: str
    side: Literal["chosen", "rejected"]
    weights: WeightDiagnostics
