"""Coverage and bias of alpha* on the oracle, against exact truth, in every cell that users meet.

    make acceptance            # or: python benchmarks/acceptance.py --replicates 2000

A cell is a sampling temperature, theta at or off theta_ref, beta, an estimator of mu, and a number of prompts; each
holds the three noise scales tau = eta L / B. Scores are computed once; a replicate is index arithmetic. Where the
estimator of mu is biased by construction, a cell is held against the estimator's own exact expectation, got by listing
every multiset of traces, so that it shows the predicted bias and nothing else. In the last lines V-statistics take the
place of U-statistics; they must fail. Finished cells are kept (``--kept``), so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np

from bvpo_stats.lab.acceptance.cells import TAUS, Cell, CellResult, run_cell
from bvpo_stats.lab.oracle import OracleConfig, build_oracle
from bvpo_stats.lab.oracle.trace_sets import METHODS, TraceSets

TEMPERATURES, DRIFTS, BETAS = (1.0, 0.8), (0.0, 0.05), (0.1, 1.0)
SIZES = (20, 50, 200)
Population = tuple[float, float, float]
"""Sampling temperature, drift, beta."""
SMALL = {"n_symbols": 2, "max_trace": 2, "n_answers": 3, "n_prompts": 2, "seed": 3}


def cells_of(population: Population, sizes: tuple[int, ...] = SIZES) -> list[Cell]:
    """The cells of one population, small samples first, and the V-statistics that must fail."""
    temperature, drift, beta = population
    cells = [Cell(temperature, drift, beta, method, size) for size, method in product(sizes, METHODS)]
    if drift == 0 and temperature == 1 and beta == 1:
        cells += [Cell(temperature, drift, beta, "anchored", size, statistic="V") for size in sizes]
    return cells


Made = tuple[CellResult, int]
"""A cell, and of how many replicates."""


def run_population(
    population: Population, sizes: tuple[int, ...], replicates: int, seed: int, kept: Path
) -> list[Made]:
    """All cells of one population; those that an earlier run left in the folder ``kept`` are not made again."""
    temperature, drift, beta = population
    oracle = build_oracle(OracleConfig(**SMALL, temperature=temperature, drift=drift))  # type: ignore[arg-type]
    sets, results = TraceSets.of(oracle, beta), []
    for cell in cells_of(population, SIZES):
        path = kept / f"{_name(cell)}, {cell.statistic}, seed {seed}.pickle"
        made: Made | None = pickle.loads(path.read_bytes()) if path.exists() else None
        if cell.n_prompts in sizes and (made is None or made[1] < replicates):
            made = run_cell(sets, cell, replicates, seed), replicates
            path.write_bytes(pickle.dumps(made))
            outcome = "pass" if made[0].passed else "FAIL"
            print(f"{_name(cell)} [{cell.statistic}]: {outcome}, {made[0].seconds:.0f} s", flush=True)
        if made is not None:
            results.append(made)
    return sorted(results, key=lambda x: (x[0].cell.statistic, METHODS.index(x[0].cell.method), x[0].cell.n_prompts))


def markdown(made: list[Made]) -> str:
    """The table."""
    upright = [r for r, _ in made if r.cell.statistic == "U"]
    injected = [r for r, _ in made if r.cell.statistic == "V"]
    lines = [
        "# Coverage and bias of alpha* on the oracle",
        "",
        "`reps` replicates a cell, nominal level 95%, the set of every alpha (`ratio_sets`), leave one prompt out "
        "(Wilson's intervals for squared biases); K = 8 traces an answer (multilevel: up to 1,024).",
        f"{sum(r.passed for r in upright)} of {len(upright)} cells pass every check; "
        f"{sum(not r.passed for r in injected)} of {len(injected)} injected V-statistics fail, as they must.",
        "",
        "`cov` is the coverage of alpha_unc (two-sided band; one-sided at 92% where N < 50 or tau < 0.01), `cov*` that "
        "of the clipped alpha* (one-sided), `z` the largest bias among twelve estimates in Monte Carlo standard errors "
        "(bound 3.5). Where mu is biased by construction the truth is the estimator's own exact expectation, and "
        "`shift` is what that bias does to alpha at tau = 1/128.",
        "",
        "| T | theta | beta | mu from | N | reps | "
        + " | ".join(f"cov, cov* at tau = {_tau(tau)}" for tau in TAUS)
        + " | z | mu | shift | verdict |",
        "|--:|---|--:|---|--:|--:|" + "--:|" * len(TAUS) + "--:|---|--:|---|",
    ]
    lines += [_row(*each) for each in made]
    lines += ["", "## Checks that failed", ""]
    for result in upright:
        lines += [
            f"- {_name(result.cell)}: {check.name} is {check.value:.4f}, allowed {check.low:.4f} to {check.high:.4f}"
            for check in result.checks
            if not check.passed
        ]
    return "\n".join(lines) + "\n"


def _row(result: CellResult, replicates: int) -> str:
    cell, checks = result.cell, {check.name: check.value for check in result.checks}
    coverages = [
        f"{checks[f'coverage alpha_unc, tau = {tau:g}']:.3f}, {checks[f'coverage alpha*, tau = {tau:g}']:.3f}"
        for tau in TAUS
    ]
    worst = max(abs(value) for name, value in checks.items() if name.startswith("bias "))
    mu = "unbiased" if result.unbiased_by_construction else "biased, as predicted"
    shift = "0" if result.unbiased_by_construction else f"{result.predicted_shift[-1]:+.4f}"
    verdict = "pass" if result.passed else "FAIL"
    if cell.statistic == "V":
        mu, shift, verdict = "V-statistic injected", "-", f"{verdict} (must fail)"
    theta = "theta_ref" if cell.drift == 0 else "drifted"
    columns = [f"{cell.temperature:g}", theta, f"{cell.beta:g}", cell.method, str(cell.n_prompts), str(replicates)]
    return "| " + " | ".join([*columns, *coverages, f"{worst:.1f}", mu, shift, verdict]) + " |"


def _name(cell: Cell) -> str:
    theta = "theta_ref" if cell.drift == 0 else "drifted"
    return f"T = {cell.temperature:g}, {theta}, beta = {cell.beta:g}, {cell.method}, N = {cell.n_prompts}"


def _tau(tau: float) -> str:
    return f"1/{round(1 / tau)}" if tau < 1 else f"{tau:g}"


def main() -> None:
    """Runs all cells and writes ``acceptance.md`` and ``acceptance.json`` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="the others stay as they are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; the results do not depend on it")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--kept", type=Path, default=Path(__file__).parent.parent / "runs" / "acceptance")
    arguments = parser.parse_args()
    populations: list[Population] = list(product(TEMPERATURES, DRIFTS, BETAS))
    arguments.kept.mkdir(parents=True, exist_ok=True)
    task = functools.partial(
        run_population,
        sizes=tuple(arguments.sizes),
        replicates=arguments.replicates,
        seed=arguments.seed,
        kept=arguments.kept,
    )
    with ProcessPoolExecutor(arguments.jobs) as pool:
        made = [each for part in pool.map(task, populations) for each in part]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "acceptance.md").write_text(markdown(made), encoding="utf-8")
    plain = {
        "seed": arguments.seed,
        "taus": TAUS,
        "oracle": SMALL,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cells": [asdict(r) | {"replicates": replicates, "passed": r.passed} for r, replicates in made],
    }
    text = json.dumps(plain, indent=1) + "\n"
    (arguments.output / "acceptance.json").write_text(text, encoding="utf-8")
    if not all(r.passed == (r.cell.statistic == "U") for r, _ in made):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
