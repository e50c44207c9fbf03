"""An enumerable reasoning model: exact marginals, biases, covariances and alpha*."""

from bvpo_stats.lab.oracle.atoms import Atoms, population_atoms
from bvpo_stats.lab.oracle.build import ModelShape, Oracle, OracleConfig, at, build_oracle
from bvpo_stats.lab.oracle.cells import CellMoments, cell_moments
from bvpo_stats.lab.oracle.coordinates import in_coordinates, shortened
from bvpo_stats.lab.oracle.draws import Draws, draw_examples, example_gradients
from bvpo_stats.lab.oracle.drift import drift_law
from bvpo_stats.lab.oracle.exact import ExactMoments, exact_moments
from bvpo_stats.lab.oracle.expected_snis import expected_snis
from bvpo_stats.lab.oracle.marginal_loss import HessianEnds, MarginalLoss
from bvpo_stats.lab.oracle.sampled_records import completion_records, draw_pairs, draw_traces, pair_records

__all__ = [
    "Atoms",
    "CellMoments",
    "Draws",
    "ExactMoments",
    "HessianEnds",
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
