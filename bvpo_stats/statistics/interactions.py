"""Interactions of jackknife groups: the part of a U-statistic that no single group accounts for.

A statistic that is linear in the U and M of `bvpo_stats.statistics.summary` is, over groups g of ``n_g`` examples,

    theta_hat = theta + sum_g (n_g / N) psi_g + sum_{g != h} (n_g n_h / N^2) r_gh + (products inside groups),

with influences ``psi_g`` and interactions ``r_gh``, the mean over the two groups of the degenerate part of the kernel
(Hoeffding's decomposition). ``r`` follows from inner products of the group means after removing all that one group
alone explains, which U-centering (Szekely and Rizzo 2014) does exactly, whatever the group sizes. Two uses:

**Studentisation.** At small noise scales the standard error depends on the estimate itself: both come from the same
mean vectors. The distribution function of ``T = (theta_hat - theta) / se`` is then, to order ``1 / sqrt(G)``
(Helmers 1991, Theorem 1, for degree two),

    P(T <= x) = Phi(x) + phi(x) [(2 x^2 + 1) k3 + 3 (x^2 + 1) k12] / (6 sqrt(G)),
    k3 = E psi^3 / s^3,     k12 = 2 E psi_g psi_h r_gh / s^3,     s^2 = E psi^2.

The part of k12 is undone by Hall's (1992) monotone cubic, here ``T + c (1 + T^2) + c^2 T^3 / 3`` with
``c = k12 / (2 sqrt(G))``. The part of k3 is left to Student's t: estimates of third moments of psi from some dozens of
examples do more harm than good (see `bvpo_stats.statistics.intervals.hall_sets`). k12 is shrunk toward zero by its own
sampling error, positive-part as James and Stein do, so that it acts where it is real; what that leaves is part of the
next order, `bvpo_stats.statistics.second_order`.

**Second-order variance.** ``E r^2`` gives the variance of the degenerate part, ``2 E r^2 / (N (N - 1))`` for examples,
which the jackknife counts twice (Efron and Stein 1981).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_GROUPS = 8
"""With fewer groups k12 is noise."""


def pair_matrix(pairs: Float[np.ndarray, "*lead pairs"], n_groups: int) -> Float[np.ndarray, "*lead groups groups"]:
    """Symmetric matrix with a zero diagonal from its upper triangle, row by row.

    >>> pair_matrix(np.array([1.0, 2.0, 3.0]), 3).tolist()
    [[0.0, 1.0, 2.0], [1.0, 0.0, 3.0], [2.0, 3.0, 0.0]]
    """
    first, second = np.triu_indices(n_groups, 1)
    where = np.full((n_groups, n_groups), len(first))  # the diagonal reads the zero at the end
    where[first, second] = where[second, first] = np.arange(len(first))
    padded = np.concatenate([pairs, np.zeros((*pairs.shape[:-1], 1))], axis=-1)
    return np.take(padded, where, axis=-1)


def u_centred(products: Float[np.ndarray, "*lead groups groups"]) -> Float[np.ndarray, "*lead pairs"]:
    """Removes from pairwise values all that is a sum of one term per group; the diagonal is ignored.

    ``r_gh = x_gh - X_g / (G - 2) - X_h / (G - 2) + X / ((G - 1) (G - 2))`` with row sums ``X_g`` and total ``X`` off
    the diagonal (Szekely and Rizzo 2014, definition 2).

    Args:
        products: Symmetric.

    Returns:
        The upper triangle, row by row.

    >>> alone = np.arange(4.0)
    >>> bool(np.allclose(u_centred(alone[:, None] + alone), 0))
    True
    """
    n_groups = products.shape[-1]
    rows = products.sum(axis=-1) - np.diagonal(products, axis1=-2, axis2=-1)
    own = rows / (n_groups - 2) - rows.sum(axis=-1, keepdims=True) / (2 * (n_groups - 1) * (n_groups - 2))
    first, second = np.triu_indices(n_groups, 1)
    flat = products.reshape(*products.shape[:-2], n_groups**2)
    return (
        np.take(flat, first * n_groups + second, axis=-1) - np.take(own, first, axis=-1) - np.take(own, second, axis=-1)
    )


def interaction_variance(
    interactions: Float[np.ndarray, "*lead pairs"], group_sizes: Float[np.ndarray, "*lead groups"]
) -> Float[np.ndarray, "*lead"]:
    """``E r^2`` of single examples, unbiased.

    U-centering is an orthogonal projection that keeps the share ``(G - 3) / (G - 1)`` of every pair, and the mean over
    two groups has the variance ``E r^2 / (n_g n_h)``:

        E r^2 = sum_{g<h} r_gh^2 / [(G - 3) / (G - 1) sum_{g<h} 1 / (n_g n_h)].

    Args:
        interactions: U-centred, over pairs g < h.
        group_sizes: Examples in each group.
    """
    n_groups = group_sizes.shape[-1]
    first, second = np.triu_indices(n_groups, 1)
    expected = (1 / (group_sizes[..., first] * group_sizes[..., second])).sum(axis=-1)
    return (interactions**2).sum(axis=-1) / (expected * (n_groups - 3) / (n_groups - 1))


def shrunk(value: Array, noise: Array) -> tuple[Array, Array]:
    """James and Stein's positive part, ``value - noise / value`` or 0, and its derivative in the value.

    Args:
        value: An estimate.
        noise: Its sampling variance.

    >>> [x.tolist() for x in shrunk(np.array([2.0, 0.5]), np.array(1.0))]
    [[1.5, 0.0], [1.25, 0.0]]
    """
    real = value**2 > noise
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(real, value - noise / value, 0.0), np.where(real, 1 + noise / value**2, 0.0)


def undo_interaction(studentised: Array, skew: Array, n_groups: int) -> Array:
    """``T + c (1 + T^2) + c^2 T^3 / 3`` with ``c = k12 / (2 sqrt(G))``: monotone, and closer to Student's t than T.

    >>> float(undo_interaction(np.array(1.7), np.array(0.0), 20))
    1.7
    """
    c = skew / (2 * math.sqrt(n_groups))
    return studentised + c * (1 + studentised**2) + c**2 * studentised**3 / 3


@dataclass(frozen=True)
class DifferenceSkew:
    """k12 of ``B - a A`` as a function of a, for two statistics B and A.

    Attributes:
        mean: ``[..., 4]``, coefficients in a of ``2 E psi_g psi_h r_gh``.
        covariance: ``[..., 4, 4]``, sampling covariance of those coefficients.
        spread: ``[..., 2, 2]``, second moments of the influences of (B, A).
    """

    mean: Array
    covariance: Array
    spread: Array

    @classmethod
    def of(
        cls, influences: Float[np.ndarray, "*lead two groups"], interactions: Float[np.ndarray, "*lead two pairs"]
    ) -> DifferenceSkew:
        """From the influences of every group (jackknife pseudo-values less their centre) and the interactions."""
        n_groups = influences.shape[-1]
        b, a = influences[..., 0, :], influences[..., 1, :]
        matrices = pair_matrix(interactions, n_groups)

        def projected(kernel: int, influence: Array) -> Array:
            return np.matmul(matrices[..., kernel, :, :], influence[..., None])[..., 0] / (n_groups - 1)

        bb, ba, ab, aa = projected(0, b), projected(0, a), projected(1, b), projected(1, a)
        # (psi_B - a psi_A) (r_B - a r_A) (psi_B - a psi_A), by powers of a.
        terms = 2 * np.stack([b * bb, -(a * bb + b * (ba + ab)), b * aa + a * (ba + ab), -a * aa], axis=-1)
        mean = terms.mean(axis=-2)
        centred = terms - mean[..., None, :]
        # A U-statistic of degree two: four times the variance of its projections.
        covariance = 4 * np.einsum("...gi,...gj->...ij", centred, centred) / (n_groups * (n_groups - 1))
        spread = np.einsum("...ig,...jg->...ij", influences, influences) / n_groups
        return cls(mean, covariance, spread)

    def at(self, a: Array) -> tuple[Array, Array]:
        """k12 at candidates ``[C, ...]`` or ``[...]`` and its sampling variance; 0 where nothing varies."""
        m, c, s = self.mean, self.covariance, self.spread
        # The coefficient of a^k in the variance of a polynomial is the sum of the k-th antidiagonal.
        antidiagonals = [np.trace(c[..., ::-1], offset=3 - k, axis1=-2, axis2=-1) for k in range(7)]
        scale = polynomial([s[..., 0, 0], -2 * s[..., 0, 1], s[..., 1, 1]], a)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = polynomial([m[..., k] for k in range(4)], a) / scale**1.5
            error = np.maximum(polynomial(antidiagonals, a), 0.0) / scale**3
        return np.nan_to_num(value, posinf=0, neginf=0), np.nan_to_num(error, posinf=0)


def polynomial(coefficients: Sequence[Array], a: Array) -> Array:
    """``sum_k c_k a^k`` by Horner's rule, for coefficients ``[...]`` and points that broadcast against them."""
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = total * a + coefficient
    return total
