"""What the variance figures draw besides the tables: distributions by mode, and NLL along a response."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bvpo_stats.records import MODES, Mode
from bvpo_stats.statistics.proportions import Interval, jackknife_interval
from bvpo_stats.studies.variance.tables import ScoredSample

_BINS = 30
# Positions are counted in tokens from the start of the segment; bins widen so that long traces stay readable.
_EDGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
          6144, 8192, 12288, 16384, 32768, 65536, 131072)  # fmt: skip


@dataclass(frozen=True)
class Histogram:
    """Counts by mode on shared bins.

    Attributes:
        edges: Bin edges, one more than bins.
        counts: Complete responses per bin, by mode.
    """

    edges: tuple[float, ...]
    counts: dict[Mode, tuple[int, ...]]


@dataclass(frozen=True)
class PositionBin:
    """Mean NLL (nats per token) of the tokens at positions start <= i < stop of a segment."""

    start: int
    stop: int
    tokens: int
    nll: Interval


def histogram(samples: Iterable[ScoredSample], what: str) -> Histogram:
    """Distribution of ``length`` or ``logp`` over complete responses, by mode."""
    values = {
        mode: np.array([getattr(s, what) for s in samples if s.mode == mode and s.complete], dtype=np.float64)
        for mode in MODES
    }
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=_BINS)
    counts = {mode: tuple(int(c) for c in np.histogram(v, bins=edges)[0]) for mode, v in values.items()}
    return Histogram(tuple(float(e) for e in edges), counts)


class PositionProfile:
    """Collects NLL by position, per question, so that the intervals are by clusters."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Float[np.ndarray, "two bins"]]] = {
            "trace": {},
            "answer": {},
            "no-trace answer": {},
        }

    def add(self, prompt_id: str, segment: str, logprobs: Float[np.ndarray, " tokens"]) -> None:
        """Adds the tokens of one segment (``trace``, ``answer`` or ``no-trace answer``) of one response."""
        bins = np.searchsorted(_EDGES, np.arange(len(logprobs)), side="right") - 1
        size = len(_EDGES) - 1
        sums = self._sums[segment].setdefault(prompt_id, np.zeros((2, size)))
        sums[0] += np.bincount(bins, weights=-np.asarray(logprobs, dtype=np.float64), minlength=size)[:size]
        sums[1] += np.bincount(bins, minlength=size)[:size]

    def bins(self, level: float) -> dict[str, list[PositionBin]]:
        """Token-pooled mean NLL of each bin with its interval; bins that one question alone reaches are left out."""
        result: dict[str, list[PositionBin]] = {}
        for segment, by_prompt in self._sums.items():
            result[segment] = []
            if not by_prompt:
                continue
            rows = np.stack([by_prompt[key] for key in sorted(by_prompt)])  # [questions, 2, bins]
            for i in range(rows.shape[2]):
                reached = rows[rows[:, 1, i] > 0, :, i]
                if len(reached) < 2:
                    continue
                nll = jackknife_interval(reached, lambda x: x[..., 0] / x[..., 1], level=level, positive=True)
                result[segment].append(PositionBin(_EDGES[i], _EDGES[i + 1], int(reached[:, 1].sum()), nll))
        return result
