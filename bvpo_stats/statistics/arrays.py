"""Moments of per-example gradients that are all in memory: leave-one-prompt-out instead of delete-a-group."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import product

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.summary import WHOLE, Array, GroupSums, MomentSummary, summarise


def summary_of_arrays(
    vectors: Mapping[str, Float[np.ndarray, "*replicates examples parameters"]],
    *,
    clusters: Sequence[Hashable] | None = None,
    blocks: Mapping[str, slice] | None = None,
    trace2: Float[np.ndarray, "*replicates examples parameters"] | None = None,
) -> MomentSummary:
    """Summary of per-example gradients held in memory, every prompt being its own jackknife group.

    Args:
        vectors: Member name to array ``[..., N, d]`` (``t``, ``e`` and, unless at the reference point, ``m``).
        clusters: Prompt of each of the N examples; None where each example is its own prompt. With clusters, no
            leading axes.
        blocks: Name to slice of the d parameters; None for one block.
        trace2: The trace gradient on a second, independent trace draw with the answers held fixed.

    Returns:
        The summary with ``G`` = number of prompts.

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
    """Group scalars of one parameter block, each prompt a group; ``shifted`` are the members less the origin."""
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
    return GroupSums(
        sizes=counts,
        squares=counts**2,
        total=total[..., None, :, :],
        cross=cross[..., None, :, :],
        own=own[..., None, :, :],
        diagonal=diagonal[..., None, :, :],
        within=own[..., None, :, :],
        origin_dot_sum=dotted[..., None, :],
        origin_dot_weighted=(counts[..., None] * dotted)[..., None, :],
        origin_square=(origin**2).sum(-1)[..., None],
        trace_draws=None if halved is None else (counts, halved[..., None]),
        repeats=(repeated.astype(np.float64), (spread * repeated[..., None, None])[..., None, :, :]),
    )


def _sum_by_label(x: Array, labels: NDArray, n_labels: int) -> Array:
    sums = np.zeros((n_labels, x.shape[-1]))
    np.add.at(sums, labels, x)
    return sums


def _join_blocks(parts: list[GroupSums]) -> GroupSums:
    """Concatenate the block axis of parts that share their counts."""
    axis = {"total": -3, "cross": -3, "own": -3, "diagonal": -3, "within": -3}
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
