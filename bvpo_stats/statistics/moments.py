"""Streaming accumulator of gradient moments: one pass, no memory growth with examples, any order, any partition.

Each of G jackknife groups keeps the mean vector of every member and scalars about that mean; adding examples and
merging two accumulators are the same operation, the parallel update of Chan, Golub and LeVeque (1983), in float64.
Memory is ``p G d`` float64 numbers for p members and d parameters (twice that once a prompt with several pairs has
been seen).

The group of a prompt is a hash of its id, so it does not depend on order, on batches or on which process saw it.

Contract: **all pairs of one prompt come in one** `Moments.update`, **once**. Products inside a prompt are left out of
the U-statistics, which only the update that sees them together can do; a prompt counted twice puts the diagonal back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.arrays import group_interactions
from bvpo_stats.statistics.group_moments import (
    GroupMoments,
    add_singles,
    gram,
    group_scalars,
    merge_groups,
    prompt_moments,
)
from bvpo_stats.statistics.summary import MEMBERS, WHOLE, Array, GroupSums, MomentSummary, summarise

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
