from dataclasses import dataclass

import numpy as np
import pytest

from bvpo_stats.lab.oracle import Draws, Oracle, OracleConfig, build_oracle, draw_examples, draw_traces, pair_records
from bvpo_stats.model.subset import Subset, lora_subset
from bvpo_stats.records import PreferencePair, TraceRecord

# 7 traces, 3 answers, 2 prompts.
SMALL = {"n_symbols": 2, "max_trace": 2, "n_answers": 3, "n_prompts": 2, "seed": 3}


@dataclass(frozen=True)
class Population:
    """An oracle with examples drawn from it, as records."""

    oracle: Oracle
    draws: Draws
    pairs: list[PreferencePair]

    @property
    def trace_pairs(self) -> list[PreferencePair]:
        return [pair for pair in self.pairs if pair.mode == "thinking"]

    @property
    def subset(self) -> Subset:
        return lora_subset(self.oracle.policy.model)

    def bank(self, n_traces: int, source: str, seed: int = 1) -> list[TraceRecord]:
        """The anchors and ``n_traces`` further traces of one source."""
        return draw_traces(self.oracle, self.trace_pairs, n_traces, np.random.default_rng(seed), source=source)

    def rows(self, batches: list, member: str) -> np.ndarray:
        """A member's gradients in the order of the draws and of theta."""
        found = {
            prompt: np.concatenate([values[row] for values in batch.vectors[member].values()])
            for batch in batches
            for row, prompt in enumerate(batch.prompt_ids)
        }
        return np.stack([found[pair.prompt_id] for pair in self.trace_pairs])


def population(n_examples: int = 12, **settings: float) -> Population:
    oracle = build_oracle(OracleConfig(**SMALL, **settings))
    draws = draw_examples(oracle, n_examples, np.random.default_rng(0))
    trace_pairs, empty_pairs = pair_records(oracle, draws)
    return Population(oracle, draws, trace_pairs + empty_pairs)


@pytest.fixture(scope="session")
def plain() -> Population:
    """theta_ref, temperature 1."""
    return population()


@pytest.fixture(scope="session")
def drifted() -> Population:
    """Off theta_ref, temperature 1."""
    return population(drift=0.05)


@pytest.fixture(scope="session")
def warped() -> Population:
    """Off theta_ref, temperature 0.8: nothing is special."""
    return population(drift=0.05, temperature=0.8)
