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
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.estimates import Estimates
from bvpo_stats.statistics.intervals import BOUNDED, RatioSets, fieller_sets, jackknife_covariance, t_quantile
from bvpo_stats.statistics.summary import Array
from bvpo_stats.training.averages import ProbeAverage, StepAverage
from bvpo_stats.training.controllers import PRIOR, AlphaRecord, check_alpha
from bvpo_stats.training.observations import Observation

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
            groups = sum(group is not None for group in probe.groups)
            if probe.n_prompts < self.options.min_prompts or groups < _MIN_GROUPS:
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
        values, sizes = np.stack([numerator, denominator]), self.probes.sizes[self.probes.groups]
        covariance = jackknife_covariance(values, sizes)
        if self.steps.usable:
            covariance = covariance + self.steps.ratio_covariance(scale)
        return fieller_sets(values[0, 0], values[1, 0], covariance, t_quantile(level, len(sizes)))


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
