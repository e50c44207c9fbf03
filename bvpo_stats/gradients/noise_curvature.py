"""The curvature that gradient noise meets: L for eta L in training.

To second order a step eta with noise of covariance Sigma raises the expected loss by ``eta^2 tr(H Sigma) / 2``.
The L that prices the variance in ``norm(bias)^2 + eta L Var`` is therefore

    L = tr(H Sigma) / tr Sigma,       Sigma = Cov(g_t - g_e),

the mean curvature along the difference that alpha mixes. The largest eigenvalue, the L of Theorem 3, is the same for
noise along the steepest direction and too large for any other: alpha then pays too much for quiet gradients (see the
oracle training study).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from bvpo_stats.gradients.curvature import CurvatureOptions, PairLoss
from bvpo_stats.gradients.examples import Example
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.pair_gradients import GradientOptions, pair_gradients
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.subset import Subset

PRODUCTS = 8
"""Hessian-vector products spent; with no more prompts than that the trace is exact."""


def noise_curvature(
    policy: Policy,
    subset: Subset,
    examples: Sequence[Example],
    objective: Objective,
    options: CurvatureOptions,
) -> float:
    """``tr(H Sigma) / tr Sigma`` with H the Hessian of the mean loss over the D_t pairs.

    With v_i the centred ``t_i - e_i`` of prompt i, ``tr(H Sigma) / tr Sigma = sum_i v_i' H v_i / sum_i norm(v_i)^2``.
    Beyond `PRODUCTS` prompts both sums are estimated from random signs, ``z = sum_i s_i v_i`` (Hutchinson 1990):
    ``E z' H z = sum_i v_i' H v_i``.

    Args:
        policy: The policy at theta, dropout off.
        subset: The parameters theta.
        examples: Joined D_t and D_e pairs; memory is one gradient a pair.
        objective: The loss.
        options: Budget of tokens and seed; ``n_pairs`` bounds the prompts.

    Returns:
        L; negative where the loss is concave along the noise, 0 where there is no noise.

    """
    pairs = [example.both for example in examples[: options.n_pairs]]
    chosen = [pair for both in pairs for pair in both]
    _, gradients = pair_gradients(policy.model, subset, chosen, GradientOptions(objective=objective))
    values = gradients.double().cpu().numpy()
    noise = values[0::2] - values[1::2]
    noise -= noise.mean(axis=0)
    loss = PairLoss(policy, subset, [trace for trace, _ in pairs], objective, options.max_tokens)
    probes = _probes(noise, options.seed)
    curved = sum(float(probe @ loss.product(probe)) for probe in probes)
    size = float((probes**2).sum())
    return curved / size if size > 0 else 0.0


def _probes(noise: Float[np.ndarray, "prompts parameters"], seed: int) -> Float[np.ndarray, "products parameters"]:
    if len(noise) <= PRODUCTS:
        return noise
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(PRODUCTS, len(noise))) @ noise
