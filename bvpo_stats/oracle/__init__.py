"""An enumerable reasoning model: exact marginals, biases, covariances and alpha*."""

from bvpo_stats.oracle.build import ModelShape, Oracle, OracleConfig, at, build_oracle
from bvpo_stats.oracle.exact import ExactMoments, exact_moments

__all__ = ["ExactMoments", "ModelShape", "Oracle", "OracleConfig", "at", "build_oracle", "exact_moments"]
