"""Unbiased second moments of per-example gradients, with every leave-one-group-out value beside them.

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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.errors import UserError

Array = NDArray[np.float64]

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
            upper triangle) the interaction of the two in U (see `bvpo_stats.statistics.interactions`); M has none.
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
