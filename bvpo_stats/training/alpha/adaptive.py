"""The adaptive controller: averages of the steps' own products, and a rule that makes the next alpha of them.

**Estimates.** `bvpo_stats.training.alpha.lagged`: products of step means in the optimizer's metric give norm(h)^2, E
g_e . h, P1 and Q1 (h = E g_t - E g_e) at no extra pass. Of what alpha needs only c . h, c the bias of the trace
gradient, needs mu; it comes from looks at the prompts of a step whose traces are in the bank, and is 0, its best
guess near theta_ref, without.

**Decision.** `bvpo_stats.training.alpha.rules`: a rule by name. Estimates are shrunk toward the prior by their own
variance; nothing is held until an interval excludes it. The interval is reported beside, at one level, and decides
nothing.

alpha_k rests on steps before k only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from bvpo_stats.errors import UserError
from bvpo_stats.statistics.moments import Array
from bvpo_stats.training.alpha.base import PRIOR, AlphaRecord, Observation, check_alpha
from bvpo_stats.training.alpha.fixed import FixedController
from bvpo_stats.training.alpha.lagged import SHARED, SHARED_AT_MOST, BiasAverage, ProductAverages
from bvpo_stats.training.alpha.rules import DEFAULT_RULE, Decision, Rule, Seen, rule_named
from bvpo_stats.training.alpha.rules.base import Parts


@dataclass(frozen=True)
class AdaptiveOptions:
    """How alpha is estimated.

    Attributes:
        rule: What is done with the estimates, a name in `RULES`.
        prior: alpha before anything is known, and what estimates are shrunk toward.
        level: Level of the interval in log and report; None for none, which is much faster for many runs at once.
    """

    rule: str = DEFAULT_RULE
    prior: float = PRIOR
    level: float | None = 0.95

    def __post_init__(self) -> None:
        check_alpha(self.prior)
        if self.level is not None and not 0 < self.level < 1:
            raise UserError(f"confidence levels lie between 0 and 1, got {self.level}.")
        rule_named(self.rule)


@dataclass(frozen=True)
class AdaptiveController:
    """Estimates alpha during the run; see the module.

    With arrays of a shape in its products it serves as many runs at once.

    Attributes:
        options: How.
        averages: Of the steps' products.
        bias: Of the looks.
        decision: What the rule said last.
        observation: What was seen last; None before the first step.
    """

    options: AdaptiveOptions
    averages: ProductAverages = field(repr=False)
    bias: BiasAverage = field(repr=False)
    decision: Decision = field(repr=False)
    observation: Observation | None = field(default=None, repr=False)

    @classmethod
    def start(cls, options: AdaptiveOptions | None = None, shape: tuple[int, ...] = ()) -> AdaptiveController:
        """Before the first step: what the rule says to nothing."""
        options = options or AdaptiveOptions()
        prior = Decision(np.full(shape, options.prior), known=False)
        new = cls(options, ProductAverages.empty(shape), BiasAverage.empty(), prior)
        return replace(new, decision=new._decide(Observation(-1, 1.0)))

    @property
    def alpha(self) -> float:
        """Weight of the trace gradient in the next step of a single run."""
        return float(self.decision.alpha)

    @property
    def wants_data(self) -> bool:
        """Whether `update` looks at products at all: always."""
        return True

    @property
    def rule(self) -> Rule:
        """The rule."""
        return rule_named(self.options.rule)

    def update(self, observation: Observation) -> AdaptiveController:
        """Takes in what a step showed and chooses the alpha of the next step."""
        averages, bias = self.averages, self.bias
        if observation.products is not None and observation.products.usable:
            averages = averages.add(observation.products)
        if observation.bias is not None:
            bias = bias.add(*observation.bias)
        after = replace(self, averages=averages, bias=bias, observation=observation)
        return replace(after, decision=after._decide(observation))

    def _decide(self, observation: Observation) -> Decision:
        averages, products = self.averages, observation.products
        shape = self.decision.alpha.shape
        statistics = np.concatenate([averages.mean, np.broadcast_to(self.bias.mean, (*shape, 2))], axis=-1)
        covariance, widest = np.zeros((*shape, 8, 8)), np.zeros((*shape, 8, 8))
        for both, shared in ((covariance, SHARED), (widest, SHARED_AT_MOST)):
            both[..., :6, :6], both[..., 6:, 6:] = averages.covariance(shared), self.bias.covariance
        lagged = products is not None and products.usable and products.behind > 0
        seen = Seen(
            statistics=statistics,
            covariance=covariance,
            widest=widest,
            effective=averages.effective,
            products=averages.products,
            batch=averages.batch if averages.steps else 1.0,
            batch_size=observation.batch_size,
            eta_l=np.broadcast_to(np.asarray(observation.eta_l, dtype=np.float64), shape),
            progress=observation.progress,
            prior=self.options.prior,
            alpha=self.decision.alpha,
            latest=np.concatenate([products.within, products.lagged], axis=-1) if lagged and products else None,
            influences=averages.influences,
            shares=None if averages.shares is None else averages.shares[:, 0],
            sizes=None if averages.recent is None else averages.recent[..., 0],
        )
        return self.rule.decide(seen, self.options.level)

    @property
    def record(self) -> AlphaRecord:
        """What the present alpha of a single run rests on."""
        seen, decision = self.observation, self.decision
        if seen is None or not self.averages.steps:
            nothing = AlphaRecord(-1, self.alpha, f"{self.rule.name}: nothing is known yet")
            if seen is None:
                return nothing
            eta_l = float(seen.eta_l)
            return replace(nothing, step=seen.step, batch_size=seen.batch_size, eta_l=eta_l, time_share=seen.time_share)
        parts = Parts.of(np.concatenate([self.averages.mean, self.bias.mean]), self.averages.batch)
        numbers = {name: float(getattr(parts, name)) for name in ("h_sq", "e_h", "P1", "Q1", "c_h")}
        return AlphaRecord(
            seen.step,
            self.alpha,
            self.rule.name if decision.known else f"{self.rule.name}: {self._unknown()}",
            estimate=_number(decision.estimate),
            low=_number(decision.low),
            high=_number(decision.high),
            level=self.options.level,
            n_eff=_number(decision.n_eff),
            largest=_number(decision.largest),
            **numbers,
            batch_size=seen.batch_size,
            eta_l=float(seen.eta_l),
            prompts=round(float(self.averages.weights[0])),
            bias_prompts=self.bias.prompts,
            time_share=seen.time_share,
        )

    def _unknown(self) -> str:
        few = f"{self.averages.products} steps with earlier ones of their epoch"
        return f"{few} are too few to estimate from"

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; `from_state` goes on bit for bit."""
        seen = self.observation
        plain = None if seen is None else asdict(replace(seen, products=None, bias=None)) | {"eta_l": float(seen.eta_l)}
        decided = {name: _plain(value) for name, value in vars(self.decision).items()}
        return {
            "kind": "adaptive",
            "options": asdict(self.options),
            "averages": self.averages.to_state(),
            "bias": self.bias.to_state(),
            "decision": decided,
            "observation": plain,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AdaptiveController:
        """Read what `to_state` wrote."""
        known = state["decision"]["known"]
        arrays: dict[str, Any] = {
            k: None if v is None else np.array(v) for k, v in state["decision"].items() if k != "known"
        }
        return cls(
            options=AdaptiveOptions(**state["options"]),
            averages=ProductAverages.from_state(state["averages"]),
            bias=BiasAverage.from_state(state["bias"]),
            decision=Decision(**arrays, known=known),
            observation=None if state["observation"] is None else Observation(**state["observation"]),
        )


def _number(value: Array | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


Controller = FixedController | AdaptiveController
"""What decides alpha in training: `alpha` and its `record`, `update` after a step, `to_state`."""
