"""Alpha in a run: the controller, fed by the steps' own gradients and by looks at a probe set of held-out prompts."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from bvpo_stats.distributed import World
from bvpo_stats.errors import UserError
from bvpo_stats.gradients.curvature import CurvatureOptions, noise_curvature
from bvpo_stats.gradients.examples import Example, check_identity
from bvpo_stats.gradients.ladder import Ladder
from bvpo_stats.gradients.marginal import SideDiagnostics, aggregate, select_traces
from bvpo_stats.gradients.options import MarginalMethod, StreamOptions
from bvpo_stats.gradients.reference import check_stored_log_probs
from bvpo_stats.gradients.stream import gradient_batches
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.subset import Subset, lora_subset
from bvpo_stats.statistics.moments import Moments
from bvpo_stats.training.alpha import AdaptiveOptions, Controller, Observation, StepSize, StepSums, from_state
from bvpo_stats.training.config import AUTO, BVPOConfig
from bvpo_stats.training.data import PromptSelection
from bvpo_stats.training.gradient import PromptSums

_log = logging.getLogger(__name__)

PROBE_SHARE = 0.02
"""Share of a step's tokens that a look at the probe set may cost per step, where the cadence is left to us."""


_WORDS: dict[str, str] = {
    "reference-point": "mu = E g_t exactly, at the reference point and temperature 1",
    "anchored": "mu from each pair's own trace and draws regardless of the answer",
    "posterior": "mu from posterior traces of each answer",
    "prior": "mu from traces drawn regardless of the answer",
}


class ProbeSet:
    """The probe prompts with their traces, and how their gradients are taken."""

    def __init__(
        self,
        policy: Policy,
        subset: Subset,
        examples: Sequence[Example],
        options: StreamOptions,
    ) -> None:
        """Checks the records once; later looks take them as they are.

        Args:
            policy: The policy, at any theta.
            subset: The weights that are trained.
            examples: The probe prompts' examples, with their traces.
            options: Objective, traces per answer, budget, seed; the method is chosen anew at each look.

        Raises:
            UserError: Records of another model or template, or whose stored log-probabilities are not the reference's.
        """
        self._policy, self._subset = policy, subset
        self._examples = examples
        if not options.allow_mismatch:
            check_identity(policy, self._examples)
        check_stored_log_probs(policy, self._examples, options.checked_records)
        self._options = replace(options, checked_records=0, allow_mismatch=True)

    @property
    def prompts(self) -> int:
        """Number of probe prompts."""
        return len({example.prompt_id for example in self._examples})

    @property
    def has_traces(self) -> bool:
        """Whether there is a trace bank."""
        return any(example.traces for example in self._examples)

    def tokens(self) -> int:
        """Tokens of one look: all pairs and the traces that are used (off the reference point)."""
        method, _ = self._method(off_reference=True)
        total = sum(
            2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for e in self._examples for p in e.pairs
        )
        if method == "none":
            return total
        for example in self._examples:
            for _, bank in example.sides:
                used = select_traces(bank, method, self._options.traces_per_answer)
                total += sum(len(t.prompt_ids) + len(t.completion_ids) for t in used if t is not bank.own)
        return total

    def look(self, world: World | None = None) -> tuple[Moments | None, str]:
        """Gradients of the probe prompts at the present theta; processes share the prompts.

        Returns:
            Their moments; None where mu could not be estimated (and in all processes but the first). And in a sentence,
            how mu was estimated, or why it was not.
        """
        world = world or World()
        method, reason = self._method()
        if method == "none":
            return None, reason
        prompts = list(dict.fromkeys(example.prompt_id for example in self._examples))
        mine = set(prompts[world.rank :: world.size])
        moments: Moments | None = None
        diagnostics: list[SideDiagnostics] = []
        if mine:
            examples = [example for example in self._examples if example.prompt_id in mine]
            options = replace(self._options, method=method)
            for batch in gradient_batches(self._policy, self._subset, examples, options):
                moments = moments or Moments.init(tuple(batch.vectors), tuple(batch.vectors["t"]))
                moments = moments.update(batch.vectors, batch.prompt_ids, trace2=batch.trace2)
                diagnostics += batch.diagnostics
        parts = world.gather((None if moments is None else moments.to_arrays(), diagnostics))
        moments = None
        for arrays, _ in parts:
            if arrays is not None:
                part = Moments.from_arrays(arrays)
                moments = part if moments is None else moments.merge(part)
        gathered = [side for _, found in parts for side in found]
        failure = aggregate(gathered).failure if gathered else None
        if failure is not None:
            return None, f"{reason}, but {failure}: mu is not estimable"
        return moments, reason

    def _method(self, off_reference: bool = False) -> tuple[MarginalMethod, str]:
        """The first rung of the ladder that the records allow; what their weights say is seen after the pass."""
        ladder = Ladder(self._policy, self._examples, self._options)
        method, reasons = ladder.by_records(off_reference=off_reference)
        return method, f"mu is not estimable here: {'; '.join(reasons)}" if method == "none" else _WORDS[method]


