"""Unbiased second moments of per-example gradients, streamed or from arrays, with every leave-one-group-out value.

Write ``a, b`` for two *members* (``t``: trace gradient, ``e``: empty-trace gradient, ``m``: marginal gradient). From
the sums ``S_a = sum_i a_i``, the per-prompt sums ``S_a^c`` and ``D_ab = sum_i a_i . b_i`` over N examples of which
prompt c holds ``n_c``,

    U_ab = (S_a . S_b - sum_c S_a^c . S_b^c) / (N^2 - sum_c n_c^2)      E U_ab = E[a] . E[b]
    M_ab = D_ab / N                                                     E M_ab = E[a . b]
    C_ab = M_ab - U_ab                                                  E C_ab = tr Cov(a, b)

U is a U-statistic: products inside one prompt are left out, so it stays exactly unbiased when members of the same
prompt share traces. Everything the package prints is a linear combination of these numbers, or a ratio of two.

**Cancellation.** All sums are kept about an ``origin`` common to all members. A common shift of every vector changes no
bias, no covariance, neither A nor B of Theorem 2, so those are formed from ``U`` and ``M`` *about the origin*, and a
large common mean cannot eat their digits. ``shift`` turns both into their absolute values (``U + shift``,
``M + shift``) for the few quantities that need them, such as ``norm(mu)^2``. (Where prompts hold unequal numbers of
pairs, U and M imply slightly different means; M carries that difference, so that both stay what the formulas say.)

**Streaming.** One pass, no memory growth with examples, any order, any partition. Each of G jackknife groups keeps the
mean vector of every member and scalars about that mean; adding examples and merging two accumulators are the same
operation, the parallel update of Chan, Golub and LeVeque (1983), in float64. Memory is
``p G d`` float64 numbers for p members and d parameters (twice that once a prompt with several pairs has been seen).

**Single prompts behind groups.** How many prompts an estimate rests on cannot be seen from twenty groups. So where
groups hold several prompts, each prompt leaves its exact inner products and a sketch of its sums (`sketch`), 8 p (256 +
p) bytes for p members (a little more where there are more than 64 blocks), from which `MomentSummary.prompts` follows.
Sketches are linear and kept by the prompt's id, so they do not depend on order, batches or processes either.

The group of a prompt is the prompt itself, or a hash of its id (`jackknife_groups` says which), so it does not depend
on order, on batches or on which process saw it.

Contract: **all pairs of one prompt come in one** `Moments.update`, **once**. Products inside a prompt are left out of
the U-statistics, which only the update that sees them together can do; a prompt counted twice puts the diagonal back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import combinations_with_replacement, product
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from bvpo_stats.errors import UserError, check_kind, check_whole, rows_of
from bvpo_stats.statistics.calibration import Array as Array
from bvpo_stats.statistics.calibration import u_centred

MEMBERS = ("t", "e", "m")
WHOLE = "all"
"""Name of the only parameter block where vectors are not cut into blocks."""


DEFAULT_GROUPS = 20
MOST_SINGLE_PROMPTS = 256
"""Up to so many prompts each is left out alone: small samples need every degree of freedom. Beyond, Student's t is
normal to a percent, and pairs of groups, of which the interactions are made, cost memory."""
SINGLE_PROMPT_BYTES = 256 * 2**20
"""... as long as their sums take no more than this: a sum per prompt must fit beside the model that gives gradients."""

Grouping = int | Literal["auto"] | None
"""Jackknife groups asked for: a number, None for every prompt alone, or by the rule of `jackknife_groups`."""


def jackknife_groups(n_prompts: int, n_parameters: int, n_members: int, asked: Grouping = "auto") -> int | None:
    """The one rule of what the jackknife leaves out: single prompts (None), or so many groups of prompts.

    All of it is known before a pass, so that arrays, streams, processes and resumed runs agree.

    Args:
        n_prompts: N.
        n_parameters: d.
        n_members: Vectors of each example: t, e and perhaps m.
        asked: What was asked for, if anything.

    >>> jackknife_groups(256, 1000, 3), jackknife_groups(257, 1000, 3), jackknife_groups(100, 10**7, 3)
    (None, 20, 20)
    """
    if asked != "auto":
        return asked
    alone = n_prompts <= MOST_SINGLE_PROMPTS and n_prompts * n_members * n_parameters * 8 <= SINGLE_PROMPT_BYTES
    return None if alone else DEFAULT_GROUPS


def group_of(prompt: Hashable, groups: int = DEFAULT_GROUPS) -> int:
    """Jackknife group of a prompt id: a hash of its text, the same in every process and in every run.

    >>> [group_of(f"question-{i}") for i in range(5)]
    [0, 14, 18, 7, 14]
    """
    digest = hashlib.blake2b(str(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % groups


def group_labels(prompts: Sequence[Hashable], groups: int | None) -> Int[np.ndarray, " prompts"]:
    """Group ``0 .. G - 1`` of different prompts, groups without any left out; None: each is its own.

    >>> group_labels(["a", "b", "c", "d"], 20).tolist(), group_labels(["a", "b", "c", "d"], None).tolist()
    ([0, 1, 2, 2], [0, 1, 2, 3])
    """
    if groups is None:
        return np.arange(len(prompts))
    return np.unique([group_of(prompt, groups) for prompt in prompts], return_inverse=True)[1].reshape(-1)


@dataclass(frozen=True)
class MomentSummary:
    """U, M and shift over the whole sample and with each jackknife group left out; ``p`` members, ``L`` blocks.

    Leading axes (``...``) are replicates of a simulation, if any. Row 0 of the axis ``1 + G`` is the whole sample, row
    ``1 + g`` the sample without group g.

    Attributes:
        members: Names of the p members.
        blocks: Names of the L parameter blocks; a total is the sum over blocks.
        U: ``[..., 1 + G, L, p, p]``, about the origin.
        M: ``[..., 1 + G, L, p, p]``, about the origin.
        shift: ``[..., 1 + G, L, p, p]``, what both U and M lack to their absolute values.
        group_sizes: ``[..., G]``, examples in each jackknife group (only groups that hold any).
        n_examples: Examples in all.
        n_prompts: Prompts (clusters) in all.
        trace_sampling: ``[..., 1 + G, L]``, mean of ``norm(t1 - t2)^2 / 2`` over examples with a second independent
            trace draw; None without such examples.
        within_prompt: ``[..., 1 + G, L, p, p]``, mean over the prompts with two pairs or more of their own unbiased
            covariance (trace), which estimates ``tr Cov(a, b | x)``; None without such prompts.
        interactions: ``[..., I, L, p, p]``, for the ``I = G (G - 1) / 2`` pairs of groups g < h (row by row of the
            upper triangle) the interaction of the two in U (see `bvpo_stats.statistics.calibration`); M has none.
            None where they were not kept, or for fewer than four groups.
        prompts: The same sample with single prompts left out instead of groups, where groups hold several: exact in M,
            from sketches in U (`sketch`). For the weight of single prompts only; else None.
        projection: Where gradients were seen through a random projection: the whole sample with each row of it left
            out instead of groups. Rows are independent draws with the same mean, so their spread is what the draw
            adds to the error of an estimate; else None.
    """

    members: tuple[str, ...]
    blocks: tuple[str, ...]
    U: Array
    M: Array
    shift: Array
    group_sizes: Array
    n_examples: int
    n_prompts: int
    trace_sampling: Array | None = None
    within_prompt: Array | None = None
    interactions: Array | None = None
    prompts: MomentSummary | None = None
    projection: MomentSummary | None = None

    @property
    def covariance(self) -> Array:
        """``tr Cov(a, b)``, unbiased: ``[..., 1 + G, L, p, p]``."""
        return self.M - self.U

    @property
    def n_groups(self) -> int:
        """Jackknife groups that hold examples."""
        return int(self.group_sizes.shape[-1])

    def index(self, member: str) -> int:
        """Position of a member; ``m`` falls back on ``t`` where the summary has no marginal gradient.

        That fallback is the reference-point estimator: at theta = theta_ref, with traces sampled at temperature 1,
        ``E g_t = mu`` exactly, so ``m_i := t_i``; U drops the diagonal, hence no bias comes of using t twice.
        """
        if member in self.members:
            return self.members.index(member)
        if member == "m" and "t" in self.members:
            return self.members.index("t")
        raise UserError(
            f"these moments hold no member {member!r}, only {', '.join(self.members)}; add it and run again."
        )

    @property
    def reference_point(self) -> bool:
        """Whether mu is taken to be ``E g_t`` because no marginal gradients were given."""
        return "m" not in self.members

    def block(self, name: str) -> MomentSummary:
        """The same summary restricted to one parameter block."""
        keep = [self.blocks.index(name)]
        return MomentSummary(
            members=self.members,
            blocks=(name,),
            U=self.U[..., keep, :, :],
            M=self.M[..., keep, :, :],
            shift=self.shift[..., keep, :, :],
            group_sizes=self.group_sizes,
            n_examples=self.n_examples,
            n_prompts=self.n_prompts,
            trace_sampling=None if self.trace_sampling is None else self.trace_sampling[..., keep],
            within_prompt=None if self.within_prompt is None else self.within_prompt[..., keep, :, :],
            interactions=None if self.interactions is None else self.interactions[..., keep, :, :],
            prompts=None if self.prompts is None else self.prompts.block(name),
            projection=None if self.projection is None else self.projection.block(name),
        )

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Plain arrays for ``numpy.savez``; `from_arrays` reads them back."""
        own = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        arrays: dict[str, NDArray[Any]] = {}
        for name, value in own.items():
            if isinstance(value, MomentSummary):
                arrays |= {f"{name}/{key}": part for key, part in value.to_arrays().items()}
            else:
                arrays[name] = np.asarray(value)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> MomentSummary:
        """Read what `to_arrays` wrote."""
        names = ("trace_sampling", "within_prompt", "interactions")
        optional: dict[str, Any] = {name: np.asarray(arrays[name]) for name in names if name in arrays}
        for name in ("prompts", "projection"):
            part = {key.partition("/")[2]: arrays[key] for key in arrays if key.startswith(f"{name}/")}
            if part:
                optional[name] = cls.from_arrays(part)
        return cls(
            members=tuple(str(s) for s in arrays["members"]),
            blocks=tuple(str(s) for s in arrays["blocks"]),
            U=np.asarray(arrays["U"]),
            M=np.asarray(arrays["M"]),
            shift=np.asarray(arrays["shift"]),
            group_sizes=np.asarray(arrays["group_sizes"]),
            n_examples=int(arrays["n_examples"]),
            n_prompts=int(arrays["n_prompts"]),
            **optional,
        )


