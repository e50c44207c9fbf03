"""Smoothness along a trajectory: a step of power iteration on the Hessian now and then, for many copies at once.

A Hessian-vector product is a difference of gradients, ``H v = (grad(theta + h v) - grad(theta - h v)) / 2h``, in
float64 with gradients that carry no noise, so ``h`` can be small. The direction is kept from one call to the next;
theta moves little in between, so the iteration stays converged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bvpo_stats.lab.oracle.ensemble import Copies, Ensemble

_H = 1e-4

Gradient = Callable[[Copies], Float[np.ndarray, "copies parameters"]]
"""Gradient of each copy's loss, read off the scores at some theta."""


@dataclass(frozen=True)
class Curvatures:
    """Spectral norms of Hessians and their directions, one a copy.

    Attributes:
        norm: ``norm(H v)`` for the unit vector v, ``[copies]``: from below, and once converged the largest absolute
            eigenvalue, the L of an L-smooth loss.
        directions: v, ``[copies, parameters]``.
    """

    norm: Float[np.ndarray, " copies"]
    directions: Float[np.ndarray, "copies parameters"]

    @classmethod
    def start(cls, copies: int, parameters: int, seed: int = 0) -> Curvatures:
        """Random directions."""
        directions = np.random.default_rng(seed).normal(size=(copies, parameters))
        return cls(np.zeros(copies), directions / np.linalg.norm(directions, axis=1, keepdims=True))

    def refine(
        self, ensemble: Ensemble, thetas: Float[np.ndarray, "copies parameters"], gradient: Gradient, steps: int = 1
    ) -> Curvatures:
        """Power iteration at the present thetas."""
        norm, directions = self.norm, self.directions
        for _ in range(steps):
            images = hessian_products(ensemble, thetas, directions, gradient)
            norm = np.linalg.norm(images, axis=1)
            moved = norm[:, None] > 0
            directions = np.where(moved, images / np.where(moved, norm[:, None], 1.0), directions)
        return Curvatures(norm, directions)


def hessian_products(
    ensemble: Ensemble,
    thetas: Float[np.ndarray, "copies parameters"],
    vectors: Float[np.ndarray, "copies parameters"],
    gradient: Gradient,
) -> Float[np.ndarray, "copies parameters"]:
    """``H v`` of each copy's loss at its theta, by central differences along unit vectors."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    moves = _H * vectors / np.where(norms > 0, norms, 1.0)
    ahead, behind = (gradient(ensemble.at(thetas + sign * moves)) for sign in (1, -1))
    return (ahead - behind) * norms / (2 * _H)
