"""The population of (t, e, m) vectors as finitely many atoms: draws are index arithmetic, expectations finite sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.cells import cell_moments
from bvpo_stats.lab.oracle.coordinates import shortened
from bvpo_stats.lab.oracle.scored import DPO, pair_gradients, trace_responses

Array = NDArray[np.float64]
Values = Callable[[Array, Array, Array], Array]
"""A function of the vectors (t, e, m) of many examples."""


@dataclass(frozen=True)
class Atoms:
    """Population of examples: a uniform prompt, then independently a D_t atom and a D_e atom of that prompt.

    Vectors are coordinates in an orthonormal basis of the span of all gradients, so every inner product is that of the
    full gradients, in far fewer dimensions; or the full gradients themselves.

    Attributes:
        t: g_t of each D_t atom (y+, r+, y-, r-).
        m: Marginal gradient of the atom's answers.
        t_prompt: Prompt of each D_t atom.
        t_probability: P(atom | prompt); sums to 1 over each prompt.
        e: g_e of each D_e atom (y'+, y'-).
        e_prompt: Prompt of each D_e atom.
        e_probability: P(atom | prompt).
    """

    t: Float[np.ndarray, "t_atoms dimensions"]
    m: Float[np.ndarray, "t_atoms dimensions"]
    t_prompt: Int[np.ndarray, " t_atoms"]
    t_probability: Float[np.ndarray, " t_atoms"]
    e: Float[np.ndarray, "e_atoms dimensions"]
    e_prompt: Int[np.ndarray, " e_atoms"]
    e_probability: Float[np.ndarray, " e_atoms"]

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return int(self.t_prompt.max()) + 1

    def draw(
        self, n_examples: int, rng: np.random.Generator
    ) -> tuple[Int[np.ndarray, " examples"], Int[np.ndarray, " examples"]]:
        """Indices (into ``t`` and ``m``, into ``e``) of independent examples.

        Args:
            n_examples: Number of examples.
            rng: Decides everything.
        """
        prompt = rng.integers(self.n_prompts, size=n_examples)
        return (
            _within(self.t_prompt, self.t_probability, prompt, rng),
            _within(self.e_prompt, self.e_probability, prompt, rng),
        )

    def product(
        self,
    ) -> tuple[Int[np.ndarray, " examples"], Int[np.ndarray, " examples"], Float[np.ndarray, " examples"]]:
        """The whole population: every (t index, e index) and its probability."""
        t_index, e_index, probability = [], [], []
        for prompt in range(self.n_prompts):
            ts, es = np.flatnonzero(self.t_prompt == prompt), np.flatnonzero(self.e_prompt == prompt)
            t_index.append(np.repeat(ts, len(es)))
            e_index.append(np.tile(es, len(ts)))
            probability.append(np.outer(self.t_probability[ts], self.e_probability[es]).ravel() / self.n_prompts)
        return np.concatenate(t_index), np.concatenate(e_index), np.concatenate(probability)

    def expectation(self, values: Values) -> Array:
        """E f(t, e, m) over the whole population.

        Args:
            values: f, mapping the vectors of all examples, one row each, to one number (or row) per example.
        """
        t, e, probability = self.product()
        return np.tensordot(probability, values(self.t[t], self.e[e], self.m[t]), axes=1)


def population_atoms(
    oracle: Oracle, objective: Objective = DPO, max_atoms: int = 200_000, *, full: bool = False
) -> Atoms:
    """Writes out every atom of the population.

    Args:
        oracle: A small oracle: D_t has traces^2 atoms per prompt and pair of answers.
        objective: The preference loss.
        max_atoms: Refuses to write out more.
        full: Keep the gradients in the coordinates of theta, as long as theta is.

    Raises:
        UserError: More than ``max_atoms`` D_t atoms; draw from the oracle instead (``draw_examples``).
    """
    n_atoms = int(np.sum(oracle.pair_law > 0)) * oracle.grammar.n_traces**2
    if n_atoms > max_atoms:
        raise UserError(
            f"The population has {n_atoms} D_t atoms, more than {max_atoms}. Build the oracle with fewer symbols or "
            "shorter traces, or draw examples instead of writing them all out."
        )
    oracle = oracle if full else shortened(oracle)
    cells = cell_moments(oracle, objective)
    responses = trace_responses(oracle.table)
    plus, minus = (index.ravel() for index in np.indices((oracle.grammar.n_traces,) * 2))
    t, m, t_prompt, t_probability = [], [], [], []
    for cell in np.argwhere(cells.pair_law > 0):
        x, a, b = cell.tolist()
        vectors, _ = pair_gradients(objective, responses[x, plus, a], responses[x, minus, b])
        posterior = oracle.table.sampling.posterior[x]
        t.append(vectors)
        m.append(np.broadcast_to(cells.marginal[x, a, b], vectors.shape))
        t_prompt.append(np.full(len(vectors), x))
        t_probability.append(cells.pair_law[x, a, b] * np.outer(posterior[:, a], posterior[:, b]).ravel())
    where = np.nonzero(cells.empty_pair_law > 0)
    return Atoms(
        t=np.concatenate(t),
        m=np.concatenate(m),
        t_prompt=np.concatenate(t_prompt),
        t_probability=np.concatenate(t_probability),
        e=cells.empty[where],
        e_prompt=where[0],
        e_probability=cells.empty_pair_law[where],
    )


def _within(
    owner: Int[np.ndarray, " atoms"],
    probability: Float[np.ndarray, " atoms"],
    prompt: Int[np.ndarray, " examples"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " examples"]:
    """One atom of each example's prompt, by inversion."""
    uniform = rng.random(len(prompt))
    index = np.zeros(len(prompt), dtype=np.int64)
    for x in np.unique(prompt):
        atoms = np.flatnonzero(owner == x)
        cumulative = np.cumsum(probability[atoms])
        drawn = np.searchsorted(cumulative, uniform[prompt == x] * cumulative[-1], side="right")
        index[prompt == x] = atoms[np.minimum(drawn, len(atoms) - 1)]
    return index
