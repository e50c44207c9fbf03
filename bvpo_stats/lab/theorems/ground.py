"""The ground the theorems stand on: oracles with everything exact, and samples drawn from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle import (
    Atoms,
    ExactMoments,
    ModelShape,
    Oracle,
    OracleConfig,
    build_oracle,
    draw_examples,
    exact_moments,
    example_gradients,
    population_atoms,
    shortened,
)
from bvpo_stats.lab.oracle.draws import Draws, Responses, draw_posterior_traces
from bvpo_stats.lab.theorems.config import TheoremConfig
from bvpo_stats.statistics.intervals import jackknife_covariance
from bvpo_stats.statistics.moments import Array, MomentSummary

DRIFT = 0.05
COOL = 0.8
"""The paper's sampling temperature."""


@dataclass(frozen=True)
class Sample:
    """Gradients of examples drawn as the data pipeline draws them.

    Attributes:
        prompt: Number of each example's prompt.
        t: g_t.
        t2: g_t on a second, independent draw of the traces, answers held fixed.
        e: g_e.
        m: The marginal gradient, exact for the example's answers.
    """

    prompt: Int[np.ndarray, " examples"]
    t: Float[np.ndarray, "examples dimensions"]
    t2: Float[np.ndarray, "examples dimensions"]
    e: Float[np.ndarray, "examples dimensions"]
    m: Float[np.ndarray, "examples dimensions"]

    @property
    def members(self) -> dict[str, NDArray[np.float64]]:
        """The three members that the package's statistics take."""
        return {"t": self.t, "e": self.e, "m": self.m}


class Ground:
    """Oracles and samples that several checks share, each made when first asked for."""

    def __init__(self, config: TheoremConfig):
        """Names the ground; nothing is built yet.

        Args:
            config: The settings.
        """
        self.config = config
        self.objective = Objective(beta=config.beta)

    def rng(self, stream: int) -> np.random.Generator:
        """A generator of its own for every use, so that no check changes another's draws."""
        return np.random.default_rng([self.config.seed, stream])

    def build(self, **changes: object) -> Oracle:
        """A small oracle (15 traces, 3 answers, 4 prompts unless changed), in full coordinates."""
        base = OracleConfig(n_symbols=2, max_trace=3, n_answers=3, n_prompts=4, seed=self.config.seed)
        return build_oracle(replace(base, **changes))  # type: ignore[arg-type]

    @functools.cached_property
    def at_reference(self) -> Oracle:
        """theta_ref, temperature 1."""
        return self.build()

    @functools.cached_property
    def drifted(self) -> Oracle:
        """Off theta_ref at the paper's temperature: nothing is special. In few coordinates."""
        return shortened(self.build(temperature=COOL, drift=DRIFT))

    @functools.cached_property
    def exact(self) -> ExactMoments:
        """Exact moments of :attr:`drifted`."""
        return exact_moments(self.drifted, self.objective)

    @functools.cached_property
    def atoms(self) -> Atoms:
        """The written-out population of :attr:`drifted`."""
        return population_atoms(self.drifted, self.objective)

    @functools.cached_property
    def tiny(self) -> Oracle:
        """3 traces, 2 answers, 2 prompts: 18 examples in all, so that a step can be averaged over all of them."""
        return self.build(n_symbols=1, max_trace=2, n_answers=2, n_prompts=2, temperature=COOL, drift=DRIFT)

    @functools.cached_property
    def tiny_exact(self) -> ExactMoments:
        """Exact moments of :attr:`tiny`."""
        return exact_moments(self.tiny, self.objective)

    @functools.cached_property
    def sample(self) -> Sample:
        """Examples of :attr:`drifted`."""
        return draw_sample(self.drifted, self.objective, self.config.draws, self.rng(1))

    @functools.cached_property
    def family(self) -> list[tuple[Oracle, ExactMoments]]:
        """Six further oracles: seeds, drifts and temperatures that differ, for claims about every population."""
        oracles = []
        for number in range(6):
            oracle = self.build(
                max_trace=2,
                n_prompts=2,
                seed=self.config.seed + number,
                temperature=(1.0, COOL)[number % 2],
                drift=(0.0, DRIFT, 2 * DRIFT)[number % 3],
            )
            oracles.append((oracle, exact_moments(oracle, self.objective)))
        return oracles

    @functools.cached_property
    def sharp(self) -> list[Oracle]:
        """Twelve oracles with two traces and peaked laws, some of whose prompts have the noise in D_e, not in D_t."""
        shape = ModelShape(sharpness=3.0)
        changes = {"n_symbols": 1, "max_trace": 1, "n_samples": 2, "shape": shape}
        return [self.build(seed=self.config.seed + number, **changes) for number in range(12)]


def draw_sample(oracle: Oracle, objective: Objective, n_examples: int, rng: np.random.Generator) -> Sample:
    """Draws examples with a second draw of their traces.

    Args:
        oracle: Where to draw from; in few coordinates, or the arrays are large.
        objective: The loss.
        n_examples: How many.
        rng: Decides everything.
    """
    draws = draw_examples(oracle, n_examples, rng)
    t, e, m = example_gradients(oracle, draws, objective)
    t2 = example_gradients(oracle, with_new_traces(oracle, draws, rng), objective)[0]
    return Sample(draws.prompt, t, t2, e, m)


def with_new_traces(oracle: Oracle, draws: Draws, rng: np.random.Generator) -> Draws:
    """The same examples, answers included, with the traces of the D_t pairs drawn again.

    Args:
        oracle: Where the traces come from.
        draws: The examples.
        rng: Decides everything.
    """
    old = draws.thinking
    answer, rows = np.stack([old.chosen_pair[1], old.rejected_pair[1]], axis=1), np.arange(len(draws))
    traces = [draw_posterior_traces(oracle, draws.prompt, answer[:, side], 1, rng)[:, 0] for side in (0, 1)]
    pairs = Responses(np.stack(traces, axis=1), answer, np.zeros_like(rows), np.ones_like(rows))
    return replace(draws, thinking=pairs)


def standard_error(values: Float[np.ndarray, " estimates"], summary: MomentSummary) -> float:
    """Jackknife standard error of an estimate given with its leave-one-group-out values.

    Args:
        values: ``[1 + G]``.
        summary: Where the group sizes are.
    """
    covariance: Array = jackknife_covariance(values[None], summary.group_sizes)
    return float(np.sqrt(covariance[0, 0]))
