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
from bvpo_stats.statistics.mixtures import budget_advice, mixture_from_gradients, trace_mixture
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
    "budget_advice",
    "conditional_variance_ratio",
    "error_curve",
    "error_table",
    "fixed_alpha_verdict",
    "layer_alphas",
    "mixture_from_gradients",
    "summary_of_arrays",
    "trace_mixture",
    "trace_sampling_share",
]
