"""Moments of one jackknife group about its own mean: how two of them merge, and what they are about another origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.statistics.summary import Array


@dataclass(frozen=True)
class GroupMoments:
    """Moments of the examples of one jackknife group about their own mean.

    With ``S^c`` and ``n_c`` the sum and number of examples of prompt c, ``mean`` the group's mean vectors:

    Attributes:
        size: Examples, ``n``.
        squares: ``q = sum_c n_c^2``.
        prompts: Prompts.
        means: Per block ``[p, d]``.
        uneven: Per block ``[p, d]``, ``R = sum_c n_c (S^c - n_c mean)``; None while it is zero by construction, that
            is as long as every prompt has one pair.
        scatter: ``[L, p, p]``, ``sum_i (a_i - mean_a) . (b_i - mean_b)``.
        within: ``[L, p, p]``, ``sum_c (S_a^c - n_c mean_a) . (S_b^c - n_c mean_b)``.
        trace_draws: Examples with a second trace draw, and ``[L]`` sum of ``norm(t1 - t2)^2 / 2``.
        repeats: Prompts with two pairs or more, and ``[L, p, p]`` sum of their own unbiased covariances.
    """

    size: float
    squares: float
    prompts: int
    means: tuple[Array, ...]
    uneven: tuple[Array, ...] | None
    scatter: Array
    within: Array
    trace_draws: tuple[float, Array]
    repeats: tuple[float, Array]

    def to_arrays(self) -> dict[str, NDArray]:
        """Plain arrays, exact."""
        counts = [self.size, self.squares, self.prompts, self.trace_draws[0], self.repeats[0]]
        arrays: dict[str, NDArray] = {
            "counts": np.array(counts, dtype=np.float64),
            "scatter": self.scatter,
            "within": self.within,
            "trace_draws": self.trace_draws[1],
            "repeats": self.repeats[1],
        }
        arrays |= {f"mean{k}": mean for k, mean in enumerate(self.means)}
        return arrays | {f"uneven{k}": r for k, r in enumerate(self.uneven or ())}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray], blocks: int) -> GroupMoments:
        """Read what `to_arrays` wrote for that number of parameter blocks."""
        size, squares, prompts, draws, repeats = (float(x) for x in arrays["counts"])
        return cls(
            size=size,
            squares=squares,
            prompts=round(prompts),
            means=tuple(arrays[f"mean{k}"] for k in range(blocks)),
            uneven=tuple(arrays[f"uneven{k}"] for k in range(blocks)) if "uneven0" in arrays else None,
            scatter=arrays["scatter"],
            within=arrays["within"],
            trace_draws=(draws, arrays["trace_draws"]),
            repeats=(repeats, arrays["repeats"]),
        )


def gram(x: Array, y: Array) -> Array:
    """Inner products of every member of x with every member of y: ``[p, d], [p, d] -> [p, p]``."""
    return x @ y.T


def _recentre(group: GroupMoments, centres: Sequence[Array]) -> tuple[Array, Array, list[Array]]:
    """``D``, ``W`` (each ``[L, p, p]``) and the displacements ``mean - centre`` about new centres.

    D' = D + n u.u and W' = W + u.R + R.u + q u.u with u = mean - centre.
    """
    moves = [mean - centre for mean, centre in zip(group.means, centres, strict=True)]
    squares = np.stack([gram(u, u) for u in moves])
    within = group.within + group.squares * squares
    if group.uneven is not None:
        mixed = np.stack([gram(u, r) for u, r in zip(moves, group.uneven, strict=True)])
        within = within + mixed + np.swapaxes(mixed, -1, -2)
    return group.scatter + group.size * squares, within, moves


def merge_groups(first: GroupMoments | None, second: GroupMoments | None) -> GroupMoments | None:
    """Moments of the union of two disjoint sets of prompts (Chan, Golub and LeVeque's parallel update).

    With delta the difference of the means, the common mean lies ``-f delta`` from the first and ``(1 - f) delta``
    from the second, f the second's share of the examples.
    """
    if first is None or second is None:
        return second if first is None else first
    size = first.size + second.size
    f = second.size / size
    delta = [y - x for x, y in zip(first.means, second.means, strict=True)]
    squares = np.stack([gram(u, u) for u in delta])
    within = first.within + second.within + (first.squares * f**2 + second.squares * (1 - f) ** 2) * squares
    for group, move in ((first, -f), (second, 1 - f)):
        if group.uneven is not None:
            mixed = move * np.stack([gram(u, r) for u, r in zip(delta, group.uneven, strict=True)])
            within = within + mixed + np.swapaxes(mixed, -1, -2)
    uneven: tuple[Array, ...] | None = None
    if first.uneven is not None or second.uneven is not None:
        slope = second.squares * (1 - f) - first.squares * f
        uneven = tuple(r1 + r2 + slope * u for r1, r2, u in zip(_dense(first), _dense(second), delta, strict=True))
    return GroupMoments(
        size=size,
        squares=first.squares + second.squares,
        prompts=first.prompts + second.prompts,
        means=tuple(x + f * u for x, u in zip(first.means, delta, strict=True)),
        uneven=uneven,
        scatter=first.scatter + second.scatter + (size * f * (1 - f)) * squares,
        within=within,
        trace_draws=(first.trace_draws[0] + second.trace_draws[0], first.trace_draws[1] + second.trace_draws[1]),
        repeats=(first.repeats[0] + second.repeats[0], first.repeats[1] + second.repeats[1]),
    )


def _dense(group: GroupMoments) -> Sequence[Array | float]:
    return [0.0] * len(group.means) if group.uneven is None else group.uneven


def prompt_moments(vectors: Sequence[Sequence[NDArray]], halved: Array | None) -> GroupMoments:
    """Moments of the n >= 2 pairs of one prompt; ``vectors`` per block and member ``[n, d]``, ``halved`` ``[n, L]``."""
    blocks = [np.stack(block, dtype=np.float64) for block in vectors]
    members, n = blocks[0].shape[:2]
    means = tuple(x.mean(axis=1) for x in blocks)
    spread = [(x - mean[:, None, :]).reshape(members, -1) for x, mean in zip(blocks, means, strict=True)]
    scatter = np.stack([gram(x, x) for x in spread])
    return GroupMoments(
        size=float(n),
        squares=float(n * n),
        prompts=1,
        means=means,
        # About its own mean a single prompt has S^c - n_c mean = 0.
        uneven=tuple(np.zeros_like(mean) for mean in means),
        scatter=scatter,
        within=np.zeros_like(scatter),
        trace_draws=(0.0, np.zeros(len(blocks))) if halved is None else (float(n), halved.sum(axis=0)),
        repeats=(1.0, scatter / (n - 1)),
    )


def add_singles(group: GroupMoments | None, vectors: Sequence[Sequence[NDArray]], halved: Array | None) -> GroupMoments:
    """Adds n prompts with one pair each; ``vectors`` per block and member ``[n, d]``, ``halved`` ``[n, L]``.

    The same as merging them one by one, in one pass over the vectors. With ``delta = x - mean`` about the old mean,
    ``s = sum delta`` and N examples before,

        mean' = mean + s / (N + n),    scatter' = scatter + sum delta.delta - s.s / (N + n).
    """
    members, n = len(vectors[0]), len(vectors[0][0])
    if group is None:  # any point near the examples will do to count from
        zero = np.zeros((len(vectors), members, members))
        starts = tuple(np.stack([x[0] for x in block], dtype=np.float64) for block in vectors)
        group = GroupMoments(0.0, 0.0, 0, starts, None, zero, zero, (0.0, np.zeros(len(vectors))), (0.0, zero))
    size = group.size + n
    deltas = [np.empty((members, n, mean.shape[1])) for mean in group.means]
    for block, mean, delta in zip(vectors, group.means, deltas, strict=True):
        for x, centre, out in zip(block, mean, delta, strict=True):
            np.subtract(x, centre, out=out)
    sums = [delta.sum(axis=1) for delta in deltas]
    own = np.stack([gram(x, x) for x in (delta.reshape(members, -1) for delta in deltas)])
    squares = np.stack([gram(s, s) for s in sums])
    within = group.within + own + ((group.squares + n) / size - 2) / size * squares
    uneven = group.uneven
    if uneven is not None:
        mixed = np.stack([gram(s, r) for s, r in zip(sums, uneven, strict=True)]) / size
        within = within - mixed - np.swapaxes(mixed, -1, -2)
        uneven = tuple(r + (1 - (group.squares + n) / size) * s for r, s in zip(uneven, sums, strict=True))
    draws = (0.0, 0.0) if halved is None else (float(n), halved.sum(axis=0))
    return GroupMoments(
        size=size,
        squares=group.squares + n,
        prompts=group.prompts + n,
        means=tuple(mean + s / size for mean, s in zip(group.means, sums, strict=True)),
        uneven=uneven,
        scatter=group.scatter + own - squares / size,
        within=within,
        trace_draws=(group.trace_draws[0] + draws[0], group.trace_draws[1] + draws[1]),
        repeats=group.repeats,
    )


def group_scalars(
    group: GroupMoments, origin: list[Array], centres: list[Array], total: list[Array]
) -> tuple[Array, ...]:
    """``S^g.S, S^g.S^g, D, W, o.S^g, o.Q^g`` of one group about the origin; Q^g = sum_c n_c S^c = R + q (mean - o)."""
    diagonal, within, moves = _recentre(group, centres)
    sums = [group.size * u for u in moves]
    weighted = [group.squares * u + r for u, r in zip(moves, _dense(group), strict=True)]
    return (
        np.stack([gram(s, whole) for s, whole in zip(sums, total, strict=True)]),
        np.stack([gram(s, s) for s in sums]),
        diagonal,
        within,
        np.stack([s @ o for s, o in zip(sums, origin, strict=True)]),
        np.stack([q @ o for q, o in zip(weighted, origin, strict=True)]),
    )
