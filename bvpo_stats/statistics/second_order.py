"""Second-order calibration of a studentised U-statistic: how far its jackknife standard error errs on average.

`bvpo_stats.statistics.interactions` removes the part of order ``1 / sqrt(G)`` of the dependence between a U-statistic
and its standard error. The next order decides whether intervals cover too often or too rarely. It follows from the
limit in which means of groups are Gaussian. With ``a`` the unit vector of the linear part and the symmetric matrix H of
the interactions, both in units of the standard deviation of the linear part,

    T  = (x + (e'He - tr H) / 2) / norm(a + He),    e ~ N(0, I),    x = a'e,
    T' = T + f (1 + T^2) / 2 + f^2 T^3 / 12,

where f estimates ``h1 = a'Ha`` as seen from ``a + He``, shrunk, with slope f' in it, and with an independent error of
variance n. With ``h2 = a'H^2 a`` and ``s = tr H^2`` the two-sided tail of T' is, to second order in H, that of

    x + x [h2 / 2 - s / 4 - f^2 / 4 + f' (h2 - 3 f^2 / 2)] + x^3 [7 f^2 / 12 - h2 / 2 + f' (h2 - 3 f^2 / 2)]
      + n (x^5 - 2 x^3 - 3 x) / 8.

To see it, expand T' and average over what is orthogonal to a. There the first-order part of T' is
``(w'Hw - E w'Hw) / 2``, independent of x, which acts on the tail by half its variance ``(s - 2 h2 + h1^2) / 2``. The
error ``e(x) = delta (1 + x^2) / 2`` is the same at both tails, which act together by ``E[e^2 q / 2 - e e']``. f stands
for h1 throughout.

The term in s is Efron and Stein's (1981): the jackknife counts the variance of the interactions twice. The terms in h2
act against it: where one direction carries all, its estimate is no independent yardstick.

In terms of the influences psi and the interactions r of G groups, with v the jackknife variance,

    h1 = k12 / sqrt(G),    h2 = 4 E[psi_g r_gk r_kh psi_h] / (G^3 v^2),    s = 4 E r^2 / (N (N - 1) v),

the last expectation over single examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from bvpo_stats.statistics.interactions import interaction_variance, pair_matrix, polynomial, shrunk

Array = NDArray[np.float64]


def tail_quantile(q: float, df: float, skew: Array, noise: Array, chain: Array, square: Array) -> Array:
    """Quantile of ``|T'|`` where a normal (or Student) variable has q: ``q (1 - kappa)``.

        kappa = s / 4 - h2 / 2 + f^2 / 4 - f' (h2 - 3 f^2 / 2)
                - q^2 [7 f^2 / 12 - h2 / 2 + f' (h2 - 3 f^2 / 2)] - n (q^4 - 2 q^2 - 3) / 8

    Estimates are brought into the range that matrices allow first, ``h1^2 <= h2 <= (s + h1^2) / 2``. Sets shrink by no
    more than Efron and Stein's share, ``kappa <= s / 4``: what else would narrow them rests on small numbers and on the
    Gaussian limit, and being too wide is the lesser evil. A positive kappa enters as ``q / (1 + kappa)``, the same to
    second order, which stays positive.

    That divides the standard error by ``1 + w / (4 v)`` with w known and v not, which makes it less certain: by the
    delta method its degrees of freedom fall to ``df / (1 + 2 kappa / (1 + kappa))^2``, and Student's quantile rises by
    ``(q^3 + q) / 4`` times the rise of ``1 / df``.

    Args:
        q: Quantile.
        df: Degrees of freedom of the jackknife variance.
        skew: The estimate of h1, not shrunk.
        noise: n.
        chain: h2.
        square: s.

    >>> nothing = np.array(0.0)
    >>> float(tail_quantile(2.0, np.inf, nothing, nothing, nothing, np.array(0.4)))
    1.8181818181818181
    """
    f, slope = shrunk(skew, noise)
    skew_sq = np.maximum(skew**2 - noise, 0.0)  # unbiased but for its sign
    square = np.maximum(square, skew_sq)
    chain = np.clip(chain, skew_sq, (square + skew_sq) / 2)
    moved = slope * (chain - 1.5 * f**2)
    kappa = square / 4 - chain / 2 + f**2 / 4 - moved - q**2 * (7 * f**2 / 12 - chain / 2 + moved)
    kappa = np.minimum(kappa - noise * (q**4 - 2 * q**2 - 3) / 8, square / 4)
    narrower = np.maximum(kappa, 0)
    lost = (1 + 2 * narrower / (1 + narrower)) ** 2 - 1
    student = q + (q**3 + q) / 4 * lost / df
    return np.where(kappa > 0, student / (1 + narrower), q * (1 - kappa))


@dataclass(frozen=True)
class DifferenceSecondOrder:
    """``h2 v^2`` and ``s v`` of ``B - a A`` as functions of a, for two statistics B and A.

    Attributes:
        chain: ``[..., 5]``, coefficients in a of ``4 E[psi_g r_gk r_kh psi_h] / G^3``, unbiased.
        square: ``[..., 3]``, coefficients in a of ``4 E r^2 / (N (N - 1))``, unbiased.
    """

    chain: Array
    square: Array

    @classmethod
    def of(
        cls,
        influences: Float[np.ndarray, "*lead two groups"],
        interactions: Float[np.ndarray, "*lead two pairs"],
        group_sizes: Float[np.ndarray, "*lead groups"],
    ) -> DifferenceSecondOrder:
        """From the influences of every group (jackknife pseudo-values less their centre) and the interactions."""
        n_groups = influences.shape[-1]
        b, a = influences[..., 0, :], influences[..., 1, :]
        matrices = pair_matrix(interactions, n_groups)
        r_b, r_a = matrices[..., 0, :, :], matrices[..., 1, :, :]

        def through(matrix: Array, vector: Array) -> Array:
            return np.matmul(matrix, vector[..., None])[..., 0]

        # sum_h r_kh psi_h by powers of a; its square holds the products of a group with itself, which go.
        reached = (through(r_b, b), -through(r_b, a) - through(r_a, b), through(r_a, a))
        squares = ((r_b**2).sum(axis=-1), -2 * (r_b * r_a).sum(axis=-1), (r_a**2).sum(axis=-1))
        selves = (b**2, -2 * a * b, a**2)
        chain = np.zeros((*b.shape[:-1], 5))
        for i in range(3):
            for j in range(3):
                chain[..., i + j] += (reached[i] * reached[j] - squares[i] * selves[j]).sum(axis=-1)
        chain *= 4 / (n_groups * (n_groups - 1) * (n_groups - 2) * n_groups**3)

        bb, aa, both = (
            interaction_variance(x, group_sizes)
            for x in (interactions[..., 0, :], interactions[..., 1, :], interactions.sum(axis=-2))
        )
        n = group_sizes.sum(axis=-1)[..., None]
        return cls(chain, 4 * np.stack([bb, bb + aa - both, aa], axis=-1) / (n * (n - 1)))

    def quantile(self, candidate: Array, variance: Array, skew: tuple[Array, Array], n_groups: int, q: float) -> Array:
        """`tail_quantile` at candidates ``[C, ...]`` or ``[...]``; q where nothing varies.

        Args:
            candidate: a.
            variance: Jackknife variance of ``B - a A``.
            skew: Its k12, not shrunk, and the sampling variance of that.
            n_groups: G.
            q: Quantile.
        """
        chain = polynomial([self.chain[..., k] for k in range(5)], candidate)
        square = polynomial([self.square[..., k] for k in range(3)], candidate)
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = (np.nan_to_num(x, posinf=0, neginf=0) for x in (chain / variance**2, square / variance))
            return tail_quantile(q, n_groups - 1, skew[0] / np.sqrt(n_groups), skew[1] / n_groups, *relative)
