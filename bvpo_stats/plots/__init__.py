"""Every figure, drawn from plain report dictionaries in one visual language."""

from bvpo_stats.plots.alpha_star import alpha_figures
from bvpo_stats.plots.evaluate import evaluation_figures
from bvpo_stats.plots.oracle_training import oracle_training_figures
from bvpo_stats.plots.theorems import theorem_figures
from bvpo_stats.plots.train import train_figures
from bvpo_stats.plots.variance import variance_figures

__all__ = [
    "alpha_figures",
    "evaluation_figures",
    "oracle_training_figures",
    "theorem_figures",
    "train_figures",
    "variance_figures",
]
