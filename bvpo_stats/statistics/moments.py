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

The group of a prompt is a hash of its id, so it does not depend on order, on batches or on which process saw it.

Contract: **all pairs of one prompt come in one** `Moments.update`, **once**. Products inside a prompt are left out of
the U-statistics, which only the update that sees them together can do; a prompt counted twice puts the diagonal back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations_with_replacement, product

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.calibration import Array, u_centred

MEMBERS = ("t", "e", "m")
WHOLE = "all"
"""Name of the only parameter block where vectors are not cut into blocks."""


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
        )

    def to_arrays(self) -> dict[str, NDArray]:
        """Plain arrays for ``numpy.savez``; `from_arrays` reads them back."""
        return {f.name: np.asarray(v) for f in fields(self) if (v := getattr(self, f.name)) is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> MomentSummary:
        """Read what `to_arrays` wrote."""
        names = ("trace_sampling", "within_prompt", "interactions")
        optional = {name: np.asarray(arrays[name]) for name in names if name in arrays}
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


DEFAULT_GROUPS = 20

Vectors = Float[np.ndarray, "examples parameters"] | Mapping[str, Float[np.ndarray, "examples parameters"]]


def group_of(prompt: Hashable, groups: int = DEFAULT_GROUPS) -> int:
    """Jackknife group of a prompt id: a hash of its text, the same in every process and in every run.

    >>> [group_of(f"question-{i}") for i in range(5)]
    [0, 14, 18, 7, 14]
    """
    digest = hashlib.blake2b(str(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % groups


@dataclass(frozen=True)
class Moments:
    """Mergeable moments of the vectors ``t_i, e_i, m_i``; `init`, `update`, `merge`, `finalize` return new values.

    Attributes:
        members: Names of the p vectors of each example; leave out ``m`` for the reference-point estimator. Further
            names are welcome (Hessian products, more estimators).
        blocks: Names of the parameter blocks (layers).
        groups: One entry per jackknife group, None while empty.

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
    groups: tuple[GroupMoments | None, ...]

    @classmethod
    def init(
        cls, members: Sequence[str] = MEMBERS, blocks: Sequence[str] = (WHOLE,), groups: int = DEFAULT_GROUPS
    ) -> Moments:
        """An empty accumulator."""
        if groups < 2:
            raise UserError(f"a delete-a-group jackknife needs at least 2 groups, got {groups}; use 20.")
        return cls(tuple(members), tuple(blocks), (None,) * groups)

    @property
    def n_examples(self) -> int:
        """Examples seen."""
        return round(sum(g.size for g in self.groups if g is not None))

    @property
    def n_prompts(self) -> int:
        """Prompts seen."""
        return sum(g.prompts for g in self.groups if g is not None)

    @property
    def n_second_draws(self) -> int:
        """Examples seen with a second trace draw."""
        return round(sum(g.trace_draws[0] for g in self.groups if g is not None))

    @property
    def nbytes(self) -> int:
        """Bytes held by mean vectors (everything that scales with the number of parameters)."""
        held = [x for g in self.groups if g is not None for x in (*g.means, *(g.uneven or ()))]
        return sum(x.nbytes for x in held)

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
        units: dict[tuple[str, Hashable], tuple[int, list[int]]] = {}
        for prompt, its in rows.items():
            g = group_of(prompt, len(self.groups))
            key = ("group", g) if len(its) == 1 else ("prompt", prompt)
            units.setdefault(key, (g, []))[1].extend(its)
        groups = list(self.groups)
        for (kind, _), (g, its) in units.items():
            chosen = [[parts[name][k][its] for name in self.members] for k in range(len(self.blocks))]
            draws = None if halved is None else halved[its]
            if kind == "group":
                groups[g] = add_singles(groups[g], chosen, draws)
            else:
                groups[g] = merge_groups(groups[g], prompt_moments(chosen, draws))
        return replace(self, groups=tuple(groups))

    def merge(self, other: Moments) -> Moments:
        """Moments of the union; the two must have seen disjoint sets of prompts."""
        if (self.members, self.blocks, len(self.groups)) != (other.members, other.blocks, len(other.groups)):
            raise UserError("only moments with the same members, blocks and number of groups merge; rerun one of them.")
        pairs = zip(self.groups, other.groups, strict=True)
        return replace(self, groups=tuple(merge_groups(a, b) for a, b in pairs))

    def mean(self, member: str) -> dict[str, Array]:
        """Mean vector of a member over all examples, by block.

        Raises:
            UserError: No examples, or no such member.
        """
        filled = [g for g in self.groups if g is not None]
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
        filled = [g for g in self.groups if g is not None]
        if not filled:
            raise UserError("no examples were added, so there are no moments; check that the pairs are not empty.")
        sizes = np.array([g.size for g in filled])
        L, p = len(self.blocks), len(self.members)
        # One origin for all members: the grand mean over members and examples.
        origin = [
            sum(g.size * g.means[k].mean(axis=0) for g in filled) / sizes.sum() for k in range(L)
        ]  # fmt: skip
        total = [sum(g.size * (g.means[k] - origin[k]) for g in filled) for k in range(L)]
        centres = [np.broadcast_to(o, (p, len(o))) for o in origin]
        rows = [group_scalars(g, origin, centres, total) for g in filled]
        cross, own, diagonal, within, dotted, weighted = (np.stack(part) for part in zip(*rows, strict=True))
        # Per block, about the origin: [members, groups, d].
        group_means = [np.stack([g.means[k] - origin[k] for g in filled], axis=1) for k in range(L)]
        interactions = [found for x in group_means if (found := group_interactions(list(x))) is not None]
        sums = GroupSums(
            sizes=sizes,
            squares=np.array([g.squares for g in filled]),
            total=np.stack([gram(s, s) for s in total]),
            cross=cross,
            own=own,
            diagonal=diagonal,
            within=within,
            origin_dot_sum=dotted,
            origin_dot_weighted=weighted,
            origin_square=np.array([o @ o for o in origin]),
            trace_draws=(np.array([g.trace_draws[0] for g in filled]), np.stack([g.trace_draws[1] for g in filled])),
            repeats=(np.array([g.repeats[0] for g in filled]), np.stack([g.repeats[1] for g in filled])),
            interactions=np.stack(interactions, axis=1) if interactions else None,
        )
        return summarise(sums, self.members, self.blocks, self.n_prompts)

    def to_arrays(self) -> dict[str, NDArray]:
        """Plain arrays for ``numpy.savez``, to resume from or to send to another process; `from_arrays` reads them."""
        arrays: dict[str, NDArray] = {
            "members": np.array(self.members),
            "blocks": np.array(self.blocks),
            "groups": np.array(len(self.groups)),
        }
        for g, group in enumerate(self.groups):
            if group is not None:
                arrays |= {f"group{g}/{name}": value for name, value in group.to_arrays().items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Moments:
        """Read what `to_arrays` wrote (an open ``.npz`` file will do)."""
        members, blocks = (tuple(str(name) for name in arrays[key]) for key in ("members", "blocks"))
        found: list[dict[str, NDArray]] = [{} for _ in range(int(arrays["groups"]))]
        for key in arrays:
            prefix, _, name = key.partition("/")
            if name:
                found[int(prefix.removeprefix("group"))][name] = np.asarray(arrays[key])
        groups = tuple(GroupMoments.from_arrays(part, len(blocks)) if part else None for part in found)
        return cls(members, blocks, groups)

    def _split(self, name: str, value: Vectors, n: int) -> list[NDArray]:
        """One array ``[n, d]`` per block, checked, in the float type that it came in."""
        given = value if isinstance(value, Mapping) else {WHOLE: value}
        missing = [block for block in self.blocks if block not in given]
        if missing:
            raise UserError(f"gradient {name!r} lacks the parameter blocks {', '.join(missing)}; give every block.")
        arrays = [np.asarray(given[block]) for block in self.blocks]
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


def _half_square(first: NDArray, second: NDArray) -> Array:
    """``norm(x - y)^2 / 2`` row by row, in float64."""
    difference = np.subtract(first, second, dtype=np.float64)
    return np.asarray(np.einsum("ij,ij->i", difference, difference) / 2)


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