@dataclass(frozen=True)
class GroupSums:
    """What `summarise` needs of each jackknife group: scalars only, all about one origin ``o``.

    Attributes:
        sizes: ``[..., G]``, examples.
        squares: ``[..., G]``, ``sum_c n_c^2``.
        total: ``[..., L, p, p]``, ``S_a . S_b`` of the whole sample.
        cross: ``[..., G, L, p, p]``, ``S_a^g . S_b``.
        own: ``[..., G, L, p, p]``, ``S_a^g . S_b^g``.
        diagonal: ``[..., G, L, p, p]``, ``D_ab`` of the group.
        within: ``[..., G, L, p, p]``, ``sum_c S_a^c . S_b^c`` of the group.
        origin_dot_sum: ``[..., G, L, p]``, ``o . S_a^g``.
        origin_dot_weighted: ``[..., G, L, p]``, ``o . sum_c n_c S_a^c``.
        origin_square: ``[..., L]``, ``o . o``.
        trace_draws: ``([..., G], [..., G, L])``, examples with a second trace draw, sum of ``norm(t1 - t2)^2 / 2``.
        repeats: ``([..., G], [..., G, L, p, p])``, prompts with two pairs or more, sum of their own covariances.
        interactions: ``[..., I, L, p, p]``, as in `MomentSummary`.
    """

    sizes: Array
    squares: Array
    total: Array
    cross: Array
    own: Array
    diagonal: Array
    within: Array
    origin_dot_sum: Array
    origin_dot_weighted: Array
    origin_square: Array
    trace_draws: tuple[Array, Array] | None = None
    repeats: tuple[Array, Array] | None = None
    interactions: Array | None = None

    @classmethod
    def about_zero(cls, **parts: Any) -> GroupSums:
        """Sums that were taken about the origin 0; ``parts`` are all other attributes."""
        cross = parts["cross"]
        dots = np.zeros(cross.shape[:-1])
        return cls(
            **parts,
            origin_dot_sum=dots,
            origin_dot_weighted=dots,
            origin_square=np.zeros((*cross.shape[:-4], cross.shape[-3])),
        )


