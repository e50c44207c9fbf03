"""An enumerable reasoning model: exact marginals, biases, covariances and alpha*."""

from bvpo_stats.lab.oracle.build import ModelShape, Oracle, OracleConfig, at, build_oracle, in_coordinates, shortened
from bvpo_stats.lab.oracle.draws import (
    Draws,
    completion_records,
    draw_examples,
    draw_pairs,
    draw_traces,
    example_gradients,
    pair_records,
)
from bvpo_stats.lab.oracle.exact import (
    Atoms,
    CellMoments,
    ExactMoments,
    cell_moments,
    drift_law,
    exact_moments,
    population_atoms,
)
from bvpo_stats.lab.oracle.marginal_loss import MarginalLoss
from bvpo_stats.lab.oracle.trace_sets import expected_snis

__all__ = [
    "Atoms",
    "CellMoments",
    "Draws",
    "ExactMoments",
    "MarginalLoss",
    "ModelShape",
    "Oracle",
    "OracleConfig",
    "at",
    "build_oracle",
    "cell_moments",
    "completion_records",
    "draw_examples",
    "draw_pairs",
    "draw_traces",
    "drift_law",
    "exact_moments",
    "example_gradients",
    "expected_snis",
    "in_coordinates",
    "pair_records",
    "population_atoms",
    "shortened",
]
