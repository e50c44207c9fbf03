"""The same oracle with its gradients in other coordinates: fewer of them, some of them, or in another metric."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from bvpo_stats.lab.acceptance.replicates import isometric_coordinates
from bvpo_stats.lab.oracle.build import Oracle


def in_coordinates(oracle: Oracle, map_: Float[np.ndarray, "parameters dimensions"]) -> Oracle:
    """Maps every score linearly; all gradients, means and biases follow, since they are linear in the scores.

    Columns of the identity give a layer's block, diag(sqrt(p)) gives inner products in the metric diag(p), as Adam's.

    Args:
        oracle: The oracle; its laws, log-probabilities and ``theta`` stay as they are.
        map_: Right factor of the scores.

    >>> from bvpo_stats.lab.oracle import OracleConfig, build_oracle, exact_moments
    >>> oracle = build_oracle(OracleConfig(n_symbols=1, max_trace=1, n_prompts=1))
    >>> half = in_coordinates(oracle, np.eye(len(oracle.theta))[:, :512])
    >>> bool(np.allclose(exact_moments(half).mu, exact_moments(oracle).mu[:512]))
    True
    """
    return _with_scores(oracle, oracle.table.scores @ map_)


def shortened(oracle: Oracle) -> Oracle:
    """Writes the scores in an orthonormal basis of their span: the same inner products in as few numbers as can be.

    Args:
        oracle: The oracle; a small one gains most, with fewer sequences than parameters.
    """
    scores = oracle.table.scores
    short = isometric_coordinates(scores.reshape(-1, scores.shape[-1]))
    return _with_scores(oracle, short.reshape(*scores.shape[:-1], -1))


def _with_scores(oracle: Oracle, scores: Float[np.ndarray, "prompts traces answers dimensions"]) -> Oracle:
    return replace(oracle, table=replace(oracle.table, scores=scores))
