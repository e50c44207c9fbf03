"""Moments of a pass where the gradients are: one open group summed on the model's device, closed groups in a file.

What `bvpo_stats.statistics.moments.Moments` keeps in float64 main memory, at a fraction of its size and time:

- prompts come group by group, so that one group is open at a time; its sums are float32 (float64 for a float64 model);
- inner products of a prompt's gradients are float64 scalars, per parameter block;
- the sums of a closed group go to a file (`GroupFile`), which is also what a killed run goes on from;
- at the end all inner products of sums are one float64 Gram matrix, taken in blocks of coordinates and centred there.

Several processes share that last step by coordinates: each adds up the other processes' sums of its share of them, and
only the Gram matrices, groups squared, travel to the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from bvpo_stats.distributed import World
from bvpo_stats.errors import UserError
from bvpo_stats.gradients.engine import BlockLayout
from bvpo_stats.gradients.stream import GradientBatch
from bvpo_stats.statistics.moments import (
    GroupSums,
    MomentSummary,
    PromptParts,
    group_of,
    interactions_of,
    signs,
    sketch_width,
    summarise,
)
from bvpo_stats.store.jsonl import write_error

HALVES_GROUPS = 5
"""Groups behind the half-split test: enough for one number."""
NARROW = 1 << 20
"""Parameters from which closed sums are kept in float16: rounding errors average out in inner products, to about 3e-4 /
sqrt(d) of them. Fewer are kept as they were summed: their file is small anyway."""
_LARGEST = 2.0**15  # of a row in float16, so that numbers 1e-9 of it are kept to three digits
_CHUNK = 1 << 18  # coordinates in float64 at a time
_GRAM_NUMBERS = 1 << 22  # numbers of all sums in float64 at a time
_COUNTS = ("size", "prompts", "draws", "drawn_prompts", "repeats")


@dataclass(frozen=True)
class MomentPlan:
    """What a pass sums up: known before it, and the same in all its processes.

    Attributes:
        members: Names of the gradients of an example.
        contrast: Whether m1 - m2 is summed too, for the half-split test.
        counts: Prompt to its number of examples, for the prompts of all processes.
        n_groups: Jackknife groups; None where every prompt is its own.
        layout: Blocks of the weights whose gradients are carried.
        whole: Blocks of theta. Where they differ, the other gradients are zero.
        metric: Block to the diagonal of Adam's metric, for moments in it besides.
        probe: Rows of the random projection that gradients are seen through, of which number j sees every coordinate
            ``j + k probe`` of a block; 0 without.
    """

    members: tuple[str, ...]
    contrast: bool
    counts: Mapping[str, int]
    n_groups: int | None
    layout: BlockLayout
    whole: BlockLayout
    metric: Mapping[str, NDArray[Any]] | None = None
    probe: int = 0

    @cached_property
    def products(self) -> tuple[str, ...]:
        """Whose inner products are taken."""
        return (*self.members, "d") if self.contrast else self.members

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """What is summed: and n_c times a prompt's sum too, where prompts hold unequal numbers n_c of examples."""
        weighted = tuple(f"n{name}" for name in self.members) if len(set(self.counts.values())) > 1 else ()
        return (*self.products, *weighted)

    @cached_property
    def cells(self) -> tuple[tuple[int | str, int], ...]:
        """What is summed apart, in order: all pairs of a jackknife group and a group of the half-split test."""
        return tuple(sorted(set(self._cell_of.values()), key=lambda cell: (str(type(cell[0])), *cell)))

    @cached_property
    def _cell_of(self) -> dict[str, tuple[int | str, int]]:
        return {
            prompt: (
                prompt if self.n_groups is None else group_of(prompt, self.n_groups),
                group_of(prompt, HALVES_GROUPS) if self.contrast else 0,
            )
            for prompt in self.counts
        }

    @cached_property
    def place(self) -> dict[str, int]:
        """Prompt to its cell's number."""
        number = {cell: k for k, cell in enumerate(self.cells)}
        return {prompt: number[cell] for prompt, cell in self._cell_of.items()}

    @cached_property
    def groups(self) -> tuple[int | str, ...]:
        """Jackknife groups that hold prompts, in the order of every summary."""
        return tuple(dict.fromkeys(group for group, _ in self.cells))

    @cached_property
    def group_labels(self) -> NDArray[Any]:
        """Group of each cell."""
        number = {group: k for k, group in enumerate(self.groups)}
        return np.array([number[group] for group, _ in self.cells])

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of the sums."""
        return np.dtype(self.layout.dtype)

    @cached_property
    def stored(self) -> np.dtype[Any]:
        """Of closed sums."""
        return np.dtype(np.float16) if self.dtype == np.float32 and self.layout.size >= NARROW else self.dtype

    def own_cells(self, prompts: Sequence[str]) -> tuple[int, ...]:
        """The cells of some prompts."""
        return tuple(sorted({self.place[prompt] for prompt in prompts}))

    def file_bytes(self, prompts: Sequence[str]) -> int:
        """What the closed sums of some prompts take, with those of the open group that a checkpoint adds."""
        own = len(self.own_cells(prompts))
        open_one = 0 if own == len(prompts) else self.open_bytes  # a prompt alone is closed at once
        return own * len(self.rows) * self.layout.size * self.stored.itemsize + open_one + self._small_bytes(prompts)

    @property
    def open_bytes(self) -> int:
        """What the sums of one open group take, on the device."""
        return len(self.rows) * self.layout.size * self.dtype.itemsize

    def _small_bytes(self, prompts: Sequence[str]) -> int:
        """Inner products and sketches."""
        blocks, q, metrics = len(self.layout.sizes), len(self.products), 1 + (self.metric is not None)
        sketches = 0 if self.n_groups is None else 8 * len(self.members) * blocks * sketch_width(blocks) * len(prompts)
        return metrics * (sketches + 16 * blocks * q * q * (len(prompts) + len(self.cells)))

    def fingerprint(self, run: str, prompts: Sequence[str]) -> str:
        """Of all that decides what lies where in the file of one process."""
        whole = [
            run, self.products, sorted(self.counts.items()), self.n_groups, sorted(self.layout.places.items()),
            sorted(self.whole.places.items()), self.stored.str, sorted(prompts), self.metric is not None, self.probe,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


class GroupFile:
    """Sums of closed cells, ``[cells, rows, parameters]``, on disk or (without a path) in memory.

    Numbers are written, not stored through the mapping: a full disk is an error then, not the end of the process.
    """

    def __init__(self, plan: MomentPlan, cells: Sequence[int], path: Path | None, fingerprint: str) -> None:
        """Opens what is there, or begins anew.

        Raises:
            UserError: The file is another run's, or cannot be written.
        """
        self._plan, self._path, self._slot = plan, path, {cell: k for k, cell in enumerate(cells)}
        self._shape = (len(cells), len(plan.rows), plan.layout.size)
        self._head = fingerprint.encode()
        self.scales = np.ones(self._shape[:2])
        self.checks: dict[int, int] = {}
        self._memory = np.zeros(self._shape, dtype=plan.stored) if path is None else None
        if path is not None and path.exists():
            with path.open("rb") as handle:
                found = handle.read(len(self._head))
            if found and found != self._head:
                raise UserError(
                    f"{path} holds the moments of another run. Delete it (and what lies beside it) to start over, or "
                    "name a new `output` folder."
                )

    def close(self, cell: int, sums: Sequence[Tensor]) -> None:
        """Keeps the sums of a cell that is complete, blocks ``[rows, d]``.

        Raises:
            UserError: The disk is full.
        """
        slot, flat = self._slot[cell], torch.cat(list(sums), dim=1)
        if self._plan.stored == np.float16:
            largest = flat.abs().amax(dim=1).double().cpu().numpy()
            self.scales[slot] = np.exp2(np.floor(np.log2(_LARGEST / np.where(largest > 0, largest, _LARGEST))))
            flat = (flat * torch.as_tensor(self.scales[slot], dtype=flat.dtype, device=flat.device)[:, None]).half()
        values = flat.cpu().numpy()
        if self._memory is not None:
            self._memory[slot] = values
            return
        assert self._path is not None
        raw = values.tobytes()
        try:
            with self._path.open("r+b" if self._path.exists() else "w+b") as handle:
                handle.write(self._head)
                handle.seek(len(self._head) + slot * len(raw))
                handle.write(raw)
        except OSError as error:
            raise write_error(self._path, error) from error
        self.checks[cell] = zlib.crc32(raw)

    def sync(self) -> None:
        """Waits until all that was written is on the disk.

        Raises:
            UserError: The disk is full.
        """
        if self._path is None or not self._path.exists():
            return
        try:
            with self._path.open("r+b") as handle:
                os.fsync(handle.fileno())
        except OSError as error:
            raise write_error(self._path, error) from error

    def verify(self, checks: Mapping[int, int]) -> None:
        """Refuses a file in which these cells are not as they were written.

        Raises:
            UserError: It is missing, too short, or altered.
        """
        assert self._path is not None
        size = int(np.prod(self._shape[1:])) * self._plan.stored.itemsize
        if not checks:  # killed before the first group was complete
            return
        try:
            with self._path.open("rb") as handle:
                for cell, check in checks.items():
                    handle.seek(len(self._head) + self._slot[cell] * size)
                    if zlib.crc32(handle.read(size)) != check:
                        raise ValueError("it is not as it was written: its checksum differs")
        except (OSError, KeyError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self._path.name}: {reason}") from error
        self.checks = dict(checks)

    def read(self, cells: int, start: int, stop: int) -> NDArray[Any]:
        """Coordinates ``start .. stop`` of all sums, ``[cells, rows, coordinates]``; zero for cells of others."""
        found = np.zeros((cells, self._shape[1], stop - start), dtype=self._plan.dtype)
        if self._memory is None and not self.checks:  # a process without prompts
            return found
        source: NDArray[Any] = self._memory if self._memory is not None else self._mapped()
        for cell, slot in self._slot.items():
            if self._memory is not None or cell in self.checks:
                found[cell] = source[slot, :, start:stop] / self.scales[slot][:, None].astype(self._plan.dtype)
        return found

    def _mapped(self) -> NDArray[Any]:
        """The file, of which only what is read is in memory; the last slots may not be written yet."""
        assert self._path is not None
        numbers = int(np.prod(self._shape[1:]))
        there = (self._path.stat().st_size - len(self._head)) // (numbers * self._plan.stored.itemsize)
        shape = (there, *self._shape[1:])
        return np.memmap(self._path, dtype=self._plan.stored, mode="r", offset=len(self._head), shape=shape)


@dataclass(frozen=True)
class PassMoments:
    """What a pass gives, at the first process.

    Attributes:
        moments: U, M and shift of the gradients.
        adam: The same in Adam's metric, where there is one.
        halves: The same of ``h = t - e`` and ``d = m1 - m2``, m from either half of the traces, where there are halves.
        second_draws: Examples with a second trace draw.
        drawn_prompts: Their prompts.
    """

    moments: MomentSummary
    adam: MomentSummary | None
    halves: MomentSummary | None
    second_draws: int
    drawn_prompts: int


class DeviceMoments:
    """The moments of one process's prompts; `add` batches, then `reduce` with all processes."""

    def __init__(self, plan: MomentPlan, prompts: Sequence[str], path: Path | None = None, run: str = "") -> None:
        """Before the first batch.

        Args:
            plan: What is summed.
            prompts: This process's.
            path: File of the closed groups; None for memory.
            run: What tells this run from others.

        Raises:
            UserError: The file is another run's.
        """
        self.plan, self.done = plan, set[str]()
        self.fingerprint = plan.fingerprint(run, prompts)
        self._file = GroupFile(plan, plan.own_cells(prompts), path, self.fingerprint)
        self._missing = Counter(plan.place[prompt] for prompt in prompts)
        self._open: dict[int, list[Tensor]] = {}
        cells, blocks, q, p = len(plan.cells), len(plan.layout.sizes), len(plan.products), len(plan.members)
        self._totals: dict[str, NDArray[Any]] = {
            "counts": np.zeros((cells, len(_COUNTS))),
            "halved": np.zeros((cells, blocks)),
            "spread": np.zeros((cells, blocks, p, p)),
        }
        if plan.probe:
            self._totals |= {f"rows/{what}": np.zeros((blocks, plan.probe, p, p)) for what in ("diagonal", "within")}
        self._metrics = ("plain",) if plan.metric is None else ("plain", "adam")
        for name in self._metrics:
            self._totals |= {f"{name}/{what}": np.zeros((cells, blocks, q, q)) for what in ("diagonal", "within")}
        self._left: dict[str, list[NDArray[Any]]] = {}
        self._roots = {block: torch.from_numpy(np.sqrt(values)) for block, values in (plan.metric or {}).items()}
        self._columns = {block: _columns(plan, block) for block in plan.layout.sizes}

    @torch.no_grad()
    def add(self, batch: GradientBatch) -> None:
        """Adds a batch; all examples of a prompt in one, once.

        Raises:
            UserError: A gradient is not finite, a prompt was added before, or the disk is full.
        """
        plan, own = self.plan, list(dict.fromkeys(batch.prompt_ids))
        twice = [prompt for prompt in own if prompt in self.done]
        if twice:
            raise UserError(f"prompt {twice[0]!r} was added before; all its pairs must come in one batch, once.")
        labels = None if len(own) == len(batch.prompt_ids) else np.array([own.index(x) for x in batch.prompt_ids])
        cells = np.array([plan.place[prompt] for prompt in own])
        sizes = np.ones(len(own)) if labels is None else np.bincount(labels).astype(float)
        parts: list[dict[str, NDArray[Any]]] = []
        for k, block in enumerate(plan.layout.sizes):
            rows = [batch.rows[name][block] for name in plan.members]
            if plan.contrast:
                rows.append(batch.rows["m1"][block] - batch.rows["m2"][block])
            x = torch.stack(rows)  # [q, examples, d]
            sums = x if labels is None else _by_label(x, labels, len(own))
            self._sum(k, x, sums, sizes, cells)
            parts.append(self._parts(block, x, sums, labels))
            if batch.second is not None:
                apart = (batch.rows["t"][block] - batch.second[block]).double().square().sum(dim=1) / 2
                parts[-1]["halved"] = _added(apart.cpu().numpy(), labels, len(own))
        found = {name: np.stack([part[name] for part in parts], axis=1) for name in parts[0] if "sketch" not in name}
        self._check(batch, own, found["plain/diagonal"])
        repeated, drawn = sizes > 1, batch.second is not None
        counts = np.stack([sizes, np.ones(len(own)), sizes * drawn, np.full(len(own), float(drawn)), repeated], axis=1)
        totals = {"counts": counts} | {name: value for name, value in found.items() if name in self._totals}
        if repeated.any():
            p = len(plan.members)
            spread = found["plain/diagonal"] - found["plain/within"] / sizes[:, None, None, None]
            totals["spread"] = (spread / np.maximum(sizes - 1, 1)[:, None, None, None])[..., :p, :p]
            totals["spread"] *= repeated[:, None, None, None]
        for name, values in totals.items():
            if name.startswith("rows/"):
                self._totals[name] += values.sum(axis=0)
            else:
                np.add.at(self._totals[name], cells, values)
        if plan.n_groups is not None:
            self._keep(own, sizes, found, parts)
        self.done |= set(own)
        self._close(cells)

    def _sum(self, k: int, x: Tensor, sums: Tensor, sizes: NDArray[Any], cells: NDArray[Any]) -> None:
        """Adds one block to the open sums of each cell."""
        p = len(self.plan.members)
        for cell in np.unique(cells).tolist():
            its = np.flatnonzero(cells == cell)
            one = len(its) == sums.shape[1]
            where = torch.from_numpy(its).to(x.device)
            chosen = sums if one else sums[:, where]
            rows = chosen.sum(dim=1)
            if len(self.plan.rows) > len(x):
                times = torch.as_tensor(sizes[its], dtype=x.dtype, device=x.device)
                rows = torch.cat([rows, (chosen[:p] * times[:, None]).sum(dim=1)])
            held = self._open.setdefault(cell, [])
            if k < len(held):
                held[k] += rows
            else:
                held.append(rows)

    def _parts(self, block: str, x: Tensor, sums: Tensor, labels: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
        """Inner products of each prompt's gradients and of their sums; and sketches of the sums."""
        root = self._roots.get(block)
        if root is not None and root.device != x.device:
            root = self._roots[block] = root.to(x.device)
        found: dict[str, NDArray[Any]] = {}
        if self.plan.probe:
            members, own = (part[: len(self.plan.members)] for part in (x, sums))
            for what, part, by in (("diagonal", members, labels), ("within", own, None)):
                rows = [_inner(part[..., row :: self.plan.probe], None) for row in range(self.plan.probe)]
                found[f"rows/{what}"] = _added(torch.stack(rows, dim=1).cpu().numpy(), by, sums.shape[1])
        for name in self._metrics:
            scale = root if name == "adam" else None
            each = _inner(x, scale).cpu().numpy()
            found[f"{name}/diagonal"] = _added(each, labels, sums.shape[1])
            found[f"{name}/within"] = each if labels is None else _inner(sums, scale).cpu().numpy()
            if self.plan.n_groups is not None:
                members = sums[: len(self.plan.members)]
                folded = self._columns[block].fold(members if scale is None else members * scale.to(members.dtype))
                found[f"{name}/sketch"] = folded.transpose(0, 1).cpu().numpy()  # [prompts, p, width]
        return found

    def _check(self, batch: GradientBatch, own: Sequence[str], diagonal: NDArray[Any]) -> None:
        bad = np.argwhere(~np.isfinite(np.einsum("plaa->pa", diagonal)))
        if len(bad):
            prompt, member = own[bad[0][0]], self.plan.products[bad[0][1]]
            raise UserError(
                f"gradient {member!r} of prompt {prompt} is not finite; run in float32 or bfloat16 (float16 overflows) "
                "and check that record."
            )

    def _keep(self, own: Sequence[str], sizes: NDArray[Any], found: Mapping[str, Any], parts: Sequence[Any]) -> None:
        p, lists = len(self.plan.members), self._left
        lists.setdefault("ids", []).append(np.array(own))
        lists.setdefault("sizes", []).append(sizes)
        for name in self._metrics:
            lists.setdefault(f"{name}/products", []).append(found[f"{name}/diagonal"][..., :p, :p])
            for k, part in enumerate(parts):
                lists.setdefault(f"{name}/sketch{k}", []).append(part[f"{name}/sketch"])

    def _close(self, cells: NDArray[Any]) -> None:
        self._missing.subtract(cells.tolist())
        for cell in [cell for cell in self._open if not self._missing[cell]]:
            self._file.close(cell, self._open.pop(cell))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """All but the closed groups' sums, which are on the disk from here on; `restore` reads them."""
        self._file.sync()
        arrays = {"run": np.array(self.fingerprint), "done": np.array(json.dumps(sorted(self.done)))}
        arrays |= {f"total:{name}": values for name, values in self._totals.items()}
        arrays |= {f"left:{name}": np.concatenate(values) for name, values in self._left.items()}
        arrays |= {"scales": self._file.scales, "checks": np.array(list(self._file.checks.items())).reshape(-1, 2)}
        for cell, sums in self._open.items():
            arrays[f"open:{cell}"] = torch.cat(sums, dim=1).cpu().numpy()
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]], device: torch.device) -> None:
        """Goes on from what `to_arrays` gave.

        Args:
            arrays: Its arrays.
            device: Where the open group belongs.

        Raises:
            UserError: They, or the file of closed groups, are another run's or damaged.
        """
        if str(arrays["run"]) != self.fingerprint:
            raise UserError("it holds the moments of another run")
        self._file.verify({int(cell): int(check) for cell, check in arrays["checks"]})
        self._file.scales = np.array(arrays["scales"])
        self.done = set(json.loads(str(arrays["done"])))
        for name, values in arrays.items():
            kind, _, rest = name.partition(":")
            if kind == "total":
                self._totals[rest] = np.array(values)
            elif kind == "left":
                self._left[rest] = [np.array(values)]
            elif kind == "open":
                sizes = list(self.plan.layout.sizes.values())
                self._open[int(rest)] = [part.clone() for part in torch.from_numpy(values).to(device).split(sizes, 1)]
        self._missing.subtract(self.plan.place[prompt] for prompt in self.done)

    def reduce(self, world: World | None = None) -> PassMoments | None:
        """The summaries, at the first process; all call it, when every prompt is in.

        Raises:
            UserError: Fewer than three prompts, or all of them in one group.
        """
        world, plan = world or World(), self.plan
        totals = {name: world.sum_to(values, 0) for name, values in self._totals.items()}
        grams = {name: _Gram.zeros(plan) for name in self._metrics}
        seen = np.zeros((len(plan.layout.sizes), plan.probe, len(plan.members), len(plan.members)))
        for start, x in self._shares(world):
            total = x[:, : len(plan.members)].sum(axis=0, dtype=np.float64)
            for row in range(plan.probe):
                part = total[:, row :: plan.probe]
                seen[list(plan.layout.sizes).index(start[0]), row] += part @ part.T
            for name, gram in grams.items():
                wide = x.astype(np.float64)
                if name == "adam":
                    wide *= self._roots[start[0]].cpu().numpy()[start[1] : start[2]]
                gram.add(plan, start, wide, self._cell_sizes)
        grams = {name: _Gram(*(world.sum_to(part, 0) for part in gram)) for name, gram in grams.items()}
        seen = world.sum_to(seen, 0) if plan.probe else seen
        left = world.gather({name: np.concatenate(values) for name, values in self._left.items()})
        if not world.leads:
            return None
        summaries = {name: self._summary(name, totals, gram, left) for name, gram in grams.items()}
        if plan.probe:
            summaries["plain"] = replace(summaries["plain"], projection=self._projection(totals, seen))
        counts = totals["counts"].sum(axis=0)
        halves = self._halves(totals, grams["plain"]) if plan.contrast else None
        return PassMoments(summaries["plain"], summaries.get("adam"), halves, round(counts[2]), round(counts[3]))

    def contrasts(self, world: World | None = None, *, by_group: bool = False) -> dict[str, NDArray[Any]]:
        """Mean of t - e over all examples ``[1, d]`` or over each group ``[G, d]``, by block, at the first process."""
        world, plan = world or World(), self.plan
        t, e = plan.members.index("t"), plan.members.index("e")
        labels = plan.group_labels if by_group else np.zeros(len(plan.cells), dtype=int)
        sizes = np.bincount(labels, self._cell_sizes)
        found = {block: np.empty((len(sizes), size), dtype=plan.dtype) for block, size in plan.layout.sizes.items()}
        for (block, start, stop), x in self._chunks():
            added = _added(x[:, t].astype(np.float64) - x[:, e], labels, len(sizes))
            found[block][:, start:stop] = world.sum_to(added, 0) / sizes[:, None]
        return found if world.leads else {}

    @cached_property
    def _cell_sizes(self) -> NDArray[Any]:
        """Examples of each cell, over all processes."""
        return np.bincount([self.plan.place[x] for x in self.plan.counts], list(self.plan.counts.values()))

    @cached_property
    def _cell_squares(self) -> NDArray[Any]:
        """Sum of n_c^2 over the prompts of each cell."""
        squares = np.array(list(self.plan.counts.values()), dtype=float) ** 2
        return np.bincount([self.plan.place[x] for x in self.plan.counts], squares)

    def _chunks(self) -> Iterator[tuple[tuple[str, int, int], NDArray[Any]]]:
        cells, offset = len(self.plan.cells), 0
        step = max(64, _GRAM_NUMBERS // (cells * len(self.plan.rows)))
        step -= step % max(1, self.plan.probe)
        for block, size in self.plan.layout.sizes.items():
            for start in range(0, size, step):
                stop = min(size, start + step)
                yield (block, start, stop), self._file.read(cells, offset + start, offset + stop)
            offset += size

    def _shares(self, world: World) -> Iterator[tuple[tuple[str, int, int], NDArray[Any]]]:
        """This process's coordinates, summed over all processes (a reduce-scatter, chunk by chunk)."""
        for number, (where, x) in enumerate(self._chunks()):
            total = world.sum_to(x, number % world.size)
            if number % world.size == world.rank:
                yield where, total

    def _summary(
        self, name: str, totals: Mapping[str, NDArray[Any]], gram: _Gram, left: Sequence[Mapping[str, NDArray[Any]]]
    ) -> MomentSummary:
        plan, p = self.plan, len(self.plan.members)
        labels, n_groups, blocks = plan.group_labels, len(plan.groups), tuple(plan.layout.sizes)

        def grouped(values: NDArray[Any]) -> NDArray[Any]:
            return _added(values, labels, n_groups)

        counts = grouped(totals["counts"])
        sizes, prompts = counts[:, 0], round(counts[:, 1].sum())
        squares = grouped(self._cell_squares)
        sums, weighted = grouped(gram.dots[:, :, :p]), grouped(gram.dots[:, :, p:])  # o . S and o . Q, about zero
        square, n, q = gram.square[None, :, None], sizes[:, None, None], squares[:, None, None]
        about = [
            grouped(totals[f"{name}/{what}"][..., :p, :p]) - x[..., :, None] - x[..., None, :]
            + (count * square)[..., None]
            for what, x, count in (("diagonal", sums, n), ("within", weighted, q))
        ]  # fmt: skip
        K = _merged(gram.products, labels, n_groups)[:, :, :p, :, :p]  # [L, G, p, G, p], about the origin
        each = np.einsum("lgahb->glahb", K)
        cross, own = each.sum(axis=3), np.stack([K[:, g, :, g] for g in range(n_groups)])
        interactions = interactions_of(np.einsum("lgahb->labgh", K) / (sizes[:, None] * sizes))
        summary = summarise(
            GroupSums(
                sizes=sizes,
                squares=squares,
                total=cross.sum(axis=0),
                cross=cross,
                own=own,
                diagonal=about[0],
                within=about[1],
                origin_dot_sum=sums - n * square,
                origin_dot_weighted=weighted - q * square,
                origin_square=gram.square,
                trace_draws=(counts[:, 2], grouped(totals["halved"])),
                repeats=(counts[:, 4], grouped(totals["spread"])) if name == "plain" else None,
                interactions=None if interactions is None else np.swapaxes(interactions, 0, 1),
            ),
            plan.members,
            blocks,
            prompts,
        )
        if plan.n_groups is None:
            return summary
        parts = {key: np.concatenate([one[key] for one in left if key in one]) for key in left[0] or left[-1]}
        order = np.argsort(parts["ids"])
        sketches = tuple(parts[f"{name}/sketch{k}"][order] for k in range(len(blocks)))
        alone = PromptParts(parts["sizes"][order], parts[f"{name}/products"][order], sketches)
        return replace(summary, prompts=alone.summary(plan.members, blocks))

    def _projection(self, totals: Mapping[str, NDArray[Any]], seen: NDArray[Any]) -> MomentSummary:
        """U and M, about zero, with each row of the probe left out: the others stand for it."""
        plan, r = self.plan, self.plan.probe
        sizes = self._cell_sizes.sum()
        pairs = sizes**2 - self._cell_squares.sum()

        def without(each: NDArray[Any]) -> NDArray[Any]:
            by_row = np.moveaxis(each, 1, 0)  # [r, L, p, p]
            whole = by_row.sum(axis=0)
            return np.concatenate([whole[None], (whole - by_row) * r / (r - 1)])

        U, M = without((seen - totals["rows/within"]) / pairs), without(totals["rows/diagonal"] / sizes)
        blocks, prompts = tuple(plan.layout.sizes), len(plan.counts)
        return MomentSummary(plan.members, blocks, U, M, np.zeros_like(U), np.ones(r), round(sizes), prompts)

    def _halves(self, totals: Mapping[str, NDArray[Any]], gram: _Gram) -> MomentSummary:
        """Of h = t - e, where any origin cancels, and d = m1 - m2, about zero."""
        plan = self.plan
        labels = np.array([half for _, half in plan.cells])
        labels = np.unique(labels, return_inverse=True)[1].reshape(-1)
        n = int(labels.max()) + 1
        mix = np.zeros((2, len(plan.products)))
        mix[0, plan.members.index("t")], mix[0, plan.members.index("e")], mix[1, -1] = 1, -1, 1

        def mixed(values: NDArray[Any]) -> NDArray[Any]:
            return _added(np.einsum("ia,claj->clij", mix, values @ mix.T), labels, n)

        K = np.einsum("ia,lgahb,jb->lgihj", mix, _merged(gram.products, labels, n), mix)
        cross = np.einsum("lgihj->glij", K)
        sums = GroupSums.about_zero(
            sizes=np.bincount(labels, totals["counts"][:, 0]),
            squares=np.bincount(labels, self._cell_squares),
            total=cross.sum(axis=0),
            cross=cross,
            own=np.stack([K[:, g, :, g] for g in range(n)]),
            diagonal=mixed(totals["plain/diagonal"]),
            within=mixed(totals["plain/within"]),
        )
        prompts = round(totals["counts"][:, 1].sum())
        return summarise(sums, ("h", "d"), tuple(plan.layout.sizes), prompts)


class _Gram(NamedTuple):
    """Inner products of all cells' sums in one metric, and what they were centred by.

    Attributes:
        products: ``[L, C, q, C, q]``, of sums less n o (the contrast d as it is).
        dots: ``[C, L, 2 p]``, ``o . S`` and ``o . Q``, Q the sum of n_c times a prompt's sum, as they are.
        square: ``[L]``, ``o . o``.
    """

    products: NDArray[Any]
    dots: NDArray[Any]
    square: NDArray[Any]

    @classmethod
    def zeros(cls, plan: MomentPlan) -> _Gram:
        """Before the first coordinates."""
        blocks, cells, q, p = len(plan.layout.sizes), len(plan.cells), len(plan.products), len(plan.members)
        return cls(np.zeros((blocks, cells * q, cells * q)), np.zeros((cells, blocks, 2 * p)), np.zeros(blocks))

    def add(self, plan: MomentPlan, where: tuple[str, int, int], x: NDArray[Any], sizes: NDArray[Any]) -> None:
        """Adds some coordinates of a block, ``[C, rows, coordinates]``: all members about one origin."""
        block, p, q = list(plan.layout.sizes).index(where[0]), len(plan.members), len(plan.products)
        origin = x[:, :p].sum(axis=(0, 1)) / (sizes.sum() * p)
        dots = x @ origin
        weighted = dots[:, q:] if len(plan.rows) > q else dots[:, :p] * next(iter(plan.counts.values()))
        self.dots[:, block] += np.concatenate([dots[:, :p], weighted], axis=1)
        self.square[block] += origin @ origin
        x[:, :p] -= sizes[:, None, None] * origin
        flat = x[:, :q].reshape(-1, x.shape[-1])
        self.products[block] += flat @ flat.T


@dataclass(frozen=True)
class _Columns:
    """Where the columns of a block lie in that of theta, for sketches: pieces (start, stop, offset there)."""

    pieces: list[tuple[int, int, int]]
    size: int
    width: int

    def fold(self, x: Float[Tensor, "p n d"]) -> Float[Tensor, "p n width"]:
        """`bvpo_stats.statistics.moments.sketch` of the vectors of theta that these are the nonzero parts of."""
        exact = self.size <= self.width
        width = self.size if exact else self.width
        total = x.new_zeros((*x.shape[:2], width), dtype=torch.float64)
        for start, stop, offset in self.pieces:
            part = x[..., start:stop]
            if not exact:
                part = part * torch.from_numpy(signs(self.size)[offset : offset + stop - start]).to(x)
            shift = offset % width
            part = torch.nn.functional.pad(part, (shift, -(shift + stop - start) % width))
            total += part.unflatten(-1, (-1, width)).sum(dim=-2, dtype=torch.float64)
        return total


def _columns(plan: MomentPlan, block: str) -> _Columns:
    pieces: list[tuple[int, int, int]] = []
    for name, (home, start, size) in plan.layout.places.items():
        if home == block:
            offset = plan.whole.places[name][1]
            if pieces and (pieces[-1][1], pieces[-1][2] - pieces[-1][0]) == (start, offset - start):
                pieces[-1] = (pieces[-1][0], start + size, pieces[-1][2])
            else:
                pieces.append((start, start + size, offset))
    return _Columns(pieces, plan.whole.sizes[block], sketch_width(len(plan.whole.sizes)))


def _inner(x: Float[Tensor, "q n d"], scale: Tensor | None) -> Float[Tensor, "n q q"]:
    """Inner products of the q vectors of each of n examples, in float64."""
    total = torch.zeros(x.shape[1], x.shape[0], x.shape[0], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[2], _CHUNK):
        part = x[..., start : start + _CHUNK].transpose(0, 1).double()
        if scale is not None:
            part = part * scale[start : start + _CHUNK]
        total += part @ part.mT
    return total


def _by_label(x: Tensor, labels: NDArray[Any], count: int) -> Tensor:
    """Sums ``[q, examples, d]`` over the examples of each prompt."""
    where = torch.from_numpy(labels).to(x.device)
    return x.new_zeros(x.shape[0], count, x.shape[2]).index_add_(1, where, x)


def _added(values: NDArray[Any], labels: NDArray[Any] | None, count: int) -> NDArray[Any]:
    """Sums ``[examples or cells, ...]`` over those of each label; as they are where each has its own (None)."""
    if labels is None:
        return values
    total = np.zeros((count, *values.shape[1:]))
    np.add.at(total, labels, values)
    return total


def _merged(products: NDArray[Any], labels: NDArray[Any], n: int) -> NDArray[Any]:
    """``[L, C q, C q]`` to ``[L, n, q, n, q]``, cells of one label added up."""
    blocks, q = len(products), products.shape[1] // len(labels)
    x = products.reshape(blocks, len(labels), q, len(labels), q)
    if n == len(labels) and (labels == np.arange(n)).all():
        return x
    found = np.zeros((blocks, n, q, n, q))
    for cell, label in enumerate(labels.tolist()):
        for other, second in enumerate(labels.tolist()):
            found[:, label, :, second] += x[:, cell, :, other]
    return found
