"""Oracle populations as the files and records that the alpha-star study reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bvpo_stats.lab.oracle import Oracle, OracleConfig, build_oracle, draw_pairs, draw_traces
from bvpo_stats.model.policy import Policy
from bvpo_stats.records import PreferencePair, TraceRecord, to_dict
from bvpo_stats.studies.alpha_star.report import AlphaReport
from bvpo_stats.studies.alpha_star.run import AlphaOptions, alpha_star

SMALL = {"n_symbols": 2, "max_trace": 2, "n_answers": 3, "n_prompts": 2, "seed": 3}


def small_oracle(**settings: float) -> Oracle:
    """7 traces, 3 answers, 2 questions."""
    return build_oracle(OracleConfig(**SMALL, **settings))  # type: ignore[arg-type]


def records(oracle: Oracle, n_prompts: int, seed: int = 0) -> tuple[list[PreferencePair], list[TraceRecord]]:
    """Pairs of both kinds, and a bank with the anchor, 8 posterior and 8 prior traces a side."""
    rng = np.random.default_rng(seed)
    thinking, nothinking = draw_pairs(oracle, n_prompts, rng)
    traces = draw_traces(oracle, thinking, 8, rng, source="prior")
    traces += [trace for trace in draw_traces(oracle, thinking, 8, rng) if trace.source != "anchor"]
    return [*thinking, *nothinking], traces


def estimate(
    policy: Policy,
    pairs: Sequence[PreferencePair],
    traces: Sequence[TraceRecord] = (),
    options: AlphaOptions | None = None,
) -> AlphaReport:
    """`alpha_star` with the options of a run."""
    options = options or AlphaOptions()
    return alpha_star(
        policy,
        pairs,
        traces=traces,
        **vars(options.settings),
        groups=options.groups,
        curvature=options.curvature,
        second_moments=options.second_moments,
        epsilon=options.epsilon,
        stream=options.stream,
    )


def write_rows(path: Path, rows: Iterable[PreferencePair | TraceRecord]) -> Path:
    """One JSON line a record."""
    path.write_text("".join(json.dumps(to_dict(row)) + "\n" for row in rows), encoding="utf-8")
    return path
