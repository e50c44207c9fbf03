"""One cell of the acceptance of alpha*: replicate samples of a population with K-trace estimates of mu, all checks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bvpo_stats.lab.acceptance.checks import Check, acceptance, collect
from bvpo_stats.lab.acceptance.replicates import quick_ratios
from bvpo_stats.lab.oracle.trace_sets import METHODS, TraceMethod, TraceSets
from bvpo_stats.statistics import MomentSummary, summary_of_arrays
from bvpo_stats.statistics.estimates import LinearRatio
from bvpo_stats.statistics.moments import Grouping

TAUS = (1.0, 1 / 8, 1 / 128)
_PAIRS_AT_ONCE = 1_600_000


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        temperature: Sampling temperature.
        drift: Distance of theta from theta_ref; 0 for none.
        beta: DPO's beta.
        method: Estimator of mu.
        n_prompts: N.
        statistic: ``U``, or ``V`` for the injected error.
        groups: Jackknife groups; None leaves single prompts out, ``auto`` does what the program does.
    """

    temperature: float
    drift: float
    beta: float
    method: TraceMethod
    n_prompts: int
    statistic: str = "U"
    groups: Grouping = "auto"


@dataclass(frozen=True)
class CellResult:
    """What a cell showed.

    Attributes:
        cell: Which.
        unbiased_by_construction: Whether the estimator of mu has no bias here.
        alpha_unc: Exact alpha_unc at each of :data:`TAUS`.
        predicted_shift: What the exact bias of mu does to it.
        checks: Coverage and bias.
        seconds: Time taken.
    """

    cell: Cell
    unbiased_by_construction: bool
    alpha_unc: tuple[float, ...]
    predicted_shift: tuple[float, ...]
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)


def v_statistics(summary: MomentSummary) -> MomentSummary:
    """The same moments with the diagonal put back, S_a . S_b / N^2: what U-statistics are there to avoid."""
    without = summary.group_sizes.sum(axis=-1, keepdims=True) - summary.group_sizes
    n = np.concatenate([without[..., :1] + summary.group_sizes[..., :1], without], axis=-1)[..., None, None, None]
    return replace(summary, U=(summary.U * (n - 1) + summary.M) / n)


def samples(
    sets: TraceSets, cell: Cell, replicates: int, seed: int
) -> Iterator[tuple[MomentSummary, list[LinearRatio]]]:
    """Replicate samples of a cell with alpha at `TAUS`, some at a time to bound memory."""
    entropy = [seed, *(round(1000 * x) for x in (cell.temperature, cell.drift, cell.beta))]
    rng = np.random.default_rng([*entropy, METHODS.index(cell.method), cell.n_prompts])
    chunk = max(1, _PAIRS_AT_ONCE // cell.n_prompts**2)
    for start in range(0, replicates, chunk):
        size = min(chunk, replicates - start)
        vectors = sets.draw((size, cell.n_prompts), cell.method, rng)
        summary = summary_of_arrays(vectors, groups=cell.groups)
        summary = summary if cell.statistic == "U" else v_statistics(summary)
        if cell.groups == "auto":
            yield summary, quick_ratios(vectors, TAUS, injected=cell.statistic == "V")
        else:
            yield summary, [LinearRatio.alpha(summary, tau) for tau in TAUS]


def run_cell(sets: TraceSets, cell: Cell, replicates: int, seed: int = 0) -> CellResult:
    """Draws the replicates of a cell and makes every check on them."""
    started = time.perf_counter()
    checks = acceptance(collect(samples(sets, cell, replicates, seed), TAUS), sets.truth(cell.method))
    return CellResult(
        cell=cell,
        unbiased_by_construction=sets.unbiased(cell.method),
        alpha_unc=tuple(sets.exact.alpha(tau) for tau in TAUS),
        predicted_shift=tuple(sets.predicted_shift(cell.method, tau) for tau in TAUS),
        checks=tuple(checks),
        seconds=time.perf_counter() - started,
    )
