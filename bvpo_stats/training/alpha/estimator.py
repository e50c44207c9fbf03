"""Alpha in a run: a stream (`bvpo_stats.training.alpha.stream`) fed from the Trainer's steps, and looks at the bias."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bvpo_stats.distributed import World
from bvpo_stats.gradients.engine import BlockLayout
from bvpo_stats.gradients.examples import Example, check_identity
from bvpo_stats.gradients.ladder import Ladder
from bvpo_stats.gradients.marginal import aggregate, select_traces
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.reference import check_stored_log_probs
from bvpo_stats.gradients.stream import gradient_batches
from bvpo_stats.model.metric import optimizer_metric
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.subset import Subset, lora_subset
from bvpo_stats.training.alpha import Controller, StepSize, from_state
from bvpo_stats.training.alpha.stream import AlphaStream, StepMeans
from bvpo_stats.training.config import AUTO, BVPOConfig
from bvpo_stats.training.gradient import SetGradients, Shards

_log = logging.getLogger(__name__)

LOOK_SHARE = 0.01
"""Share of the tokens that looks at c may cost, where the cadence is left to us."""

LOOK_PROMPTS = 8
"""Most prompts of a step that a look takes."""


class BiasLooks:
    """Now and then, (t_i - m_i) . hbar of the prompts of a step whose answers all have traces in the bank."""

    def __init__(self, policy: Policy, subset: Subset, examples: Sequence[Example], options: StreamOptions) -> None:
        """Checks the records once; later looks take them as they are.

        Args:
            policy: The policy, at any theta.
            subset: The weights that are trained.
            examples: All examples to train on; those with traces for both answers qualify.
            options: Objective, traces per answer, budget, seed; the method is chosen anew at each look.

        Raises:
            UserError: Records of another model or template, or whose stored log-probabilities are not the reference's.
        """
        self._policy, self._subset, self._layout = policy, subset, BlockLayout.of(subset)
        self.examples = [e for e in examples if {trace.side for trace in e.traces} == {"chosen", "rejected"}]
        self._able = {example.key for example in self.examples}
        if not options.allow_mismatch:
            check_identity(policy, self.examples)
        check_stored_log_probs(policy, self.examples, options.checked_records)
        self._options = replace(options, checked_records=0, allow_mismatch=True)

    def tokens(self) -> float:
        """Tokens of a look at one prompt: its D_t pair and the traces that are used, on average."""
        total = 0
        for example in self.examples:
            total += example.both[0].tokens
            for _, bank in example.sides:
                used = select_traces(bank, "posterior", self._options.traces_per_answer)
                total += sum(len(t.prompt_ids) + len(t.completion_ids) for t in used if t is not bank.own)
        return total / len(self.examples)

    def look(
        self, prompts: Sequence[Example], lagged: Sequence[Tensor], world: World | None = None
    ) -> tuple[int, Any, Any, str]:
        """Sums over this process's prompts of a step.

        Args:
            prompts: The step's, of all processes.
            lagged: P hbar and P ebar (where it is kept), in the order of the subset's weights.
            world: The processes that share the look.

        Returns:
            Number of prompts, sums ``[2]``, sums of squares and products ``[2, 2]``; how mu was estimated, or why not.
        """
        world = world or World()
        some = [prompt for prompt in prompts if prompt.key in self._able][:LOOK_PROMPTS][world.rank :: world.size]
        none = (0, np.zeros(2), np.zeros((2, 2)))
        if not some:
            return *none, "no prompt of the step has traces"
        ladder = Ladder(self._policy, some, self._options)
        method, reasons = ladder.by_records()
        if method == "reference-point":  # c = 0, exactly
            return len(some), np.zeros(2), np.zeros((2, 2)), "mu = E g_t exactly, at the reference point"
        if method == "none":
            return *none, f"mu is not estimable: {'; '.join(reasons)}"
        sizes = [size for *_, size in self._layout.places.values()]
        directions = [
            self._layout.strung(piece.cpu().numpy() for piece in vector.double().split(sizes)) for vector in lagged
        ]
        found, diagnostics = [], []
        for batch in gradient_batches(self._policy, self._subset, some, replace(self._options, method=method)):
            t, m = batch.vectors["t"], batch.vectors["m"]
            found.append(
                [
                    sum((t[name] - m[name]).astype(np.float64) @ direction[name] for name in t)
                    for direction in directions
                ]
            )
            diagnostics += batch.diagnostics
        failure = aggregate(diagnostics).failure if diagnostics else None
        if failure is not None:
            return *none, f"mu is not estimable: {failure}"
        values = np.concatenate([np.stack(one, axis=1) for one in found])
        values = np.pad(values, ((0, 0), (0, 2 - values.shape[1])))
        return len(values), values.sum(axis=0), values.T @ values, f"c = E g_t - mu from {method} traces"


class AlphaEstimator:
    """The stream's surroundings: it is asked for alpha and told about steps."""

    def __init__(
        self,
        controller: Controller,
        step_size: StepSize,
        batch_size: int,
        world: World,
        *,
        shards: Callable[[], Shards] = lambda: Shards((), lambda value: value),
        looks: BiasLooks | None = None,
        look_steps: int = 1,
        mu: str = "",
    ) -> None:
        """Before the first step.

        Args:
            controller: Decides.
            step_size: How eta L follows from the learning rate.
            batch_size: Prompts per optimizer step, over all processes.
            world: The run's processes.
            shards: The trained weights as they are now, and which part of them this process holds.
            looks: Where the trace gradient's bias is seen; None for nowhere.
            look_steps: Steps from one look to the next.
            mu: What is known of mu without a look.
        """
        self.stream = AlphaStream(controller, step_size, batch_size, lambda products: shards().total(products))
        self.updates: list[dict[str, Any]] = []
        self.mu, self.metric, self.look_steps = mu, "unknown yet", look_steps
        self._world, self._shards, self.looks = world, shards, looks
        self._sums: SetGradients | None = None
        self._curvature: tuple[float, int] | None = None
        self._prompts: list[Example] = []
        self._own_seconds, self._started = 0.0, time.perf_counter()

    @property
    def controller(self) -> Controller:
        """Decides."""
        return self.stream.controller

    @property
    def step_size(self) -> StepSize:
        """How eta L follows from the learning rate."""
        return self.stream.step_size

    @property
    def alpha(self) -> float:
        """The weight of the trace loss in the coming step."""
        return self.controller.alpha

    @property
    def collects(self) -> bool:
        """Whether steps should hand over the gradients of either set."""
        return self.controller.wants_data

    @property
    def direction(self) -> tuple[Tensor, float] | None:
        """Where the coming pass should measure the curvature, and how far along; None where it need not."""
        if self.stream.direction is None or self._curvature is not None:
            return None
        return self.stream.direction, float(self.stream.reach)

    def add(self, sums: SetGradients, prompts: Sequence[Example], curvature: tuple[float, int] | None) -> None:
        """Takes what a part of the step showed (one call per accumulated batch).

        Args:
            sums: Gradients of both sets.
            prompts: Its prompts, of all processes.
            curvature: Sum of the curvatures of pairs along `direction`, over reach^2, and number of pairs.
        """
        with self._timed():
            self._sums = sums if self._sums is None else self._sums.merge(sums)
            self._prompts += prompts
            if curvature is not None:
                self._curvature = curvature

    def finish_step(
        self, step: int, learning_rate: float, *, epoch: int = 0, progress: float | None = None, optimizer: Any = None
    ) -> None:
        """After an optimizer step.

        Args:
            step: Its number, counted from 0.
            learning_rate: That of the step to come.
            epoch: Number of its pass over the prompts.
            progress: Share of the run that is over.
            optimizer: Whose metric counts.
        """
        share = self._own_seconds / max(time.perf_counter() - self._started, 1e-9)
        if not self.collects:
            self.stream.observe(None, None, learning_rate, step=step, progress=progress)
            return
        with self._timed():
            metric, self.metric = optimizer_metric(optimizer, self._shards().weights)
            means = bias = None
            if self._sums is not None:
                sums, count = self._sums, float(self._sums.prompts)
                means = StepMeans(step, count, (sums.trace - sums.empty) / count, sums.empty / count, epoch)
                if self.looks is not None and (step + 1) % self.look_steps == 0:
                    bias = self._look(epoch, metric)
            if self._curvature is not None:
                self.stream.measured(self._mean_curvature(*self._curvature))
            self._sums, self._curvature, self._prompts = None, None, []
            self.stream.observe(means, metric, learning_rate, step=step, progress=progress, bias=bias, time_share=share)
            if self._world.size > 1:  # decided once and told to all: no last bit can make processes disagree
                decided: Any = self.stream.to_state() if self._world.leads else None
                decided = self._world.broadcast(decided)
                self.stream.restore(from_state(decided["controller"]), decided, self.stream.vectors())
        if bias is not None or (step + 1) % self.look_steps == 0:
            self.updates.append(asdict(self.controller.record) | {"mu": self.mu})

    def log(self) -> dict[str, float]:
        """What the coming step's alpha rests on, for the log."""
        numbers = self.controller.record.log()
        numbers["alpha/next"] = numbers.pop("alpha")
        return numbers if self.collects else {"alpha/next": numbers["alpha/next"]}

    def to_state(self) -> dict[str, Any]:
        """JSON-ready; :meth:`restore` reads it together with `vectors`."""
        return self.stream.to_state() | {
            "updates": self.updates,
            "mu": self.mu,
            "metric": self.metric,
            "seconds": [self._own_seconds, time.perf_counter() - self._started],
        }

    def vectors(self) -> dict[str, Tensor]:
        """Vectors that belong to the state, whole; for every process to call."""
        shards = self._shards()
        return {name: shards.whole(vector).contiguous() for name, vector in self.stream.vectors().items()}

    def restore(self, state: dict[str, Any], vectors: dict[str, Tensor]) -> None:
        """Goes on where a checkpoint was."""
        shards = self._shards()
        device = shards.weights[0].device if shards.weights else torch.device("cpu")
        moved = {name: shards.part(vector.to(device)) for name, vector in vectors.items()}
        self.stream.restore(from_state(state["controller"]), state, moved)
        self.updates, self.mu, self.metric = list(state["updates"]), state["mu"], state["metric"]
        self._own_seconds = state["seconds"][0]
        self._started = time.perf_counter() - state["seconds"][1]

    def _look(self, epoch: int, metric: Tensor | None) -> tuple[int, Any, Any] | None:
        lag = self.stream.lag.of_epoch(epoch)
        if lag.h is None or self.looks is None:
            return None
        shards = self._shards()
        kept = [vector for vector in (lag.h, lag.e) if vector is not None]
        lagged = [shards.whole(vector if metric is None else metric * vector) for vector in kept]
        if shards.sharded:  # none can run without the others, so all look at the same
            count, sums, squares, said = self.looks.look(self._prompts, lagged)
        else:
            count, sums, squares, said = self.looks.look(self._prompts, lagged, self._world)
            flat = shards.summed(torch.tensor([count, *sums, *squares.flatten()], dtype=torch.float64))
            count, *rest = flat.tolist()
            sums, squares = np.array(rest[:2]), np.array(rest[2:]).reshape(2, 2)
        self.mu = self._world.broadcast(said)
        return (int(count), sums, squares) if count else None

    def _mean_curvature(self, total: float, pairs: int) -> Any:
        numbers = self._shards().summed(torch.tensor([total, float(pairs)], dtype=torch.float64))
        return np.asarray(float(numbers[0] / numbers[1]))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._own_seconds += time.perf_counter() - began


