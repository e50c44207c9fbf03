"""The adaptive controller: alpha_k = clip(averaged B / averaged A), used once the data exclude the prior.

**Parts.** Numerator and denominator depend on the step size through ``tau = eta L / B``, which a learning-rate schedule
changes. So the *parts* ``P0, P1, Q0, Q1`` are averaged over the run, and the ratio

    alpha(tau) = (P0 + tau P1) / (Q0 + tau Q1)

is formed at the tau of the step to come. ``P1`` and ``Q1`` come from the training micro-batches' own gradients (every
step, at no cost), ``P0`` and ``Q0``, which need mu, from a held-out probe set (now and then).

**Criterion.** ``error`` minimises Theorem 4's ``norm(bias)^2 + tau Var``. ``descent`` keeps the term that the proof of
Theorem 3 drops (alpha_J of `bvpo_stats.statistics.estimates.Estimates.alpha_j_parts`), for ``eta L < 1``; the two agree
at ``eta L = 1`` and the former takes over beyond it.

**Uncertainty.** The probe's part by the jackknife over groups of prompts, carried through the average; the training
steps' part by their spread; both in Fieller's set for the ratio, which is unbounded where the denominator is not
clearly positive. Then, or while the set at ``act_level`` contains the prior, the prior is held: a noisy alpha costs
``A E(alpha-hat - alpha)^2``, so it must be surer than the prior is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.estimates import Estimates, estimates
from bvpo_stats.statistics.intervals import BOUNDED, RatioSets, ratio_sets
from bvpo_stats.statistics.moments import Array, Moments
from bvpo_stats.training.alpha.base import PRIOR, AlphaRecord, Observation, check_alpha

Criterion = Literal["error", "descent"]
_MIN_GROUPS = 4  # a jackknife over fewer groups has no interval worth the name


@dataclass(frozen=True)
class AdaptiveOptions:
    """How alpha is estimated.

    Attributes:
        prior: alpha until the data say otherwise.
        decay: Weight of what was known before one more probe: 0 forgets at once, 0.9 averages about ten probes.
        step_decay: The same from one training step to the next.
        level: Level of the interval in the log.
        act_level: The interval of this level must exclude the prior. 0.683 is one standard error.
        criterion: What alpha minimises, see the module.
        min_prompts: A smaller probe set is not believed.
    """

    prior: float = PRIOR
    decay: float = 0.8
    step_decay: float = 0.95
    level: float = 0.95
    act_level: float = 0.683
    criterion: Criterion = "error"
    min_prompts: int = 8

    def __post_init__(self) -> None:
        check_alpha(self.prior)
        if not (0 <= self.decay < 1 and 0 <= self.step_decay < 1):
            raise UserError(
                f"the decays of averages must lie in [0, 1), got {self.decay} per probe and {self.step_decay} per step."
            )
        if not (0 < self.level < 1 and 0 < self.act_level < 1):
            raise UserError(f"confidence levels lie between 0 and 1, got {self.level} and {self.act_level}.")
        if self.criterion not in ("error", "descent"):
            raise UserError(f"alpha criterion {self.criterion!r}: choose error or descent.")


# Averages over the run give more weight to recent steps. They are of unbiased parts only, never of vectors or of
# alphas: an average of within-step U-statistics is unbiased for the average of what they estimate, while the product
# of averaged vectors would put the diagonal back and add the drift of theta.

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
        filled = np.array([g in moments.groups for g in range(moments.n_groups or 0)])
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


@dataclass(frozen=True)
class AdaptiveController:
    """Estimates alpha during the run; see the module.

    Attributes:
        options: How.
        record: The present alpha and what it rests on.
        probes: Averaged estimates of the probes.
        steps: Averaged variances of the training steps.
    """

    options: AdaptiveOptions
    record: AlphaRecord
    probes: ProbeAverage = field(repr=False)
    steps: StepAverage = field(repr=False)

    @classmethod
    def start(cls, options: AdaptiveOptions | None = None) -> AdaptiveController:
        """Before the first step: the prior."""
        options = options or AdaptiveOptions()
        record = AlphaRecord(-1, options.prior, "held: no probe yet")
        return cls(options, record, ProbeAverage.empty(), StepAverage.empty())

    @property
    def alpha(self) -> float:
        """Weight of the trace gradient in the next step."""
        return self.record.alpha

    @property
    def wants_data(self) -> bool:
        """Yes."""
        return True

    def update(self, observation: Observation) -> AdaptiveController:
        """Takes in what a step and a probe showed and chooses the alpha of the next step."""
        steps, probes, probe = self.steps, self.probes, observation.probe
        if observation.sums is not None and observation.sums.usable:
            steps = steps.add(observation.sums.covariance(), self.options.step_decay)
        none = "held: no probe yet"
        if probe is not None:
            if probe.n_prompts < self.options.min_prompts or len(probe.groups) < _MIN_GROUPS:
                none = f"held: a probe of {probe.n_prompts} prompts is too small"
            else:
                probes = probes.add(probe, self.options.decay)
        after = replace(self, steps=steps, probes=probes)
        plain = AlphaRecord(
            observation.step,
            self.options.prior,
            none,
            batch_size=observation.batch_size,
            eta_l=observation.eta_l,
            time_share=observation.time_share,
        )
        return replace(after, record=after._decide(plain, observation) if probes.probes else plain)

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; `from_state` goes on bit for bit."""
        return {
            "kind": "adaptive",
            "options": asdict(self.options),
            "record": asdict(self.record),
            "probes": self.probes.to_state(),
            "steps": self.steps.to_state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AdaptiveController:
        """Read what `to_state` wrote."""
        return cls(
            options=AdaptiveOptions(**state["options"]),
            record=AlphaRecord(**state["record"]),
            probes=ProbeAverage.from_state(state["probes"]),
            steps=StepAverage.from_state(state["steps"]),
        )

    def _decide(self, plain: AlphaRecord, observation: Observation) -> AlphaRecord:
        parts, options = self.parts(), self.options
        reported, acted = (self._sets(parts, observation, level) for level in (options.level, options.act_level))
        low, high, _ = reported.clipped()
        estimate = float(reported.ratio)
        record = replace(
            _with_parts(plain, parts, self.probes.prompts),
            estimate=estimate if np.isfinite(estimate) else None,
            low=float(low),
            high=float(high),
            level=options.level,
        )
        if acted.shape != BOUNDED or not np.isfinite(estimate):
            return replace(record, why="held: not identified")
        if acted.contains(options.prior):
            return replace(record, why="held: the interval contains the prior")
        return replace(record, alpha=float(np.clip(estimate, 0.0, 1.0)), why="estimated")

    def parts(self) -> Estimates:
        """The averaged parts, whole sample first, then each jackknife group left out."""
        found = self.probes.estimates()
        return self.steps.put_into(found) if self.steps.usable else found

    def _sets(self, parts: Estimates, observation: Observation, level: float) -> RatioSets:
        numerator, denominator, scale = ratio_parts(
            parts, observation.batch_size, observation.eta_l, self.options.criterion
        )
        steps = self.steps.ratio_covariance(scale) if self.steps.usable else None
        return ratio_sets(numerator, denominator, self.probes.sizes[self.probes.groups], level, extra=steps)


def ratio_parts(
    parts: Estimates, batch_size: float, eta_l: float, criterion: Criterion = "error"
) -> tuple[Array, Array, float]:
    """Numerator and denominator of alpha, and the factor with which ``P1`` and ``Q1`` enter them.

    ``descent`` has no answer at ``eta L = 0`` (a step of length zero); it falls back on ``error``, the bias-only limit.
    """
    if criterion == "descent" and 0 < eta_l < 1:
        numerator, denominator = parts.alpha_j_parts(eta_l, batch_size)
        return numerator, denominator, 1 / batch_size
    tau = eta_l / batch_size
    return parts.numerator(tau), parts.denominator(tau), tau


def _with_parts(record: AlphaRecord, parts: Estimates, prompts: int) -> AlphaRecord:
    whole = parts.select(0)
    share = None
    if whole.var_trace_sampling is not None and whole.var_trace > 0:
        share = float(whole.var_trace_sampling / whole.var_trace)
    return replace(
        record,
        bias_trace_sq=float(whole.bias_trace_sq),
        bias_empty_sq=float(whole.bias_empty_sq),
        bias_cross=float(whole.bias_cross),
        var_trace=float(whole.var_trace),
        var_empty=float(whole.var_empty),
        var_cross=float(whole.var_cross),
        trace_share=share,
        probe_prompts=prompts,
    )
