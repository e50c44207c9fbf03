"""Alpha during a run: a controller, fed by the steps' own gradients and by looks at a probe set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from bvpo_stats.training.controllers import Controller, from_state
from bvpo_stats.training.observations import Observation, StepSums
from bvpo_stats.training.probe import ProbeSet
from bvpo_stats.training.step_size import StepSize
from bvpo_stats.training.sums import PromptSums

PROBE_SHARE = 0.02
"""Share of a step's tokens that a look at the probe set may cost per step, where the cadence is left to us."""


@dataclass(frozen=True)
class Processes:
    """How the processes of a run talk.

    Attributes:
        rank: This one's number.
        size: Their number.
        gather: Every process's value at the first, an empty list elsewhere.
        broadcast: The first's value, everywhere.
        reduce: A tensor, added up over all.
    """

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]
    broadcast: Callable[[Any], Any]
    reduce: Callable[[Any], Any] | None


class AlphaEstimator:
    """The controller's surroundings: it is asked for alpha, told about steps, and looks at the probe set when due."""

    def __init__(
        self,
        controller: Controller,
        step_size: StepSize,
        batch_size: int,
        processes: Processes,
        *,
        probe: ProbeSet | None = None,
        update_steps: int = 1,
        sums_steps: int = 1,
        measure: Callable[[], float] | None = None,
    ) -> None:
        """Before the first step.

        Args:
            controller: Decides.
            step_size: How eta L follows from the learning rate.
            batch_size: Prompts per optimizer step, over all processes.
            processes: The run's processes.
            probe: The probe set; None for none.
            update_steps: Steps between two looks at it.
            sums_steps: Steps between two that form their gradients prompt by prompt.
            measure: Measures the smoothness L, where eta L is not given.
        """
        self.controller, self.step_size = controller, step_size
        self.updates: list[dict[str, Any]] = []
        self.mu = "no probe set"
        self._batch_size, self._processes = batch_size, processes
        self._probe, self.update_steps, self._measure = probe, update_steps, measure
        self._sums_steps = sums_steps
        self._sums: PromptSums | None = None
        self._own_seconds, self._started = 0.0, time.perf_counter()

    @property
    def alpha(self) -> float:
        """The weight of the trace loss in the coming step."""
        return self.controller.alpha

    @property
    def wants_sums(self) -> bool:
        """Whether per-prompt gradients are of use at all."""
        return self.controller.wants_data and self._probe is not None

    @property
    def collects(self) -> bool:
        """Whether the coming step should form them."""
        return self.wants_sums and (self.controller.record.step + 1) % self._sums_steps == 0

    def add(self, sums: PromptSums) -> None:
        """Takes the sums of a part of the step (one call per accumulated batch)."""
        self._sums = sums if self._sums is None else self._sums.merge(sums)

    def begin(self, learning_rate: float) -> None:
        """Before the very first step: mu at the reference point, where it needs no traces."""
        if not self.wants_sums:
            return
        if self._measure is not None:
            with self._timed():
                smoothness = self._processes.broadcast(self._measure() if self._processes.rank == 0 else None)
            self.step_size = replace(self.step_size, smoothness=smoothness)
        self._update(-1, learning_rate, None, look=True)

    def finish_step(self, step: int, learning_rate: float) -> None:
        """After an optimizer step.

        Args:
            step: Its number, counted from 0.
            learning_rate: That of the step to come.
        """
        sums, self._sums = self._sums, None
        with self._timed():
            found = None if sums is None else sums.step_sums(self._processes.reduce)
        # Without traces mu can only be had at the reference point, which training has left.
        renewable = self.wants_sums and self._probe is not None and self._probe.has_traces
        self._update(step, learning_rate, found, look=renewable and (step + 1) % self.update_steps == 0)

    def log(self) -> dict[str, float]:
        """What the coming step's alpha rests on, for the log."""
        numbers = self.controller.record.log()
        numbers["alpha/next"] = numbers.pop("alpha")
        return numbers if self.controller.wants_data else {"alpha/next": numbers["alpha/next"]}

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; :meth:`restore` reads it."""
        return {
            "controller": self.controller.to_state(),
            "step_size": asdict(self.step_size),
            "updates": self.updates,
            "mu": self.mu,
            "seconds": [self._own_seconds, time.perf_counter() - self._started],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint was."""
        self.controller = from_state(state["controller"])
        self.step_size = StepSize(**state["step_size"])
        self.updates, self.mu = list(state["updates"]), state["mu"]
        self._own_seconds = state["seconds"][0]
        self._started = time.perf_counter() - state["seconds"][1]

    def _update(self, step: int, learning_rate: float, sums: StepSums | None, *, look: bool) -> None:
        moments = None
        if look and self._probe is not None:
            with self._timed():
                found = self._probe.look((self._processes.rank, self._processes.size), self._processes.gather)
            self.mu, moments = found.reason, found.moments
        observation = Observation(
            step=step,
            batch_size=self._batch_size,
            eta_l=self.step_size.at(learning_rate),
            sums=sums,
            probe=moments,
            time_share=self._own_seconds / max(time.perf_counter() - self._started, 1e-9),
        )
        if not self.wants_sums:
            self.controller = self.controller.update(observation)
            return
        with self._timed():  # decided once and told to all, so that no last bit can make processes disagree
            decided = None
            if self._processes.rank == 0:
                self.controller = self.controller.update(observation)
                decided = (self.controller.to_state(), self.mu)
            if self._processes.size > 1:
                state, self.mu = self._processes.broadcast(decided)
                self.controller = from_state(state)
        if look:
            self.updates.append(asdict(self.controller.record) | {"mu": self.mu})

    @contextmanager
    def _timed(self) -> Any:
        began = time.perf_counter()
        yield
        self._own_seconds += time.perf_counter() - began


def default_update_steps(probe_tokens: int, step_tokens: float) -> int:
    """Steps between two looks at the probe set that keep them at :data:`PROBE_SHARE` of the tokens.

    >>> default_update_steps(30_000, 50_000)
    30
    """
    return max(1, math.ceil(probe_tokens / (PROBE_SHARE * max(step_tokens, 1.0))))
