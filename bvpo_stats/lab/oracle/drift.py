"""How the bias of g_t grows as theta leaves theta_ref: the law to first order, from exact posterior covariances."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle.build import Oracle

Cell = tuple[int, int, int]
"""A prompt x with the answers y+ and y- of a pair, by number."""


def posterior_covariance_product(
    oracle: Oracle, prompt: int, answer: int, direction: Float[np.ndarray, " parameters"]
) -> Float[np.ndarray, " parameters"]:
    """Cov_{r | x, y}(s) times a vector, over the policy's own posterior of the trace.

    Args:
        oracle: The policy at theta.
        prompt: Number of x.
        answer: Number of y.
        direction: The vector.
    """
    law, scores = oracle.table.policy.posterior[prompt, :, answer], oracle.table.scores[prompt, :, answer]
    centred = scores - law @ scores
    return (law * (centred @ direction)) @ centred


def drift_law(
    oracle: Oracle, cell: Cell, direction: Float[np.ndarray, " parameters"], beta: float
) -> Float[np.ndarray, " parameters"]:
    r"""Derivative at theta_ref of the bias of DPO's g_t in one cell, along a direction.

        b_t(theta_ref + delta) = (beta/2)(C+ - C-) delta + (beta^2/4)(C+ + C-) delta + O(norm(delta)^2),

    C+ and C- the covariances of the score over the traces of y+ and of y-. The first term is there because a sampled
    trace of the reference is no posterior draw of the policy any more, the second because the pair's weight
    sigmoid(-m) moves with the traces.

    Args:
        oracle: At theta_ref and sampling temperature 1, where the bias starts from 0.
        cell: (x, y+, y-).
        direction: delta.
        beta: DPO's beta.

    Raises:
        UserError: An oracle elsewhere.
    """
    if oracle.config.temperature != 1.0 or np.abs(oracle.table.log_ratio).max() > 1e-12:
        raise UserError("The drift law starts from theta_ref at temperature 1; build the oracle without drift.")
    x, a, b = cell
    plus, minus = (posterior_covariance_product(oracle, x, y, direction) for y in (a, b))
    return beta / 2 * (plus - minus) + beta**2 / 4 * (plus + minus)
