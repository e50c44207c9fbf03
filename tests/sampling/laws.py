"""Counts against a law."""

from __future__ import annotations

import numpy as np
from scipy.stats import chisquare


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
    """Chi-square of counts against a law, rare cells pooled."""
    expected = law / law.sum() * counts.sum()
    rare = expected < 8
    observed, expected = (np.append(values[~rare], values[rare].sum()) for values in (counts, expected))
    kept = expected > 0
    return float(chisquare(observed[kept], expected[kept]).pvalue)