class AlphaEstimator:
    """The controller's surroundings: it is asked for alpha, told about steps, and looks at the probe set when due."""

    def __init__(
        self,
        controller: Controller,
        step_size: StepSize,
        batch_size: int,
        world: World,
        *,
        reduce: Callable[[Any], Any] | None = None,
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
            world: The run's processes.
            reduce: Adds a tensor up over them; None for a single one.
            probe: The probe set; None for none.
            update_steps: Steps between two looks at it.
            sums_steps: Steps between two that form their gradients prompt by prompt.
            measure: Measures the smoothness L, where eta L is not given.
        """
        self.controller, self.step_size = controller, step_size
        self.updates: list[dict[str, Any]] = []
        self.mu = "no probe set"
        self._batch_size, self._world, self._reduce = batch_size, world, reduce
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
                smoothness = self._world.broadcast(self._measure() if self._world.leads else None)
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
            found = None if sums is None else sums.step_sums(self._reduce)
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
                moments, self.mu = self._probe.look(self._world)
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
            decided: Any = None
            if self._world.leads:
                self.controller = self.controller.update(observation)
                decided = (self.controller.to_state(), self.mu)
            if self._world.size > 1:
                state, self.mu = self._world.broadcast(decided)
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


def make_estimator(
    args: BVPOConfig,
    policy: Policy,
    selection: PromptSelection,
    world: World,
    reduce: Callable[[Any], Any] | None,
) -> tuple[AlphaEstimator, Subset | None]:
    """Alpha's estimator, and the weights whose gradients it needs prompt by prompt.

    Raises:
        UserError: Weights or records that cannot be estimated from.
    """
    step_size = StepSize(eta_l=1.0 if args.eta_l == AUTO else float(args.eta_l), peak=args.learning_rate)
    common = (args.controller(), step_size, args.prompts_per_step, world)
    if not args.adaptive:
        return AlphaEstimator(*common), None
    if not selection.probe:
        estimator = AlphaEstimator(*common)
        estimator.mu = (
            f"the probe set would be smaller than {AdaptiveOptions().min_prompts} prompts, too small for an interval: "
            f"alpha is held at the prior {args.alpha_prior:g}"
        )
        _say(estimator.mu)
        return estimator, None
    if not policy.has_adapter:
        raise UserError(
            "alpha = adaptive needs every prompt's own gradient, which is formed for LoRA adapters only; train one "
            "(`peft_config`; on the command line LoRA with `r` of at least 1), or give alpha as a number."
        )
    subset = lora_subset(policy.model)
    probe = ProbeSet(
        policy,
        subset,
        selection.probe,
        StreamOptions(
            objective=args.objective(),
            traces_per_answer=args.alpha_traces_per_answer,
            allow_mismatch=args.allow_mismatch,
            seed=args.seed,
            max_tokens=args.max_tokens,
        ),
    )
    tokens = [
        2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for row in selection.train for p in row.pairs
    ]
    step_tokens = args.prompts_per_step * sum(tokens) / len(selection.train)
    measure = None
    if args.eta_l == AUTO:
        curvature = CurvatureOptions(args.learning_rate, n_pairs=len(selection.probe), seed=args.seed)
        measure = functools.partial(noise_curvature, policy, subset, selection.probe, args.objective(), curvature)
    estimator = AlphaEstimator(
        *common,
        reduce=reduce,
        probe=probe,
        update_steps=args.alpha_update_steps or default_update_steps(probe.tokens(), step_tokens),
        sums_steps=args.alpha_sums_steps,
        measure=measure,
    )
    if not probe.has_traces:
        _say(
            "there is no trace bank: mu = E g_t is taken at the reference point, before the first step, where it holds "
            "for DPO on pairs sampled at temperature 1 without top-p, and is not renewed"
        )
    return estimator, subset


def _say(sentence: str) -> None:
    _log.warning("alpha: %s.", sentence)
