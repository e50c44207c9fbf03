"""Pure mathematics on arrays: streaming moments, intervals, alpha curves. Knows nothing of language models."""

from bvpo_stats.statistics.alpha import AlphaStar, alpha_from_summary, alpha_star
from bvpo_stats.statistics.arrays import summary_of_arrays
from bvpo_stats.statistics.moments import Moments
from bvpo_stats.statistics.summary import MomentSummary

__all__ = ["AlphaStar", "MomentSummary", "Moments", "alpha_from_summary", "alpha_star", "summary_of_arrays"]