def _leave_out(per_group: Array, axis: int) -> Array:
    """Sums over all groups, then over all but each: ``G`` becomes ``1 + G`` along ``axis``."""
    total = per_group.sum(axis=axis, keepdims=True)
    return np.concatenate([total, total - per_group], axis=axis)


def _mean_without(pair: tuple[Array, Array], trailing: int) -> Array | None:
    """Ratio (sum of values) / (count) over the sample and without each group; None where nothing was counted."""
    counts, sums = pair
    if not np.any(counts):
        return None
    denominator = _leave_out(counts, -1)
    denominator = denominator.reshape(denominator.shape + (1,) * trailing)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _leave_out(sums, -1 - trailing) / denominator


def summarise(sums: GroupSums, members: Sequence[str], blocks: Sequence[str], n_prompts: int) -> MomentSummary:
    """Turn group scalars into U, M and shift with every leave-one-group-out value.

    Without group g, ``S_a . S_b`` becomes ``S_a.S_b - S_a^g.S_b - S_a.S_b^g + S_a^g.S_b^g``; all else is additive.

    Raises:
        UserError: Fewer than three prompts or two groups hold examples, so that no jackknife exists.
    """
    if n_prompts < 3 or sums.sizes.shape[-1] < 2:
        raise UserError(
            f"{n_prompts} prompts in {sums.sizes.shape[-1]} jackknife groups are too few for an interval; "
            "give at least three prompts in two groups (and many more for a narrow interval)."
        )
    dropped = sums.total[..., None, :, :, :] - sums.cross - np.swapaxes(sums.cross, -1, -2) + sums.own
    products = np.concatenate([sums.total[..., None, :, :, :], dropped], axis=-4)
    size = _leave_out(sums.sizes, -1)[..., None]
    pairs = size**2 - _leave_out(sums.squares, -1)[..., None]
    size_m, pairs_m = size[..., None, None], pairs[..., None, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        U = (products - _leave_out(sums.within, -4)) / pairs_m
        centred = _leave_out(sums.diagonal, -4) / size_m
        origin_sum = _leave_out(sums.origin_dot_sum, -3)
        # Two estimates of o.E[a]: the mean that the U-statistic implies, and the plain mean over examples. They
        # differ only where prompts hold unequal numbers of pairs; their difference belongs to M.
        implied = (size[..., None] * origin_sum - _leave_out(sums.origin_dot_weighted, -3)) / pairs[..., None]
        excess = origin_sum / size[..., None] - implied
    return MomentSummary(
        members=tuple(members),
        blocks=tuple(blocks),
        U=U,
        M=centred + excess[..., :, None] + excess[..., None, :],
        shift=implied[..., :, None] + implied[..., None, :] + sums.origin_square[..., None, :, None, None],
        group_sizes=sums.sizes,
        n_examples=round(float(sums.sizes.reshape(-1, sums.sizes.shape[-1])[0].sum())),
        n_prompts=n_prompts,
        trace_sampling=None if sums.trace_draws is None else _mean_without(sums.trace_draws, 1),
        within_prompt=None if sums.repeats is None else _mean_without(sums.repeats, 3),
        interactions=sums.interactions,
    )


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
        drawn_prompts: Prompts with a second trace draw.
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
    drawn_prompts: float = 0.0

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Plain arrays, exact."""
        counts = [self.size, self.squares, self.prompts, self.trace_draws[0], self.repeats[0], self.drawn_prompts]
        arrays: dict[str, NDArray[Any]] = {
            "counts": np.array(counts, dtype=np.float64),
            "scatter": self.scatter,
            "within": self.within,
            "trace_draws": self.trace_draws[1],
            "repeats": self.repeats[1],
        }
        arrays |= {f"mean{k}": mean for k, mean in enumerate(self.means)}
        return arrays | {f"uneven{k}": r for k, r in enumerate(self.uneven or ())}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], blocks: int) -> GroupMoments:
        """Read what `to_arrays` wrote for that number of parameter blocks."""
        size, squares, prompts, draws, repeats, drawn_prompts = (float(x) for x in arrays["counts"])
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
            drawn_prompts=drawn_prompts,
        )


SKETCH = 256
"""Numbers that a prompt leaves of each member's sum."""


@lru_cache(maxsize=256)
def signs(dimension: int) -> NDArray[np.float32]:
    """Signs of the coordinates, the same in every process and in every run."""
    bits = np.unpackbits(np.frombuffer(np.random.default_rng(dimension).bytes(-(-dimension // 8)), dtype=np.uint8))
    return (2.0 * bits[:dimension] - 1).astype(np.float32)


def sketch(vectors: NDArray[Any], width: int) -> Array:
    """``[..., d]`` to at most ``width`` numbers with the same inner products on average; exact where they suffice.

    A count sketch: signs, then sums of every ``width``-th coordinate. The error of an inner product is about
    ``norm(x) norm(y) / sqrt(width)``: too much for an estimate, little for the weight of a prompt.

    Source: Charikar, Chen and Farach-Colton (2002).

    >>> x, y = np.random.default_rng(0).normal(size=(2, 5000)) + 1
    >>> bool(abs(sketch(x, 256) @ sketch(y, 256) / (x @ y) - 1) < 0.2)
    True
    """
    d = vectors.shape[-1]
    if d <= width:
        return np.asarray(vectors, dtype=np.float64)
    whole = d // width * width
    signed = vectors * signs(d)
    folded = signed[..., :whole].reshape(*vectors.shape[:-1], -1, width).sum(axis=-2, dtype=np.float64)
    folded[..., : d - whole] += signed[..., whole:]
    return np.asarray(folded, dtype=np.float64)


def sketch_width(blocks: int) -> int:
    """Numbers a block leaves, so that all together leave about `SKETCH`."""
    return max(4, SKETCH // blocks)


@dataclass(frozen=True)
class PromptParts:
    """What single prompts leave behind where groups hold several of them; all about zero.

    Attributes:
        sizes: ``[..., P]``, examples.
        products: ``[..., P, L, p, p]``, ``D_ab`` of each prompt.
        sketches: Per block ``[..., P, p, k]``, sketches of ``S_a^c``.
    """

    sizes: Array
    products: Array
    sketches: tuple[Array, ...]

    def summary(self, members: Sequence[str], blocks: Sequence[str]) -> MomentSummary:
        """The sample with each prompt left out: exact in M, from sketches in U."""
        parts = []
        for x in self.sketches:
            total = x.sum(axis=-3)
            cross = np.einsum("...nak,...bk->...nab", x, total)
            parts.append(
                (np.einsum("...ak,...bk->...ab", total, total), cross, np.einsum("...nak,...nbk->...nab", x, x))
            )
        total, cross, own = (np.stack(part, axis=-3) for part in zip(*parts, strict=True))
        sums = GroupSums.about_zero(
            sizes=self.sizes,
            squares=self.sizes**2,
            total=total,
            cross=cross,
            own=own,
            diagonal=self.products,
            within=own,
        )
        return summarise(sums, members, blocks, self.sizes.shape[-1])

    def __getitem__(self, which: int | list[int]) -> PromptParts:
        """Some of the prompts."""
        return PromptParts(self.sizes[which], self.products[which], tuple(x[which] for x in self.sketches))


def gram(x: Array, y: Array) -> Array:
    """Inner products of every member of x with every member of y: ``[p, d], [p, d] -> [p, p]``."""
    return x @ y.T


def _about(group: GroupMoments, origin: Sequence[Array]) -> tuple[Array, Array]:
    """``D`` and ``W`` (each ``[L, p, p]``) about an origin of all members.

    D' = D + n u.u and W' = W + u.R + R.u + q u.u with u = mean - origin.
    """
    moves = [mean - o for mean, o in zip(group.means, origin, strict=True)]
    squares = np.stack([gram(u, u) for u in moves])
    within = group.within + group.squares * squares
    if group.uneven is not None:
        mixed = np.stack([gram(u, r) for u, r in zip(moves, group.uneven, strict=True)])
        within = within + mixed + np.swapaxes(mixed, -1, -2)
    return group.scatter + group.size * squares, within


def merge_groups(first: GroupMoments | None, second: GroupMoments) -> GroupMoments:
    """Moments of the union of two disjoint sets of prompts (Chan, Golub and LeVeque's parallel update).

    With delta the difference of the means, the common mean lies ``-f delta`` from the first and ``(1 - f) delta``
    from the second, f the second's share of the examples.
    """
    if first is None:
        return second
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
        drawn_prompts=first.drawn_prompts + second.drawn_prompts,
    )


def _dense(group: GroupMoments) -> Sequence[Array | float]:
    return [0.0] * len(group.means) if group.uneven is None else group.uneven


def prompt_moments(vectors: Sequence[Sequence[NDArray[Any]]], halved: Array | None) -> GroupMoments:
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
        drawn_prompts=float(halved is not None),
    )


def add_singles(
    group: GroupMoments | None, vectors: Sequence[Sequence[NDArray[Any]]], halved: Array | None
) -> GroupMoments:
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
        drawn_prompts=group.drawn_prompts + draws[0],
    )


def prompt_parts(vectors: Sequence[Sequence[NDArray[Any]]], labels: Int[np.ndarray, " examples"] | None) -> PromptParts:
    """What prompts leave behind.

    Args:
        vectors: Per block and member ``[..., n, d]``.
        labels: Prompt ``0 .. P - 1`` of each example; None where each is its own.
    """
    width, add = sketch_width(len(vectors)), _adder(labels)
    p, shape = len(vectors[0]), vectors[0][0].shape[:-1]
    products = np.empty((*shape, len(vectors), p, p))
    for k, block in enumerate(vectors):
        for a, b in combinations_with_replacement(range(p), 2):
            dots = np.einsum("...d,...d->...", block[a], block[b], dtype=np.float64)
            products[..., k, a, b] = products[..., k, b, a] = dots
    sketches = [np.stack([add(sketch(x, width), -2) for x in block], axis=-2) for block in vectors]
    sizes = np.ones(shape[-1]) if labels is None else np.bincount(labels).astype(np.float64)
    return PromptParts(
        np.broadcast_to(sizes, (*shape[:-1], sizes.size)), add(products, len(shape) - 1), tuple(sketches)
    )


Vectors = Float[np.ndarray, "examples parameters"] | Mapping[str, Float[np.ndarray, "examples parameters"]]


@dataclass(frozen=True)
class Moments:
    """Mergeable moments of the vectors ``t_i, e_i, m_i``; `init`, `update`, `merge`, `finalize` return new values.

    Attributes:
        members: Names of the p vectors of each example; leave out ``m`` for the reference-point estimator. Further
            names are welcome (Hessian products, more estimators).
        blocks: Names of the parameter blocks (layers).
        n_groups: Jackknife groups, G; None where every prompt is its own (see `jackknife_groups`).
        groups: Moments of the groups that hold prompts: number of the group, or id of the prompt, to its moments.
        prompts: What each prompt leaves behind, by its id, where groups hold several.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> t, e = rng.normal(size=(2, 40, 5))
        >>> ids = [f"q{i}" for i in range(40)]
        >>> whole = Moments.init(("t", "e")).update({"t": t, "e": e}, ids)
        >>> left = Moments.init(("t", "e")).update({"t": t[:9], "e": e[:9]}, ids[:9])
        >>> right = Moments.init(("t", "e")).update({"t": t[9:], "e": e[9:]}, ids[9:])
        >>> bool(np.allclose(whole.finalize().U, right.merge(left).finalize().U, rtol=0, atol=1e-12))
        True
    """

    members: tuple[str, ...]
    blocks: tuple[str, ...]
    n_groups: int | None
    groups: Mapping[int | str, GroupMoments]
    prompts: Mapping[str, PromptParts] = field(default_factory=dict)

    @classmethod
    def init(
        cls, members: Sequence[str] = MEMBERS, blocks: Sequence[str] = (WHOLE,), groups: int | None = DEFAULT_GROUPS
    ) -> Moments:
        """An empty accumulator with so many jackknife groups; None: every prompt is its own."""
        members, blocks = tuple(rows_of("members", members)), tuple(rows_of("blocks", blocks))
        for name, values in (("members", members), ("blocks", blocks)):
            if not values:
                raise UserError(f"`{name}` must name at least one.")
        if groups is not None:
            check_whole("groups", groups, low=0)
        if groups is not None and groups < 2:
            raise UserError(f"a delete-a-group jackknife needs at least 2 groups, got {groups}; use 20.")
        return cls(tuple(members), tuple(blocks), groups, {})

    @property
    def n_examples(self) -> int:
        """Examples seen."""
        return round(sum(g.size for g in self.groups.values()))

    @property
    def n_prompts(self) -> int:
        """Prompts seen."""
        return sum(g.prompts for g in self.groups.values())

    @property
    def n_second_draws(self) -> int:
        """Examples seen with a second trace draw."""
        return round(sum(g.trace_draws[0] for g in self.groups.values()))

    @property
    def n_drawn_prompts(self) -> int:
        """Prompts seen with a second trace draw."""
        return round(sum(g.drawn_prompts for g in self.groups.values()))

    @property
    def nbytes(self) -> int:
        """Bytes held by mean vectors (everything that scales with the number of parameters)."""
        return sum(x.nbytes for g in self.groups.values() for x in (*g.means, *(g.uneven or ())))

    def update(
        self, vectors: Mapping[str, Vectors], prompts: Sequence[Hashable], trace2: Vectors | None = None
    ) -> Moments:
        """Add a microbatch.

        Args:
            vectors: Member name to ``[n, d]``, or to ``{block: [n, d_block]}``; any float type, summed in float64.
            prompts: Prompt id of each of the n examples. All examples of a prompt must be in this one call.
            trace2: The trace gradient of the same examples on a second, independent trace draw (answers held fixed),
                for the trace-sampling part of Theorem 1.

        Raises:
            UserError: Members or blocks are missing, shapes disagree, or a gradient is not finite.
        """
        check_kind("vectors", vectors, Mapping, "a dictionary of gradients by member")
        prompts = list(rows_of("prompts", prompts))
        missing = [name for name in self.members if name not in vectors]
        if missing:
            raise UserError(f"gradients of {', '.join(missing)} are missing; give all of {', '.join(self.members)}.")
        parts = {name: self._split(name, vectors[name], len(prompts)) for name in self.members}
        halved = None
        if trace2 is not None:
            second = self._split("trace2", trace2, len(prompts))
            halved = np.stack([_half_square(x, y) for x, y in zip(parts["t"], second, strict=True)], axis=-1)
        rows: dict[Hashable, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        # Prompts with one pair are added by group, all at once; the others one by one.
        units: dict[tuple[str, Hashable], tuple[int | str, list[int]]] = {}
        for prompt, its in rows.items():
            g = str(prompt) if self.n_groups is None else group_of(prompt, self.n_groups)
            units.setdefault(("group", g) if len(its) == 1 else ("prompt", prompt), (g, []))[1].extend(its)
        known = self.groups if self.n_groups is None else self.prompts
        twice = [str(prompt) for prompt in rows if str(prompt) in known]
        if twice:
            raise UserError(f"prompt {twice[0]!r} was added before; all its pairs must come in one update, once.")
        groups = dict(self.groups)
        for (kind, _), (g, its) in units.items():
            chosen = [[parts[name][k][its] for name in self.members] for k in range(len(self.blocks))]
            draws = None if halved is None else halved[its]
            if kind == "group":
                groups[g] = add_singles(groups.get(g), chosen, draws)
            else:
                groups[g] = merge_groups(groups.get(g), prompt_moments(chosen, draws))
        if self.n_groups is None:
            return replace(self, groups=groups)
        labels = np.empty(len(prompts), dtype=np.int64)
        for label, its in enumerate(rows.values()):
            labels[its] = label
        single = len(rows) == len(prompts)
        blocks = [[parts[name][k] for name in self.members] for k in range(len(self.blocks))]
        left = prompt_parts(blocks, None if single else labels)
        return replace(self, groups=groups, prompts={**self.prompts, **{str(x): left[i] for i, x in enumerate(rows)}})

    def merge(self, other: Moments) -> Moments:
        """Moments of the union; the two must have seen disjoint sets of prompts."""
        if (self.members, self.blocks, self.n_groups) != (other.members, other.blocks, other.n_groups):
            raise UserError("only moments with the same members, blocks and number of groups merge; rerun one of them.")
        mine, others = (x.groups if self.n_groups is None else x.prompts for x in (self, other))
        twice = {str(x) for x in mine} & {str(x) for x in others}
        if twice:
            raise UserError(f"prompt {min(twice)!r} is in both moments; merge those of different prompts.")
        merged = {g: merge_groups(self.groups.get(g), found) for g, found in other.groups.items()}
        return replace(self, groups={**self.groups, **merged}, prompts={**self.prompts, **other.prompts})

    def mean(self, member: str) -> dict[str, Array]:
        """Mean vector of a member over all examples, by block.

        Raises:
            UserError: No examples, or no such member.
        """
        filled = list(self.groups.values())
        if not filled or member not in self.members:
            raise UserError(f"no examples of {member!r} were added, so it has no mean; check that there are pairs.")
        row, size = self.members.index(member), sum(g.size for g in filled)
        return {
            block: np.asarray(sum(g.size * g.means[k][row] for g in filled) / size)
            for k, block in enumerate(self.blocks)
        }

    def finalize(self) -> MomentSummary:
        """U, M and shift with each group left out (`MomentSummary`).

        Raises:
            UserError: Fewer than three prompts, or all of them in one group.
        """
        filled = [self.groups[g] for g in sorted(self.groups, key=lambda g: (str(type(g)), g))]
        if not filled:
            raise UserError("no examples were added, so there are no moments; check that the pairs are not empty.")
        size = sum(g.size for g in filled)
        # One origin for all members: the grand mean over members and examples.
        origins = [
            np.asarray(sum(g.size * g.means[k].mean(axis=0) for g in filled) / size) for k in range(len(self.blocks))
        ]
        diagonal, within = (np.stack(part) for part in zip(*(_about(g, origins) for g in filled), strict=True))
        sizes, squares = (np.array([getattr(g, name) for g in filled]) for name in ("size", "squares"))
        parts = []
        for k, origin in enumerate(origins):
            means = [np.stack([g.means[k][a] - origin for g in filled]) for a in range(len(self.members))]
            weighted = [squares[:, None] * x for x in means]
            for i, g in enumerate(filled):
                if g.uneven is not None:  # Q^g = sum_c n_c S^c = R + q (mean - o)
                    for a, row in enumerate(g.uneven[k]):
                        weighted[a][i] += row
            parts.append(
                {"diagonal": diagonal[:, k], "within": within[:, k]}
                | _products([sizes[:, None] * x for x in means], means, weighted, origin)
            )
        sums = GroupSums(
            sizes=sizes,
            squares=squares,
            trace_draws=(np.array([g.trace_draws[0] for g in filled]), np.stack([g.trace_draws[1] for g in filled])),
            repeats=(np.array([g.repeats[0] for g in filled]), np.stack([g.repeats[1] for g in filled])),
            **_stack_blocks(parts),
        )
        found = summarise(sums, self.members, self.blocks, self.n_prompts)
        left = self._left()
        return found if left is None else replace(found, prompts=left.summary(self.members, self.blocks))

    def _left(self) -> PromptParts | None:
        """What all prompts left, in the order of their ids; None where groups are prompts."""
        if self.n_groups is None or len(self.prompts) != self.n_prompts:  # files of old runs have none
            return None
        each = [self.prompts[name] for name in sorted(self.prompts)]
        columns = zip(*(x.sketches for x in each), strict=True)
        return PromptParts(
            np.array([x.sizes for x in each]), np.stack([x.products for x in each]), tuple(map(np.stack, columns))
        )

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Plain arrays for ``numpy.savez``, to resume from or to send to another process; `from_arrays` reads them."""
        arrays: dict[str, NDArray[Any]] = {
            "members": np.array(self.members),
            "blocks": np.array(self.blocks),
            "n_groups": np.array(self.n_groups or 0),
            "groups": np.array([str(g) for g in self.groups]),
        }
        for k, group in enumerate(self.groups.values()):
            arrays |= {f"group{k}/{name}": value for name, value in group.to_arrays().items()}
        if (left := self._left()) is not None:
            arrays |= {"prompts/ids": np.array(sorted(self.prompts)), "prompts/sizes": left.sizes}
            arrays |= {"prompts/products": left.products}
            arrays |= {f"prompts/sketch{k}": x for k, x in enumerate(left.sketches)}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Moments:
        """Read what `to_arrays` wrote (an open ``.npz`` file will do)."""
        members, blocks, names = (tuple(str(x) for x in arrays[key]) for key in ("members", "blocks", "groups"))
        n_groups = int(arrays["n_groups"]) or None
        found: list[dict[str, NDArray[Any]]] = [{} for _ in names]
        for key in arrays:
            prefix, _, name = key.partition("/")
            if name and prefix != "prompts":
                found[int(prefix.removeprefix("group"))][name] = np.asarray(arrays[key])
        groups = {
            name if n_groups is None else int(name): GroupMoments.from_arrays(part, len(blocks))
            for name, part in zip(names, found, strict=True)
        }
        if "prompts/ids" not in arrays:
            return cls(members, blocks, n_groups, groups)
        sketches = tuple(np.asarray(arrays[f"prompts/sketch{k}"]) for k in range(len(blocks)))
        left = PromptParts(np.asarray(arrays["prompts/sizes"]), np.asarray(arrays["prompts/products"]), sketches)
        prompts = {str(name): left[i] for i, name in enumerate(arrays["prompts/ids"])}
        return cls(members, blocks, n_groups, groups, prompts)

    def _split(self, name: str, value: Vectors, n: int) -> list[NDArray[Any]]:
        """One array ``[n, d]`` per block, checked, in the float type that it came in."""
        given = value if isinstance(value, Mapping) else {WHOLE: value}
        missing = [block for block in self.blocks if block not in given]
        if missing:
            raise UserError(f"gradient {name!r} lacks the parameter blocks {', '.join(missing)}; give every block.")
        arrays = [as_array(f"gradient {name!r}", given[block]) for block in self.blocks]
        for block, array in zip(self.blocks, arrays, strict=True):
            if array.ndim != 2 or array.shape[0] != n:
                raise UserError(f"gradient {name!r}, block {block!r}: shape {array.shape}, expected [{n} examples, d].")
            with np.errstate(over="ignore", invalid="ignore"):
                total = array.sum()  # quick, and finite only if all are; large finite numbers may overflow it
            if not np.isfinite(total) and not np.isfinite(array).all():
                row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
                raise UserError(
                    f"gradient {name!r} of example {row} of the batch is not finite; run in float32 or bfloat16 "
                    "(float16 overflows) and check that record."
                )
        return arrays


def _half_square(first: NDArray[Any], second: NDArray[Any]) -> Array:
    """``norm(x - y)^2 / 2`` row by row, in float64."""
    difference = np.subtract(first, second, dtype=np.float64)
    return np.asarray(np.einsum("ij,ij->i", difference, difference) / 2)


def as_array(name: str, values: Any) -> NDArray[Any]:
    """Real numbers as an array: NumPy's, lists, tensors of any framework (off their graph, float16 and all).

    Raises:
        UserError: They are no real numbers.
    """
    values = values.detach() if hasattr(values, "detach") else values
    if "bfloat16" in str(getattr(values, "dtype", "")) and hasattr(values, "float"):  # NumPy has none
        values = values.float()
    try:
        array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: not an array of numbers ({str(error).splitlines()[0]}).") from error
    if array.dtype.kind not in "fiu":
        raise UserError(f"{name}: an array of {array.dtype} where real numbers belong.")
    return array


def example_rows(name: str, values: Any) -> NDArray[Any]:
    """`as_array` of one vector an example, ``[examples, parameters]``.

    Raises:
        UserError: They are no real numbers, or of another shape.
    """
    array = as_array(name, values)
    if array.ndim != 2:
        raise UserError(f"`{name}` has the shape {list(array.shape)}, expected [examples, parameters].")
    return array


MAX_GROUPS = 256


def summary_of_arrays(
    vectors: Mapping[str, Float[np.ndarray, "*replicates examples parameters"]],
    *,
    clusters: Sequence[Hashable] | None = None,
    blocks: Mapping[str, slice] | None = None,
    trace2: Float[np.ndarray, "*replicates examples parameters"] | None = None,
    groups: Grouping = "auto",
) -> MomentSummary:
    """Summary of per-example gradients held in memory: what `Moments` gives for the same prompts and groups.

    Args:
        vectors: Member name to array ``[..., N, d]`` (``t``, ``e`` and, unless at the reference point, ``m``).
        clusters: Prompt id of each of the N examples; None where each example is its own prompt, named "0", "1", ...
            With clusters, no leading axes.
        blocks: Name to slice of the d parameters; None for one block.
        trace2: The trace gradient on a second, independent trace draw with the answers held fixed.
        groups: Jackknife groups, see `jackknife_groups`. Single prompts stand in the order of their first examples.

    Raises:
        UserError: Shapes differ, or fewer than three prompts.
    """
    named = {name: np.asarray(as_array(name, value), dtype=np.float64) for name, value in vectors.items()}
    shapes = {value.shape for value in named.values()} | ({np.shape(trace2)} if trace2 is not None else set())
    if len(shapes) != 1 or len(next(iter(shapes))) < 2:
        raise UserError(f"per-example gradients must have one shape [examples, parameters], got {sorted(shapes)}.")
    shape = next(iter(shapes))
    if 0 in shape:
        raise UserError(f"per-example gradients have the shape {list(shape)}; there is nothing to estimate from.")
    for name, value in named.items():
        with np.errstate(over="ignore", invalid="ignore"):
            total = value.sum()  # quick, as in `Moments`
        if not np.isfinite(total) and not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][-2])
            raise UserError(f"gradient {name!r} of example {row} is not finite; check that example.")
    ids = range(shape[-2]) if clusters is None else list(rows_of("clusters", clusters))
    if blocks is not None:
        check_kind("blocks", blocks, Mapping, "a dictionary of slices by name")
        for name, block in blocks.items():
            check_kind(f"blocks[{name!r}]", block, slice, "a slice of the parameters")
        if not blocks:
            raise UserError("`blocks` names no block; leave it out for one weight.")
    if len(ids) != shape[-2] or (clusters is not None and len(shape) != 2):
        raise UserError(f"clusters must name the prompt of each of the {shape[-2]} examples, got {len(ids)} names.")
    index: dict[Hashable, int] = {}
    prompt_of = np.array([index.setdefault(prompt, len(index)) for prompt in ids])
    counts = np.bincount(prompt_of).astype(np.float64)
    n_groups = jackknife_groups(len(index), shape[-1], len(named), groups)
    single = len(index) == shape[-2]
    prompt_sums = _adder(None if single else prompt_of)
    group_sums = _adder(None if n_groups is None else group_labels(list(index), n_groups))
    sizes, p = group_sums(counts, -1), len(named)
    repeated = counts > 1
    spread_over = np.maximum(counts - 1, 1)[:, None, None]
    parts = []
    for block in [slice(None)] if blocks is None else blocks.values():
        origin = np.mean([value[..., block].mean(axis=-2) for value in named.values()], axis=0)
        shifted = [value[..., block] - origin[..., None, :] for value in named.values()]
        sums = [prompt_sums(x, -2) for x in shifted]
        own, diagonal = (np.empty((*sums[0].shape[:-1], p, p)) for _ in range(2))
        for a, b in combinations_with_replacement(range(p), 2):
            own[..., a, b] = own[..., b, a] = np.einsum("...nd,...nd->...n", sums[a], sums[b])
            if not single:
                products = np.einsum("nd,nd->n", shifted[a], shifted[b])
                diagonal[..., a, b] = diagonal[..., b, a] = np.bincount(prompt_of, products)
        diagonal = own if single else diagonal
        totals = [group_sums(x, -2) for x in sums]
        part = {"diagonal": group_sums(diagonal, -3), "within": group_sums(own, -3)}
        part |= _products(
            totals,
            totals if (sizes == 1).all() else [x / sizes[:, None] for x in totals],
            totals if single else [group_sums(counts[:, None] * x, -2) for x in sums],
            origin,
        )
        if not single:
            spread = (diagonal - own / counts[:, None, None]) / spread_over
            part["repeats"] = group_sums(spread * repeated[:, None, None], -3)
        if trace2 is not None:
            second = np.asarray(trace2, dtype=np.float64)[..., block]
            halved = ((named["t"][..., block] - second) ** 2).sum(-1) / 2
            part["trace_draws"] = group_sums(prompt_sums(halved, -1), -1)
        parts.append(part)
    lead, left = shape[:-2], None
    if n_groups is not None:
        cut = [slice(None)] if blocks is None else blocks.values()
        left = prompt_parts(
            [[value[..., block] for value in named.values()] for block in cut], None if single else prompt_of
        )
    names = [WHOLE] if blocks is None else list(blocks)
    sums_of = _stack_blocks(parts)
    draws, repeats = sums_of.pop("trace_draws", None), sums_of.pop("repeats", None)
    found = summarise(
        GroupSums(
            sizes=np.broadcast_to(sizes, (*lead, *sizes.shape)),
            squares=np.broadcast_to(group_sums(counts**2, -1), (*lead, *sizes.shape)),
            trace_draws=None if draws is None else (sizes, draws),
            repeats=None if repeats is None else (group_sums(repeated.astype(np.float64), -1), repeats),
            **sums_of,
        ),
        list(named),
        names,
        len(index),
    )
    return found if left is None else replace(found, prompts=left.summary(list(named), names))


def _adder(labels: Int[np.ndarray, " items"] | None) -> Callable[[Array, int], Array]:
    """Sums along an axis over the items of each label; None: every item is its own."""
    if labels is None:
        return lambda x, axis: x
    indicator = (labels[:, None] == np.arange(labels.max() + 1)).astype(np.float64)
    return lambda x, axis: np.moveaxis(np.tensordot(x, indicator, axes=(axis, 0)), -1, axis)


def _products(sums: list[Array], means: list[Array], weighted: list[Array], origin: Array) -> dict[str, Array]:
    """Inner products of one parameter block that `GroupSums` holds.

    Args:
        sums: ``S_a^g`` about the origin, for each member ``[..., G, d]``.
        means: Means of the groups.
        weighted: ``sum_c n_c S_a^c`` of the groups.
        origin: ``[..., d]``.
    """
    p, totals = len(sums), [x.sum(axis=-2) for x in sums]
    cross, own = (np.empty((*sums[0].shape[:-1], p, p)) for _ in range(2))
    total = np.empty((*totals[0].shape[:-1], p, p))
    for a, b in product(range(p), repeat=2):
        cross[..., a, b] = np.matmul(sums[a], totals[b][..., None])[..., 0]
        if a <= b:
            total[..., a, b] = total[..., b, a] = (totals[a] * totals[b]).sum(-1)
            own[..., a, b] = own[..., b, a] = np.einsum("...nd,...nd->...n", sums[a], sums[b])
    dotted, dotted_weighted = (
        np.stack([np.matmul(x, origin[..., None])[..., 0] for x in vectors], axis=-1) for vectors in (sums, weighted)
    )
    found = {"total": total, "cross": cross, "own": own, "origin_dot_sum": dotted}
    found |= {"origin_dot_weighted": dotted_weighted, "origin_square": (origin**2).sum(-1)}
    interactions = group_interactions(means)
    return found if interactions is None else found | {"interactions": interactions}


def _stack_blocks(parts: list[dict[str, Array]]) -> dict[str, Array]:
    """One array with a block axis for each name; the axes behind it are those of members."""
    behind = {"origin_dot_sum": 1, "origin_dot_weighted": 1, "origin_square": 0, "trace_draws": 0}
    return {name: np.stack([part[name] for part in parts], axis=-1 - behind.get(name, 2)) for name in parts[0]}


def group_interactions(means: Sequence[Array]) -> Array | None:
    """Interactions of all pairs of members from their group means: p times ``[..., G, d]`` to ``[..., I, p, p]``.

    The kernel of ``U_ab`` is ``(a_g . b_h + b_g . a_h) / 2``. None for fewer than four groups.
    """
    if means[0].shape[-2] < 4:
        return None
    return _interactions(len(means), lambda a, b: np.matmul(means[a], np.swapaxes(means[b], -1, -2)))


def interactions_of(grams: Array) -> Array | None:
    """The same from the inner products of group means, ``[..., p, p, G, G]``."""
    return None if grams.shape[-1] < 4 else _interactions(grams.shape[-3], lambda a, b: grams[..., a, b, :, :])


def _interactions(p: int, grams: Callable[[int, int], Array]) -> Array:
    out: Array | None = None
    for a, b in combinations_with_replacement(range(p), 2):
        gram = grams(a, b)
        found = u_centred(gram if a == b else (gram + np.swapaxes(gram, -1, -2)) / 2)
        if out is None:  # in memory pairs come last: every statistic made of this reads its members in one piece
            out = np.empty((*found.shape[:-1], p, p, found.shape[-1]))
        out[..., a, b, :] = out[..., b, a, :] = found
    assert out is not None  # p > 0
    return np.moveaxis(out, -1, -3)
