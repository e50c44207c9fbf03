"""Pure mathematics on arrays: streaming moments, intervals, alpha curves. Knows nothing of language models."""

from bvpo_stats.statistics.alpha import AlphaStar, alpha_from_summary, alpha_star
from bvpo_stats.statistics.arrays import summary_of_arrays
from bvpo_stats.statistics.curves import alpha_curve, alpha_j, alpha_limits, error_curve
from bvpo_stats.statistics.estimates import Estimates
from bvpo_stats.statistics.layers import layer_alphas
from bvpo_stats.statistics.marginal import anchored_snis, jackknife, multilevel, snis
from bvpo_stats.statistics.moments import Moments
from bvpo_stats.statistics.summary import MomentSummary
from bvpo_stats.statistics.verdicts import (
    conditional_variance_ratio,
    error_table,
    fixed_alpha_verdict,
    trace_sampling_share,
)
from bvpo_stats.statistics.weight_diagnostics import WeightDiagnostics, diagnose

__all__ = [
    "AlphaStar",
    "Estimates",
    "MomentSummary",
    "Moments",
    "WeightDiagnostics",
    "alpha_curve",
    "alpha_from_summary",
    "alpha_j",
    "alpha_limits",
    "alpha_star",
    "anchored_snis",
    "conditional_variance_ratio",
    "diagnose",
    "error_curve",
    "error_table",
    "fixed_alpha_verdict",
    "jackknife",
    "layer_alphas",
    "multilevel",
    "snis",
    "summary_of_arrays",
    "trace_sampling_share",
]
