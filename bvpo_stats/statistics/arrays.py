"""Moments of per-example gradients that are all in memory: leave-one-prompt-out instead of delete-a-group.

Beyond `MAX_GROUPS` prompts, groups of prompts are left out: nothing is gained by more, and pairs of groups cost memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.interactions import u_centred
from bvpo_stats.statistics.summary import WHOLE, Array, GroupSums, MomentSummary, summarise

MAX_GROUPS = 256


def summary_of_arrays(
    vectors: Mapping[str, Float[np.ndarray, "*replicates examples parameters"]],
    *,
    clusters: Sequence[Hashable] | None = None,
    blocks: Mapping[str, slice] | None = None,
    trace2: Float[np.ndarray, "*replicates examples parameters"] | None = None,
) -> MomentSummary:
    """Summary of per-example gradients held in memory, every prompt (of up to 256) being its own jackknife group.

    Args:
        vectors: Member name to array ``[..., N, d]`` (``t``, ``e`` and, unless at the reference point, ``m``).
        clusters: Prompt of each of the N examples; None where each example is its own prompt. With clusters, no
            leading axes.
        blocks: Name to slice of the d parameters; None for one block.
        trace2: The trace gradient on a second, independent trace draw with the answers held fixed.

    Returns:
        The summary with ``G`` = number of prompts, up to 256; prompt i of more than that is in group ``i % 256``.

    Raises:
        UserError: Shapes differ, or fewer than three prompts.
    """
    named = {name: np.asarray(value, dtype=np.float64) for name, value in vectors.items()}
    shapes = {value.shape for value in named.values()} | ({np.shape(trace2)} if trace2 is not None else set())
    if len(shapes) != 1:
        raise UserError(f"per-example gradients must have one shape [examples, parameters], got {sorted(shapes)}.")
    labels, n_prompts = _cluster_labels(clusters, next(iter(shapes)))
    parts = []
    for block in [slice(None)] if blocks is None else blocks.values():
        origin = np.mean([value[..., block].mean(axis=-2) for value in named.values()], axis=0)
        shifted = [value[..., block] - origin[..., None, :] for value in named.values()]
        second = None if trace2 is None else np.asarray(trace2, dtype=np.float64)[..., block]
        halved = None if second is None else ((named["t"][..., block] - second) ** 2).sum(-1) / 2
        parts.append(_block_sums(shifted, origin, labels, halved, n_prompts))
    names = [WHOLE] if blocks is None else list(blocks)
    return summarise(_join_blocks(parts), list(named), names, n_prompts)


def _cluster_labels(clusters: Sequence[Hashable] | None, shape: tuple[int, ...]) -> tuple[NDArray | None, int]:
    if clusters is None:
        return None, shape[-2]
    if len(clusters) != shape[-2] or len(shape) != 2:
        raise UserError(
            f"clusters must name the prompt of each of the {shape[-2]} examples, got {len(clusters)} names."
        )
    index: dict[Hashable, int] = {}
    labels = np.array([index.setdefault(c, len(index)) for c in clusters])
    return (None if len(index) == len(labels) else labels), len(index)


def _block_sums(
    shifted: list[Array], origin: Array, labels: NDArray | None, halved: Array | None, n_prompts: int
) -> GroupSums:
    """Group scalars of one parameter block; ``shifted`` are the members less the origin."""
    p, lead = len(shifted), shifted[0].shape[:-1]
    counts = np.ones(lead) if labels is None else np.bincount(labels).astype(np.float64)
    sums = shifted if labels is None else [_sum_by_label(x, labels, n_prompts) for x in shifted]
    totals = [x.sum(axis=-2) for x in sums]
    cross, own, diagonal = (np.empty((*sums[0].shape[:-1], p, p)) for _ in range(3))
    total = np.empty((*totals[0].shape[:-1], p, p))
    for a, b in product(range(p), repeat=2):
        cross[..., a, b] = np.matmul(sums[a], totals[b][..., None])[..., 0]
        if b < a:
            continue
        total[..., a, b] = total[..., b, a] = (totals[a] * totals[b]).sum(-1)
        own[..., a, b] = own[..., b, a] = np.einsum("...nd,...nd->...n", sums[a], sums[b])
        if labels is None:
            products = own[..., a, b]
        else:
            products = np.bincount(labels, np.einsum("nd,nd->n", shifted[a], shifted[b]))
        diagonal[..., a, b] = diagonal[..., b, a] = products
    dotted = np.stack([np.matmul(x, origin[..., None])[..., 0] for x in sums], axis=-1)
    repeated = counts > 1
    spread = (diagonal - own / counts[..., None, None]) / np.maximum(counts - 1, 1)[..., None, None]
    if halved is not None and labels is not None:
        halved = np.bincount(labels, halved).astype(np.float64)
    whole = _Grouping.of(n_prompts)
    sizes, means = whole.add(counts, -1), [whole.add(x, -2) for x in sums]
    grouped_own = own if whole.trivial else _products(means)
    interactions = group_interactions([x / sizes[..., None] for x in means])
    return GroupSums(
        sizes=sizes,
        squares=whole.add(counts**2, -1),
        total=total[..., None, :, :],
        cross=whole.add(cross, -3)[..., None, :, :],
        own=grouped_own[..., None, :, :],
        diagonal=whole.add(diagonal, -3)[..., None, :, :],
        within=whole.add(own, -3)[..., None, :, :],
        origin_dot_sum=whole.add(dotted, -2)[..., None, :],
        origin_dot_weighted=whole.add(counts[..., None] * dotted, -2)[..., None, :],
        origin_square=(origin**2).sum(-1)[..., None],
        trace_draws=None if halved is None else (sizes, whole.add(halved, -1)[..., None]),
        repeats=(
            whole.add(repeated.astype(np.float64), -1),
            whole.add(spread * repeated[..., None, None], -3)[..., None, :, :],
        ),
        interactions=None if interactions is None else interactions[..., None, :, :],
    )


@dataclass(frozen=True)
class _Grouping:
    """Prompts into at most `MAX_GROUPS` jackknife groups.

    Attributes:
        indicator: ``[groups, prompts]``; None where every prompt is its own group.
    """

    indicator: Array | None

    @classmethod
    def of(cls, n_prompts: int) -> _Grouping:
        if n_prompts <= MAX_GROUPS:
            return cls(None)
        return cls((np.arange(n_prompts) % MAX_GROUPS == np.arange(MAX_GROUPS)[:, None]).astype(np.float64))

    @property
    def trivial(self) -> bool:
        return self.indicator is None

    def add(self, x: Array, axis: int) -> Array:
        """Sums over the prompts of each group along an axis."""
        if self.indicator is None:
            return x
        return np.moveaxis(np.tensordot(np.moveaxis(x, axis, -1), self.indicator.T, axes=1), -1, axis)


def _products(vectors: list[Array]) -> Array:
    """``x_a . x_b`` of each row: ``p`` times ``[..., n, d]`` to ``[..., n, p, p]``."""
    return np.stack([np.stack([(x * y).sum(axis=-1) for y in vectors], axis=-1) for x in vectors], axis=-2)


def group_interactions(means: Sequence[Array]) -> Array | None:
    """Interactions of all pairs of members from their group means: p times ``[..., G, d]`` to ``[..., I, p, p]``.

    The kernel of ``U_ab`` is ``(a_g . b_h + b_g . a_h) / 2``. None for fewer than four groups.
    """
    p, n_groups = len(means), means[0].shape[-2]
    if n_groups < 4:
        return None
    # In memory pairs come last, so that every statistic made of this reads its members in one piece.
    out = np.empty((*means[0].shape[:-2], p, p, n_groups * (n_groups - 1) // 2))
    for a, b in combinations_with_replacement(range(p), 2):
        gram = np.matmul(means[a], np.swapaxes(means[b], -1, -2))
        symmetric = gram if a == b else (gram + np.swapaxes(gram, -1, -2)) / 2
        out[..., a, b, :] = out[..., b, a, :] = u_centred(symmetric)
    return np.moveaxis(out, -1, -3)


def _sum_by_label(x: Array, labels: NDArray, n_labels: int) -> Array:
    sums = np.zeros((n_labels, x.shape[-1]))
    np.add.at(sums, labels, x)
    return sums


def _join_blocks(parts: list[GroupSums]) -> GroupSums:
    """Concatenate the block axis of parts that share their counts."""
    axis = {"total": -3, "cross": -3, "own": -3, "diagonal": -3, "within": -3}
    axis |= {} if parts[0].interactions is None else {"interactions": -3}
    axis |= {"origin_dot_sum": -2, "origin_dot_weighted": -2, "origin_square": -1}
    joined = {name: np.concatenate([getattr(part, name) for part in parts], axis=k) for name, k in axis.items()}
    draws = [part.trace_draws for part in parts if part.trace_draws is not None]
    repeats = [part.repeats for part in parts if part.repeats is not None]
    return GroupSums(
        sizes=parts[0].sizes,
        squares=parts[0].squares,
        trace_draws=(draws[0][0], np.concatenate([d[1] for d in draws], axis=-1)) if draws else None,
        repeats=(repeats[0][0], np.concatenate([r[1] for r in repeats], axis=-3)) if repeats else None,
        **joined,
    )
