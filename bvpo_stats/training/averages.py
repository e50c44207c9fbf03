"""Averages over a run with more weight on recent steps: of unbiased parts only, never of vectors or of alphas.

An average of within-step U-statistics is unbiased for the average of what they estimate; multiplying averaged vectors
would put the diagonal back and add the drift of theta. What is averaged are the parts of numerator and denominator,
since alpha at another step size is another combination of the same parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.estimates import Estimates, estimates
from bvpo_stats.statistics.moments import Moments
from bvpo_stats.statistics.summary import Array

_OPTIONAL = ("var_trace_sampling", "within_trace", "within_empty")
PARTS = tuple(f.name for f in fields(Estimates) if f.name not in _OPTIONAL)
"""Estimates averaged over probes."""


@dataclass(frozen=True)
class ProbeAverage:
    """Weighted average of the estimates of successive probes, with each jackknife group left out.

    Weights fall by ``decay`` from one probe to the next. The value without group g is the average of the values without
    group g; a group is fixed by its prompts' ids, so what two probes share is left out of both at once, and the
    jackknife of the average needs no assumption about how probes are correlated.

    Attributes:
        weight: Sum of the weights.
        probes: Probes seen.
        prompts: Prompts in the latest.
        rows: ``[parts, 1 + G]``, weighted sums of `PARTS`.
        sizes: ``[G]``, weighted sums of the examples in each group.
        trace_sampling: Weighted sum of the trace-sampling variance, and its weight.
    """

    weight: float
    probes: int
    prompts: int
    rows: Array
    sizes: Array
    trace_sampling: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def empty(cls) -> ProbeAverage:
        """Nothing seen yet."""
        return cls(0.0, 0, 0, np.zeros((len(PARTS), 1)), np.zeros(0))

    def add(self, moments: Moments, decay: float) -> ProbeAverage:
        """Add a probe."""
        summary = moments.finalize()
        found = estimates(summary)
        filled = np.array([g is not None for g in moments.groups])
        rows = np.repeat(np.stack([getattr(found, name)[:1] for name in PARTS]), 1 + len(filled), axis=1)
        # A group without prompts in this probe: leaving it out changes nothing.
        rows[:, 1:][:, filled] = np.stack([getattr(found, name)[1:] for name in PARTS])
        sizes = np.zeros(len(filled))
        sizes[filled] = summary.group_sizes
        sampled, counted = (decay * x for x in self.trace_sampling)
        if found.var_trace_sampling is not None:
            sampled, counted = sampled + float(found.var_trace_sampling[0]), counted + 1.0
        old = decay if self.probes else 0.0
        if self.probes and self.rows.shape != rows.shape:
            raise UserError("probes must have one number of jackknife groups throughout a run.")
        return ProbeAverage(
            weight=old * self.weight + 1.0,
            probes=self.probes + 1,
            prompts=summary.n_prompts,
            rows=old * self.rows + rows if self.probes else rows,
            sizes=old * self.sizes + sizes if self.probes else sizes,
            trace_sampling=(sampled, counted),
        )

    @property
    def groups(self) -> NDArray[np.bool_]:
        """Groups that have held prompts."""
        return self.sizes > 0

    def estimates(self) -> Estimates:
        """The averages, arrays ``[1 + G']`` over the groups that have held prompts."""
        keep = np.concatenate([[True], self.groups])
        values = {name: self.rows[k, keep] / self.weight for k, name in enumerate(PARTS)}
        sampled, counted = self.trace_sampling
        sampling = np.full(int(keep.sum()), sampled / counted) if counted > 0 else None
        return Estimates(**values, var_trace_sampling=sampling)

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; floats survive exactly."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ProbeAverage:
        """Read what `to_state` wrote."""
        rows = np.array(state["rows"], dtype=np.float64).reshape(len(PARTS), -1)
        sampled, counted = state["trace_sampling"]
        sizes = np.array(state["sizes"], dtype=np.float64)
        return cls(state["weight"], state["probes"], state["prompts"], rows, sizes, (sampled, counted))


@dataclass(frozen=True)
class StepAverage:
    """Weighted average of ``(tr Sigma_t, tr Sigma_te, tr Sigma_e)`` over training steps, with its uncertainty.

    Steps are independent data, so the spread of the steps about their average gives the covariance of the average (too
    large where theta drifts, never too small):

        v = (W_2 / W^2) / (1 - W_2 / W^2) * sum_k w_k (x_k - mean)(x_k - mean)' / W.

    Attributes:
        weight: W, sum of the weights.
        squares: W_2, sum of their squares.
        steps: Steps seen.
        mean: ``[3]``.
        scatter: ``[3, 3]``, weighted sum of squares about the mean.
    """

    weight: float
    squares: float
    steps: int
    mean: Array
    scatter: Array

    @classmethod
    def empty(cls) -> StepAverage:
        """Nothing seen yet."""
        return cls(0.0, 0.0, 0, np.zeros(3), np.zeros((3, 3)))

    def add(self, covariance: tuple[float, float, float], decay: float) -> StepAverage:
        """Add a step's ``tr Sigma_t, tr Sigma_te, tr Sigma_e``."""
        old = decay * self.weight
        gap = np.asarray(covariance, dtype=np.float64) - self.mean
        weight = old + 1.0
        return StepAverage(
            weight=weight,
            squares=decay**2 * self.squares + 1.0,
            steps=self.steps + 1,
            mean=self.mean + gap / weight,
            scatter=decay * self.scatter + (old / weight) * np.outer(gap, gap),
        )

    @property
    def usable(self) -> bool:
        """Whether an uncertainty exists."""
        return self.steps >= 2

    @property
    def covariance(self) -> Array:
        """Covariance of `mean`, ``[3, 3]``."""
        share = self.squares / self.weight**2
        return self.scatter / self.weight * share / (1 - share)

    def put_into(self, parts: Estimates) -> Estimates:
        """The same estimates with the variances of the training steps in place of the probe's."""
        t, te, e = (np.full_like(parts.var_trace, x) for x in self.mean)
        return replace(parts, var_trace=t, var_cross=te, var_empty=e)

    def ratio_covariance(self, scale: float) -> Array:
        """Covariance of ``scale * (P1, Q1)``, ``P1 = e - te``, ``Q1 = t + e - 2 te``: ``[2, 2]``."""
        map_ = scale * np.array([[0.0, -1.0, 1.0], [1.0, -2.0, 1.0]])
        return map_ @ self.covariance @ map_.T

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; floats survive exactly."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StepAverage:
        """Read what `to_state` wrote."""
        mean, scatter = (np.array(state[name], dtype=np.float64) for name in ("mean", "scatter"))
        return cls(state["weight"], state["squares"], state["steps"], mean, scatter)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
