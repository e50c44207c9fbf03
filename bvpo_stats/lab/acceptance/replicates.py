"""Thousands of replicate samples from a finite population, by index arithmetic on its Gram matrices.

A coverage study asks for 2,000 samples of N examples each. With a finite population of vectors ``a_j`` (one row per
outcome, with a probability) every U-statistic of a sample follows from inner products within the population alone:

    S_a . S_b = n' G_ab n,     S_b . a_i = (G_ab n)[index of i],     G_ab[j, k] = a_j . b_k,

n the vector of counts of the sample. The Gram matrices are formed once; a replicate never touches a gradient again.

Populations too large to list (pairs of traces of an enumerable language model) have few *atoms* (scores) instead: use
`isometric_coordinates` once to shorten the atoms, draw ``[R, N, rank]`` arrays, and call `summary_of_arrays` on them,
or `quick_ratios` where alpha is all that is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.calibration import u_centred
from bvpo_stats.statistics.estimates import LinearRatio
from bvpo_stats.statistics.moments import (
    WHOLE,
    Array,
    GroupSums,
    MomentSummary,
    group_labels,
    jackknife_groups,
    sketch,
    sketch_width,
    summarise,
)

Sample = dict[str, Array]


@dataclass(frozen=True)
class Population:
    """A finite population of examples, each a tuple of vectors, known by inner products.

    Attributes:
        members: Names of the p vectors of each outcome.
        probabilities: ``[P]``.
        grams: ``[p, p, P, P]``, ``grams[a, b, j, k] = a_j . b_k``.
        trace_half_squares: ``[P]``, ``norm(t1 - t2)^2 / 2`` of the outcome, where it holds a second trace draw.
    """

    members: tuple[str, ...]
    probabilities: Array
    grams: Array
    trace_half_squares: Array | None = None

    @classmethod
    def from_vectors(
        cls,
        vectors: Mapping[str, Float[np.ndarray, "outcomes parameters"]],
        probabilities: Float[np.ndarray, " outcomes"] | None = None,
        trace2: Float[np.ndarray, "outcomes parameters"] | None = None,
    ) -> Population:
        """Population of the rows of the given arrays, equally likely by default.

        Raises:
            UserError: Probabilities are negative or do not sum to one.
        """
        named = {name: np.asarray(value, dtype=np.float64) for name, value in vectors.items()}
        size = len(next(iter(named.values())))
        weights = np.full(size, 1 / size) if probabilities is None else np.asarray(probabilities, dtype=np.float64)
        if (weights < 0).any() or abs(weights.sum() - 1) > 1e-9:
            raise UserError("the probabilities of a population must be non-negative and sum to one.")
        grams = np.array([[x @ y.T for y in named.values()] for x in named.values()])
        halved = None if trace2 is None else ((named["t"] - trace2) ** 2).sum(axis=1) / 2
        return cls(tuple(named), weights, grams, halved)

    def exact(self) -> MomentSummary:
        """The population's own moments in row 0, so that `estimates` on it returns the truth.

        There are no jackknife groups: ``[1, 1, p, p]``. U is about the origin zero, hence absolute.
        """
        w = self.probabilities
        U = np.einsum("j,abjk,k->ab", w, self.grams, w)[None, None]
        M = np.einsum("j,abjj->ab", w, self.grams)[None, None]
        halved = self.trace_half_squares
        return MomentSummary(
            members=self.members,
            blocks=(WHOLE,),
            U=U,
            M=M,
            shift=np.zeros_like(U),
            group_sizes=np.zeros(0),
            n_examples=len(w),
            n_prompts=len(w),
            trace_sampling=None if halved is None else np.array([[w @ halved]]),
        )

    def draw(self, rng: np.random.Generator, replicates: int, size: int) -> Int[np.ndarray, "replicates size"]:
        """Indices of R independent samples of N independent outcomes."""
        return rng.choice(len(self.probabilities), size=(replicates, size), p=self.probabilities)

    def summaries(
        self, indices: Int[np.ndarray, "replicates size"], groups: Int[np.ndarray, " size"] | None = None
    ) -> MomentSummary:
        """Moments of every sample, with leading axis R.

        Args:
            indices: Outcomes drawn, ``[R, N]``.
            groups: Jackknife group ``0 .. G - 1`` of each of the N positions (none
                empty); None for leave-one-out.
        """
        labels = np.arange(indices.shape[1]) if groups is None else np.asarray(groups)
        indicator = np.eye(int(labels.max()) + 1)[labels]
        sizes = np.broadcast_to(indicator.sum(axis=0), (len(indices), indicator.shape[1]))
        p = len(self.members)
        shape = (*sizes.shape, 1, p, p)
        cross, own, diagonal = np.empty(shape), np.empty(shape), np.empty(shape)
        total = np.empty((len(indices), 1, p, p))
        n_groups = sizes.shape[1]
        interactions = np.empty((len(indices), n_groups * (n_groups - 1) // 2, 1, p, p)) if n_groups >= 4 else None
        means = indicator / indicator.sum(axis=0)
        counts = _counts(indices, len(self.probabilities))
        for a, b in product(range(p), repeat=2):
            gram = self.grams[a, b]
            per_example = np.take_along_axis(counts @ gram.T, indices, axis=1)
            cross[..., 0, a, b] = per_example @ indicator
            total[..., 0, a, b] = per_example.sum(axis=1)
            diagonal[..., 0, a, b] = np.diagonal(gram)[indices] @ indicator
            products = means.T @ gram[indices[:, :, None], indices[:, None, :]] @ means
            own[..., 0, a, b] = np.diagonal(products, axis1=1, axis2=2) * sizes**2
            if interactions is not None:
                interactions[..., 0, a, b] = u_centred((products + np.swapaxes(products, 1, 2)) / 2)
        halved = self.trace_half_squares
        sums = GroupSums.about_zero(
            sizes=sizes,
            squares=sizes,
            total=total,
            cross=cross,
            own=own,
            diagonal=diagonal,
            within=diagonal,
            trace_draws=None if halved is None else (sizes, (halved[indices] @ indicator)[..., None]),
            interactions=interactions,
        )
        return summarise(sums, self.members, (WHOLE,), indices.shape[1])

    def replicate(
        self, rng: np.random.Generator, replicates: int, size: int, *, groups: int | None = None, chunk: int = 250
    ) -> Iterator[MomentSummary]:
        """Draw and summarise R samples of N, ``chunk`` at a time to bound memory.

        Args:
            rng: Source of randomness.
            replicates: Number of samples, R.
            size: Examples per sample, N.
            groups: Jackknife groups, prompts being named "0", "1", ...; None for leave-one-out.
            chunk: Samples per summary.
        """
        labels = group_labels(range(size), groups)
        for start in range(0, replicates, chunk):
            yield self.summaries(self.draw(rng, min(chunk, replicates - start), size), labels)


def _counts(indices: NDArray[Any], outcomes: int) -> Array:
    """How often each outcome was drawn: ``[R, N] -> [R, P]``."""
    flat = (indices + outcomes * np.arange(len(indices))[:, None]).ravel()
    return np.bincount(flat, minlength=outcomes * len(indices)).reshape(len(indices), outcomes).astype(np.float64)


def isometric_coordinates(
    atoms: Float[np.ndarray, "atoms parameters"], tolerance: float = 1e-13
) -> Float[np.ndarray, "atoms rank"]:
    """Coordinates of the atoms in an orthonormal basis of their span: same inner products, fewer columns.

    Every gradient that is a linear combination of atoms has, with the same coefficients in these coordinates, the same
    inner products, hence the same U-statistics; only the rank matters for the cost of a replicate.

    >>> atoms = np.ones((3, 1000)) * np.array([[1.0], [2.0], [3.0]])
    >>> short = isometric_coordinates(atoms)
    >>> short.shape, bool(np.allclose(short @ short.T, atoms @ atoms.T))
    ((3, 1), True)
    """
    left, singular, _ = np.linalg.svd(np.asarray(atoms, dtype=np.float64), full_matrices=False)
    keep = singular > tolerance * singular[0]
    return left[:, keep] * singular[keep]


def quick_ratios(vectors: Sample, taus: Sequence[float], *, injected: bool = False) -> list[LinearRatio]:
    """`LinearRatio.alpha` of `summary_of_arrays`, for one pair a prompt, in the few products that alpha has.

    With h = t - e, mean products D and covariances C = D - U of the members,

        B = U[h, m - e] - tau C[h, e],     A = U[h, h] + tau C[h, h].

    Args:
        vectors: t, e and m, ``[R, N, d]``; t stands for m where there is none, as at the reference point.
        taus: eta L / B.
        injected: V-statistics in the place of U-statistics, without interactions; single prompts only.
    """
    members, vectors = len(vectors), {"m": vectors["t"], **vectors}
    origin = np.mean([x.mean(axis=-2, keepdims=True) for x in vectors.values()], axis=0)
    e, m = (vectors[name] - origin for name in ("e", "m"))
    h = vectors["t"] - vectors["e"]
    n, d = h.shape[-2:]
    groups = jackknife_groups(n, d, members)
    parts = {name: np.einsum("...nd,...nd->...n", h, x) for name, x in (("e", e), ("m", m), ("h", h))}
    sizes, labels = np.ones(n), group_labels(range(n), groups)
    alone: list[LinearRatio] | list[None] = [None] * len(taus)
    if groups is not None:
        if d > sketch_width(1):  # sketches are of the vectors themselves, about zero
            raw = {name: np.einsum("...nd,...nd->...n", h, vectors[name]) for name in ("e", "m")} | {"h": parts["h"]}
            short_h, short_e, short_m = (sketch(x, sketch_width(1)) for x in (h, vectors["e"], vectors["m"]))
            alone = _weights(short_h, short_e, short_m, raw, sizes, taus)
        else:
            alone = _weights(h, e, m, parts, sizes, taus)
        sizes = np.bincount(labels).astype(np.float64)
        first = np.argsort(labels, kind="stable")
        starts = np.concatenate([[0], np.cumsum(sizes.astype(int))[:-1]])
        h, e, m = (np.add.reduceat(x[..., first, :], starts, axis=-2) for x in (h, e, m))
        parts_of = {name: np.add.reduceat(x[..., first], starts, axis=-1) for name, x in parts.items()}
    else:
        parts_of = parts
    found = _weights(h, e, m, parts_of, sizes, taus, injected)
    means = [x / sizes[:, None] for x in (h, e, m)]
    grams = [np.matmul(means[0], np.swapaxes(x, -1, -2)) for x in means]
    r_h, r_e, r_m = (u_centred((x + np.swapaxes(x, -1, -2)) / 2) for x in grams)
    norms = parts["h"]
    return [
        replace(
            ratio,
            group_sizes=np.broadcast_to(sizes, (len(h), len(sizes))),
            interactions=(r_m - (1 - tau) * r_e, (1 - tau) * r_h),
            alone=single,
            norms=norms,
        )
        for ratio, single, tau in zip(found, alone, taus, strict=True)
    ]


def _weights(
    h: Array,
    e: Array,
    m: Array,
    parts: Sample,
    sizes: Array,
    taus: Sequence[float],
    injected: bool = False,
) -> list[LinearRatio]:
    """B and A with every group left out, from sums of the groups, ``[R, G, d]``, and their parts of D, ``[R, G]``."""
    n = sizes.sum()
    left = np.concatenate([[n], n - sizes])
    total = h.sum(axis=-2)
    U, D = {}, {}
    for name, x in (("e", e), ("m", m), ("h", h)):
        whole = x.sum(axis=-2)
        crossed = np.matmul(h, whole[..., None])[..., 0] + np.matmul(x, total[..., None])[..., 0]
        own = np.einsum("...nd,...nd->...n", h, x)
        both = np.einsum("...d,...d->...", total, whole)[..., None]
        products = np.concatenate([both, both - crossed + own], axis=-1)
        each = parts[name].sum(axis=-1, keepdims=True)
        diagonal = np.concatenate([each, each - parts[name]], axis=-1)
        alone = np.concatenate([own.sum(axis=-1, keepdims=True), own.sum(axis=-1, keepdims=True) - own], axis=-1)
        within = alone if (sizes == 1).all() else diagonal  # of sketches, their own
        D[name], U[name] = diagonal / left, (products - within) / (left * (left - 1))
        if injected:
            U[name] = products / left**2
    return [
        LinearRatio(
            U["m"] - U["e"] - tau * (D["e"] - U["e"]),
            U["h"] + tau * (D["h"] - U["h"]),
            np.broadcast_to(sizes, (len(h), len(sizes))),
        )
        for tau in taus
    ]
