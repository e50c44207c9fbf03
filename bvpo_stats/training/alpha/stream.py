"""Alpha over the steps of a run: earlier means, the curvature along the noise, and the controller that they feed.

The training loop hands over what every step has anyway: its mean gradients t_k and e_k as flat vectors, the optimizer's
metric and the next learning rate.

    stream = AlphaStream(make_controller("adaptive"), StepSize(peak=1e-4))
    for step in range(steps):
        alpha = stream.controller.alpha
        ...                                                # t, e, an optimizer step on alpha t + (1 - alpha) e
        stream.observe(StepMeans(step, prompts, t - e, e), metric, next_learning_rate, progress=(step + 1) / steps)
        if stream.direction is not None:                   # now and then: the next pairs at theta + reach * direction
            stream.measured(curvature)

Vectors are numpy arrays or torch tensors, with leading axes for many runs at once.

**eta L in the optimizer's metric.** A step is -eta P g with P diagonal: the identity for SGD, 1 / (sqrt(v) + eps) for
Adam. To second order its noise raises the loss by eta^2 tr(H P Sigma P) / 2, so the eta L that prices variance in the
metric is

    eta L = eta tr(P H P Sigma) / tr(P Sigma),          Sigma = Cov(g_t - g_e),

which for P = 1 is eta tr(H Sigma) / tr Sigma. With u = h_k - hbar, a draw of the noise, and H the Gauss-Newton matrix
of the D_t loss, the two traces are v' H v and u' P u for v = P u, and v' H v = E l''(z) (dz . v)^2 follows from the
log-probabilities of the next step's pairs at theta and at theta + reach v: one forward pass, renewed after `FIRST`
and then every `RENEW` steps and averaged. It follows the schedule through eta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bvpo_stats.statistics.moments import Array
from bvpo_stats.training.alpha.adaptive import Controller
from bvpo_stats.training.alpha.base import Observation, StepSize
from bvpo_stats.training.alpha.lagged import Lag, StepProducts, dot

FIRST = (3, 10)
RENEW = 50
"""Steps after which the curvature is measured: the first, then every so many."""

REACH = 0.5
"""How far along the noise, in peak learning rates: half of what a step's noise moves theta."""

UNSETTLED = 3
"""Steps after which Adam's second moments are worth dividing by: after one they are that step's own squares."""


@dataclass(frozen=True)
class StepMeans:
    """The mean gradients of a step.

    Attributes:
        step: k, from 0.
        prompts: n_k, over all processes.
        h: t_k - e_k, ``[..., parameters]``; given away.
        e: e_k, likewise.
        epoch: Number of the pass over the prompts.
    """

    step: int
    prompts: float
    h: Any
    e: Any
    epoch: int = 0


class AlphaStream:
    """See the module."""

    def __init__(
        self,
        controller: Controller,
        step_size: StepSize,
        batch_size: float = 1.0,
        total: Callable[[Array], Array] = lambda products: products,
    ) -> None:
        """Before the first step.

        Args:
            controller: Decides.
            step_size: How eta L follows from the learning rate.
            batch_size: Prompts of a step, as the settings have it.
            total: Where vectors are spread over processes: inner products of whole vectors from those of the parts.
        """
        self._total = total
        self.controller, self.step_size, self.batch_size = controller, step_size, batch_size
        self.lag = Lag()
        self.direction: Any = None
        """v = P (h_k - hbar), along which the coming step should measure; None where it need not."""
        self._size: Array | None = None

    @property
    def reach(self) -> float | Array:
        """How far to go along `direction`."""
        return REACH * self.step_size.peak

    def observe(
        self,
        means: StepMeans | None,
        metric: Any,
        learning_rate: float | Array,
        *,
        step: int | None = None,
        progress: float | None = None,
        bias: tuple[int, Array, Array] | None = None,
        time_share: float | None = None,
    ) -> None:
        """After an optimizer step.

        Args:
            means: What it showed; None where nothing was formed.
            metric: Diagonal of P after the step, ``[..., parameters]``; None for the identity.
            learning_rate: Of the step to come.
            step: Its number, where there are no means.
            progress: Share of the run that is over.
            bias: See `Observation`.
            time_share: For the log.
        """
        products = None if means is None else self._products(means, metric)
        number = means.step if means is not None else -1 if step is None else step
        self.controller = self.controller.update(
            Observation(
                number,
                self.batch_size,
                self.step_size.at(learning_rate),
                products,
                bias,
                progress,
                time_share,
            )
        )

    def _products(self, means: StepMeans, metric: Any) -> StepProducts | None:
        self.lag = self.lag.of_epoch(means.epoch)
        settled = metric is None or means.step + 1 >= UNSETTLED
        products = self.lag.products(means.prompts, means.h, means.e, metric) if settled else None
        if products is not None:
            products = replace(products, within=self._total(products.within), lagged=self._total(products.lagged))
        number = means.step + 1
        if self.step_size.auto and self.lag.h is not None and (number in FIRST or number % RENEW == 0):
            noise = means.h - self.lag.h
            self.direction = noise if metric is None else metric * noise
            self._size = self._total(dot(noise, self.direction))
        rule = getattr(self.controller, "rule", None)
        self.lag = self.lag.add(means.prompts, means.h, means.e if rule is not None and rule.keeps_empty else None)
        return products

    def measured(self, curvature: Array) -> None:
        """Takes ``v' H v`` of `direction`, the mean over pairs of `Objective.curvature` over reach^2."""
        if self._size is not None:
            self.step_size = self.step_size.measured(curvature, self._size)
        self.direction, self._size = None, None

    def to_state(self) -> dict[str, Any]:
        """JSON-ready, without the vectors."""
        lag = {"weight": self.lag.weight, "squares": self.lag.squares, "epoch": self.lag.epoch}
        size = None if self._size is None else np.asarray(self._size).tolist()
        return {"controller": self.controller.to_state(), "step_size": asdict(self.step_size), "lag": lag, "size": size}

    def vectors(self) -> dict[str, Any]:
        """The vectors that a checkpoint must hold, by name."""
        named = {"h": self.lag.h, "e": self.lag.e, "direction": self.direction}
        return {name: vector for name, vector in named.items() if vector is not None}

    def restore(self, controller: Controller, state: Mapping[str, Any], vectors: Mapping[str, Any]) -> None:
        """Goes on where `to_state` and `vectors` were."""
        self.controller = controller
        self.step_size = StepSize(**state["step_size"])
        self.lag = Lag(vectors.get("h"), vectors.get("e"), **state["lag"])
        self.direction = vectors.get("direction")
        self._size = None if state["size"] is None else np.array(state["size"])
