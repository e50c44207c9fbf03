"""Calibration of studentised U-statistics: interactions of jackknife groups, the second order, skewness.

A statistic that is linear in the U and M of `bvpo_stats.statistics.moments` is, over groups g of ``n_g`` examples,

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
examples do more harm than good (see below). k12 is shrunk toward zero by its own
sampling error, positive-part as James and Stein do, so that it acts where it is real; what that leaves is part of the
next order.

**Second-order variance.** ``E r^2`` gives the variance of the degenerate part, ``2 E r^2 / (N (N - 1))`` for examples,
which the jackknife counts twice (Efron and Stein 1981).

**Second order.** How far the jackknife standard error errs on average decides whether intervals cover too often or too
rarely. It follows from the limit in which means of groups are Gaussian. With ``a`` the unit vector of the linear part
and the symmetric matrix H of the interactions, both in units of the standard deviation of the linear part,

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

**Skewness.** Student's t assumes that ``B - a A`` is not skewed. Squared norms of heavy-tailed gradients are, and then
the plain set misses on one side until N is large. Hall (1992) transforms the studentised difference T monotonically,

    h(T) = T + l T^2 / 3 + l^2 T^3 / 27 + l / 6,       l = skewness / sqrt(n),

which removes the first-order effect of skewness; ``l = sum psi^3 / (sum psi^2)^1.5`` of the influences of ``B - a A``.
Alone it loses where two heavy tails balance (.96 becomes .89), since a sample tells little about skewness; the hull
with the plain set does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

if TYPE_CHECKING:
    Array = NDArray[np.float64]
    Mask = NDArray[np.bool_]
else:  # numpy makes scalars of arrays without axes, with all that an array has
    Array = NDArray[np.float64] | np.float64
    Mask = NDArray[np.bool_] | np.bool_

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
    interactions: Float[np.ndarray, "*lead pairs"], group_sizes: Float[np.ndarray, "... groups"]
) -> Float[np.ndarray, "*lead"]:
    """``E r^2`` of single examples, unbiased.

    U-centering is an orthogonal projection that keeps the share ``(G - 3) / (G - 1)`` of every pair, and the mean over
    two groups has the variance ``E r^2 / (n_g n_h)``:

        E r^2 = sum_{g<h} r_gh^2 / [(G - 3) / (G - 1) sum_{g<h} 1 / (n_g n_h)].

    Args:
        interactions: U-centred, over pairs g < h.
        group_sizes: Examples in each group.
    """
    return variance_of_squares((interactions**2).sum(axis=-1), group_sizes)


def variance_of_squares(squares: Array, group_sizes: Float[np.ndarray, "... groups"]) -> Array:
    """`interaction_variance` from ``sum_{g<h} r_gh^2``."""
    n_groups = group_sizes.shape[-1]
    expected = ((1 / group_sizes).sum(axis=-1) ** 2 - (1 / group_sizes**2).sum(axis=-1)) / 2
    return np.asarray(squares / (expected * (n_groups - 3) / (n_groups - 1)))


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


def _through(matrix: Array, vector: Array) -> Array:
    return np.matmul(matrix, vector[..., None])[..., 0]


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
        cls, influences: Float[np.ndarray, "*lead two groups"], matrices: Float[np.ndarray, "*lead two groups groups"]
    ) -> DifferenceSkew:
        """From the influences of every group (jackknife pseudo-values less their centre) and their interactions.

        Args:
            influences: Of B and A.
            matrices: Interactions of both, `pair_matrix`.
        """
        n_groups = influences.shape[-1]
        b, a = influences[..., 0, :], influences[..., 1, :]

        bb, ba, ab, aa = (
            _through(matrices[..., kernel, :, :], influence) / (n_groups - 1)
            for kernel, influence in ((0, b), (0, a), (1, b), (1, a))
        )
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
        matrices: Float[np.ndarray, "*lead two groups groups"],
        group_sizes: Float[np.ndarray, "... groups"],
    ) -> DifferenceSecondOrder:
        """From the influences of every group (jackknife pseudo-values less their centre) and their interactions.

        Args:
            influences: Of B and A.
            matrices: Interactions of both, `pair_matrix`.
            group_sizes: Examples in each group.
        """
        n_groups = influences.shape[-1]
        b, a = influences[..., 0, :], influences[..., 1, :]
        r_b, r_a = matrices[..., 0, :, :], matrices[..., 1, :, :]

        # sum_h r_kh psi_h by powers of a; its square holds the products of a group with itself, which go.
        reached = (_through(r_b, b), -_through(r_b, a) - _through(r_a, b), _through(r_a, a))
        squares = ((r_b**2).sum(axis=-1), -2 * (r_b * r_a).sum(axis=-1), (r_a**2).sum(axis=-1))
        selves = (b**2, -2 * a * b, a**2)
        chain = np.zeros((*b.shape[:-1], 5))
        for i in range(3):
            for j in range(3):
                chain[..., i + j] += (reached[i] * reached[j] - squares[i] * selves[j]).sum(axis=-1)
        chain *= 4 / (n_groups * (n_groups - 1) * (n_groups - 2) * n_groups**3)

        square = np.stack([variance_of_squares(x.sum(axis=-1) / 2, group_sizes) for x in squares], axis=-1)
        n = group_sizes.sum(axis=-1)[..., None]
        return cls(chain, 4 * square / (n * (n - 1)))

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


GRID, BISECTIONS = 64, 40


def hall_transform(studentised: Array, slant: Array) -> Array:
    """Hall's monotone cubic transformation of a studentised mean of n terms, ``slant = skewness / sqrt(n)``.

    >>> float(hall_transform(np.array(1.7), np.array(0.0)))
    1.7
    """
    return studentised + slant * studentised**2 / 3 + slant**2 * studentised**3 / 27 + slant / 6


def search_ends(ratio: Array, unit: Array, inside: Callable[[Array], Mask]) -> tuple[Array, Array]:
    """Ends of the part of a confidence set that holds the estimate; infinite where it has no end on that side.

    Searches outward from the estimate, then bisects.

    Args:
        ratio: The estimate, ``[...]``.
        unit: Scale of the search, such as the delta method's standard error; 0 where there is nothing to search.
        inside: Whether candidates ``[...]``, or with further axes before, lie in the set.
    """
    angles = np.linspace(0, np.pi / 2, GRID + 1)[1:-1]
    sides = np.array([-1.0, 1.0]).reshape(2, *(1,) * np.ndim(ratio))
    crossed = ~inside(ratio + sides * unit * np.tan(angles.reshape(-1, *(1,) * sides.ndim)))
    first = crossed.argmax(axis=0)
    high = angles[first]
    low = np.where(first == 0, 0.0, angles[np.maximum(first - 1, 0)])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        out = ~inside(ratio + sides * unit * np.tan(middle))
        low, high = np.where(out, low, middle), np.where(out, middle, high)
    ends = np.where(crossed.any(axis=0), ratio + sides * unit * np.tan(low), sides * np.inf)
    # Without spread there is nothing to search: the set is the ratio itself.
    below, above = np.where(unit == 0, ratio, ends)
    return below, above
