"""Fieller's set with Hall's correction for skewness, for populations with very heavy tails.

Student's t assumes that ``B - a A`` is not skewed. Squared norms of heavy-tailed gradients are, and then the plain set
misses on one side until N is large. Hall (1992) transforms the studentised difference T monotonically,

    h(T) = T + l T^2 / 3 + l^2 T^3 / 27 + l / 6,       l = skewness / sqrt(n),

which removes the first-order effect of skewness; the set is ``{a : |h(T(a))| <= q}`` with the skewness of the jackknife
pseudo-values of ``B - a A``. Use it through `bvpo_stats.statistics.intervals.hall_sets`, which says why not alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.statistics.summary import Array

GRID, BISECTIONS = 64, 40


def hall_transform(studentised: Array, skewness: Array, n: int) -> Array:
    """Hall's monotone cubic transformation of a studentised mean of n terms.

    >>> float(hall_transform(np.array(1.7), np.array(0.0), 20))
    1.7
    """
    slant = skewness / np.sqrt(n)
    return studentised + slant * studentised**2 / 3 + slant**2 * studentised**3 / 27 + slant / 6


def corrected_difference(
    candidate: Array, numerator: Array, denominator: Array, deviations: Array, weights: Array
) -> Array:
    """``h(T(a))`` at candidates a: ``[C, ...]``.

    Args:
        candidate: ``[C, ...]``.
        numerator: B, ``[...]``.
        denominator: A, ``[...]``.
        deviations: ``[..., 2, G]``, pseudo-values of (B, A) less their centre.
        weights: ``[..., G]``, such that ``sum_g weight_g deviation_g^2`` is the jackknife variance.
    """
    n = deviations.shape[-1]
    spread = deviations[..., 0, :] - candidate[..., None] * deviations[..., 1, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        studentised = (numerator - candidate * denominator) / np.sqrt((weights * spread**2).sum(axis=-1))
        raw = (spread**3).mean(axis=-1) / (spread**2).mean(axis=-1) ** 1.5
    return hall_transform(studentised, raw * np.sqrt(n * (n - 1)) / (n - 2), n)


def search_ends(ratio: Array, unit: Array, inside: Callable[[Array], NDArray[np.bool_]]) -> tuple[Array, Array]:
    """Ends of the part of a confidence set that holds the estimate; infinite where it has no end on that side.

    Searches outward from the estimate, then bisects.

    Args:
        ratio: The estimate, ``[...]``.
        unit: Scale of the search, such as the delta method's standard error; 0 where there is nothing to search.
        inside: Whether candidates ``[...]`` or ``[C, ...]`` lie in the set.
    """
    angles = np.linspace(0, np.pi / 2, GRID + 1)[1:-1]
    grid = angles.reshape(-1, *(1,) * np.ndim(ratio))
    ends = []
    for side in (-1, 1):

        def outside(angle: Array, side: int = side) -> NDArray[np.bool_]:
            return ~inside(ratio + side * unit * np.tan(angle))

        crossed = outside(grid)
        first = crossed.argmax(axis=0)
        high = angles[first]
        low = np.where(first == 0, 0.0, angles[np.maximum(first - 1, 0)])
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            out = outside(middle)
            low, high = np.where(out, low, middle), np.where(out, middle, high)
        end = ratio + side * unit * np.tan(low)
        # Without spread there is nothing to search: the set is the ratio itself.
        ends.append(np.where(unit == 0, ratio, np.where(crossed.any(axis=0), end, side * np.inf)))
    return ends[0], ends[1]


def corrected_ends(
    numerator: Array, denominator: Array, deviations: Array, weights: Array, q: float
) -> tuple[Array, Array]:
    """Ends of the set corrected for skewness; see `search_ends`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = numerator / denominator
        spread = deviations[..., 0, :] - ratio[..., None] * deviations[..., 1, :]
        unit = np.sqrt((weights * spread**2).sum(axis=-1)) / np.abs(denominator)

    def inside(candidate: Array) -> NDArray[np.bool_]:
        return np.abs(corrected_difference(candidate, numerator, denominator, deviations, weights)) <= q

    return search_ends(ratio, unit, inside)
