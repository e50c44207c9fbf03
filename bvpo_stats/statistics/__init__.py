"""Pure mathematics on arrays: streaming moments, intervals, alpha curves. Knows nothing of language models."""

from bvpo_stats.statistics.alpha import (
    AlphaStar,
    alpha_curve,
    alpha_from_gradients,
    alpha_from_summary,
    alpha_j,
    alpha_limits,
    conditional_variance_ratio,
    error_curve,
    error_table,
    fixed_alpha_verdict,
    layer_alphas,
    trace_sampling_share,
)
from bvpo_stats.statistics.estimates import Estimates
from bvpo_stats.statistics.moments import Moments, MomentSummary, summary_of_arrays

__all__ = [
    "AlphaStar",
    "Estimates",
    "MomentSummary",
    "Moments",
    "alpha_curve",
    "alpha_from_gradients",
    "alpha_from_summary",
    "alpha_j",
    "alpha_limits",
    "conditional_variance_ratio",
    "error_curve",
    "error_table",
    "fixed_alpha_verdict",
    "layer_alphas",
    "summary_of_arrays",
    "trace_sampling_share",
]
