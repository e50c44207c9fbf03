"""How far a pass over prompts has got: moments, trace diagnostics and finished prompts, on disk in one file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.engine import BlockLayout
from bvpo_stats.gradients.marginal import SideDiagnostics, WeightDiagnostics
from bvpo_stats.gradients.stream import GradientBatch
from bvpo_stats.model.subset import Subset
from bvpo_stats.statistics.alpha import adam_metric, in_metric
from bvpo_stats.statistics.moments import Grouping, Moments, jackknife_groups

MOMENTS_FILE = "moments.npz"
_SAVE_EVERY_SECONDS = 30.0
_HALVES_GROUPS = 5  # enough for a test of one number, at a quarter of the memory
_SAVE_SHARE = 20.0  # a save may take one part in so many of the time


@dataclass(frozen=True)
class PassState:
    """What is known after some of the prompts.

    Attributes:
        moments: Moments of the gradients; None before the first batch.
        adam: The same in Adam's metric, where there is one.
        halves: Moments of ``h = t - e`` and ``d = m1 - m2``, m from either half of the traces, where there are halves.
        done: Prompts that are in them.
        diagnostics: Trace weights of those prompts.
    """

    moments: Moments | None = None
    adam: Moments | None = None
    halves: Moments | None = None
    done: frozenset[str] = frozenset()
    diagnostics: tuple[SideDiagnostics, ...] = ()

    def add(
        self, batch: GradientBatch, n_prompts: int, groups: Grouping, metric: dict[str, NDArray] | None = None
    ) -> PassState:
        """The state after one more batch.

        Args:
            batch: Gradients of prompts that are not in yet.
            n_prompts: Prompts of the whole pass, in all processes.
            groups: Jackknife groups asked for.
            metric: Block to the diagonal of Adam's metric.
        """
        vectors = batch.vectors
        members, blocks = tuple(name for name in vectors if name not in ("m1", "m2")), tuple(vectors["t"])
        found = jackknife_groups(n_prompts, sum(x.shape[1] for x in vectors["t"].values()), len(members), groups)
        moments = self.moments or Moments.init(members, blocks, found)
        adam = self.adam
        if metric is not None:
            scaled = {name: _scaled(vectors[name], metric) for name in members}
            adam = (adam or Moments.init(members, blocks, found)).update(scaled, batch.prompt_ids)
        halves = self.halves
        if "m1" in vectors:
            contrasts = {"h": _difference(vectors["t"], vectors["e"]), "d": _difference(vectors["m1"], vectors["m2"])}
            halves = halves or Moments.init(("h", "d"), blocks, _HALVES_GROUPS)
            halves = halves.update(contrasts, batch.prompt_ids)
        return PassState(
            moments=moments.update(vectors, batch.prompt_ids, trace2=batch.trace2),
            adam=adam,
            halves=halves,
            done=self.done | set(batch.prompt_ids),
            diagnostics=(*self.diagnostics, *batch.diagnostics),
        )

    def merge(self, other: PassState) -> PassState:
        """The state of two passes over different prompts."""
        return PassState(
            moments=_merged(self.moments, other.moments),
            adam=_merged(self.adam, other.adam),
            halves=_merged(self.halves, other.halves),
            done=self.done | other.done,
            diagnostics=(*self.diagnostics, *other.diagnostics),
        )

    def to_arrays(self) -> dict[str, NDArray]:
        """Plain arrays; `from_arrays` reads them."""
        arrays: dict[str, NDArray] = {
            "done": np.array(json.dumps(sorted(self.done))),
            "diagnostics": np.array(json.dumps([asdict(entry) for entry in self.diagnostics])),
        }
        for name, moments in (("moments", self.moments), ("adam", self.adam), ("halves", self.halves)):
            if moments is not None:
                arrays |= {f"{name}:{key}": value for key, value in moments.to_arrays().items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray]) -> PassState:
        """Reads what `to_arrays` wrote."""
        parts: dict[str, dict[str, NDArray]] = {"moments": {}, "adam": {}, "halves": {}}
        for key, value in arrays.items():
            name, separator, rest = key.partition(":")
            if separator:
                parts[name][rest] = value
        rows = json.loads(str(arrays["diagnostics"]))
        return cls(
            **{name: Moments.from_arrays(part) for name, part in parts.items() if part},
            done=frozenset(json.loads(str(arrays["done"]))),
            diagnostics=tuple(
                SideDiagnostics(**{**row, "weights": WeightDiagnostics(**row["weights"])}) for row in rows
            ),
        )


@dataclass
class Checkpoint:
    """The file of a pass: saved now and then, so that a kill costs little and saving even less.

    Attributes:
        path: The file; None to keep nothing.
        state: What was restored, then what is known.
    """

    path: Path | None
    state: PassState = field(default_factory=PassState)
    _saved: PassState | None = None
    _next_save: float = 0.0

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            try:
                with np.load(self.path, allow_pickle=False) as stored:
                    self.state = PassState.from_arrays(dict(stored))
            except Exception as error:  # numpy raises many kinds for damaged files
                raise UserError(f"Cannot read {self.path} ({error}). Delete it to start over.") from error
        self._saved = self.state
        self._next_save = time.monotonic() + _SAVE_EVERY_SECONDS

    def update(self, state: PassState) -> None:
        """Takes the state after a batch, and saves it if the last save is long enough ago."""
        self.state = state
        if time.monotonic() >= self._next_save:
            self.save()

    def save(self) -> None:
        """Writes the state, unless it is on disk already."""
        if self.path is None or self._saved is self.state:
            return
        started = time.monotonic()
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:  # straight to disk: a copy in memory would double what the moments take
            with temporary.open("wb") as handle:
                np.savez(handle, **self.state.to_arrays())  # type: ignore[arg-type]
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"Cannot write {self.path}: {error.strerror}. Free some space and run again.") from error
        self._saved = self.state
        now = time.monotonic()
        self._next_save = now + max(_SAVE_EVERY_SECONDS, _SAVE_SHARE * (now - started))


def merge_states(states: Iterable[PassState]) -> PassState:
    """All passes together, diagnostics in the order of prompts."""
    total = PassState()
    for state in states:
        total = total.merge(state)
    return replace(total, diagnostics=tuple(sorted(total.diagnostics, key=lambda d: (d.prompt_id, d.side))))


def block_metric(subset: Subset, second_moments: dict[str, NDArray], epsilon: float = 1e-8) -> dict[str, NDArray]:
    """Diagonal of Adam's metric for every block, its weights strung together as in the gradients.

    Args:
        subset: The parameters.
        second_moments: Adam's second moments by parameter name, flat.
        epsilon: Adam's epsilon.
    """
    layout = BlockLayout.of(subset)
    metric = {block: np.empty(size) for block, size in layout.sizes.items()}
    for name, (block, offset, size) in layout.places.items():
        metric[block][offset : offset + size] = adam_metric(second_moments[name], epsilon)
    return metric


def _difference(first: dict[str, NDArray], second: dict[str, NDArray]) -> dict[str, NDArray]:
    return {block: first[block] - second[block] for block in first}


def _scaled(vectors: dict[str, NDArray], metric: dict[str, NDArray]) -> dict[str, NDArray]:
    return {block: in_metric({"v": values}, metric[block])["v"] for block, values in vectors.items()}


def _merged(first: Moments | None, second: Moments | None) -> Moments | None:
    if first is None or second is None:
        return second if first is None else first
    return first.merge(second)