def default_look_steps(look_tokens: float, step_tokens: float) -> int:
    """Steps between two looks at the bias that keep them at :data:`LOOK_SHARE` of the tokens.

    >>> default_look_steps(3_000, 10_000)
    30
    """
    return max(1, math.ceil(look_tokens / (LOOK_SHARE * max(step_tokens, 1.0))))


def make_estimator(
    args: BVPOConfig,
    policy: Policy,
    examples: Sequence[Example],
    shards: Callable[[], Shards],
    world: World,
) -> AlphaEstimator:
    """Alpha's estimator.

    Raises:
        UserError: Traces that cannot be estimated from.
    """
    auto = args.eta_l == AUTO
    step_size = StepSize(eta_l=1.0 if auto else float(args.eta_l), peak=args.learning_rate, auto=auto)
    common = (args.controller(), step_size, args.prompts_per_step, world)
    if not args.adaptive:
        return AlphaEstimator(*common)
    looks, look_steps, mu = None, args.alpha_update_steps or 10, _without_looks(policy, examples, args)
    if any(example.traces for example in examples) and policy.has_adapter:
        options = StreamOptions(
            objective=args.objective(),
            traces_per_answer=args.alpha_traces_per_answer,
            allow_mismatch=args.allow_mismatch,
            seed=args.seed,
            max_tokens=args.max_tokens,
        )
        looks = BiasLooks(policy, lora_subset(policy.model), examples, options)
        if looks.examples:
            step_tokens = args.prompts_per_step * _mean_tokens(examples)
            tokens = looks.tokens() * min(LOOK_PROMPTS, args.prompts_per_step)
            look_steps = args.alpha_update_steps or default_look_steps(tokens, step_tokens)
            mu = "no look at the trace gradient's bias yet; it is taken as 0"
        else:
            looks, mu = None, "no prompt has traces of both of its answers: the trace gradient's bias is taken as 0"
    if looks is None:
        _log.warning("alpha: %s.", mu)
    return AlphaEstimator(*common, shards=shards, looks=looks, look_steps=look_steps, mu=mu)


def _without_looks(policy: Policy, examples: Sequence[Example], args: BVPOConfig) -> str:
    """What is known of mu where no trace bank can be looked at."""
    if any(example.traces for example in examples):
        return "traces are looked at for LoRA adapters only: the trace gradient's bias is taken as 0"
    reason = "there is no trace bank: the trace gradient's bias E g_t - mu is taken as 0"
    lawless = next((why for example in examples if (why := example.not_plain) is not None), None)
    if args.objective().name != "dpo":
        return f"{reason}, which it is not even at the reference for this loss"
    if lawless is not None:
        return f"{reason}, which it is not even at the reference: {lawless}"
    return f"{reason}, exact at the reference and worse with every step away from it"


def _mean_tokens(examples: Sequence[Example]) -> float:
    return sum(pair.tokens for example in examples for pair in example.pairs) / len(examples)
