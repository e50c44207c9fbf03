"""Coverage of the interval of alpha under tails, dimensions, shared traces and several pairs, misses included.

    make acceptance            # or: python benchmarks/tails_of_alpha.py --replicates 2000

The procedure and its thresholds were committed before `SEED`, that commit's own number, drew the populations. Finished
cells are kept in the JSON file, so that a run that was stopped goes on; a cell that was made with fewer replicates than
asked for is made again. The interval before this one and V-statistics are held against the same table, and must fail.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from bvpo_stats.gradients.stream import pair_gradients
from bvpo_stats.lab.acceptance.replicates import isometric_coordinates
from bvpo_stats.lab.acceptance.weights import (
    COUNTED,
    FLOOR,
    WeightCoverage,
    WeightPopulation,
    coverage,
    finite,
    populations,
)
from bvpo_stats.model import load_policy
from bvpo_stats.studies.style import BLUE, INK, RED, figure, legend_below

SEED = 0x0F4FD55
"""The commit that froze the procedure, by the number it had before it was rebased."""
CHOOSING = 101
"""Seed of the populations on which settings were chosen."""
SIZES = (20, 50, 200, 1000)
HERE = Path(__file__).parent


def embedded(cache: Path) -> WeightPopulation:
    """Gradients of the embedded model's 396 prompts, made once (minutes), in coordinates of their span."""
    if not cache.exists():
        gradients = pair_gradients(load_policy("embedded", lora=4), "embedded")
        together = isometric_coordinates(np.concatenate([gradients.t, gradients.e]))
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, t=together[: len(gradients.t)], e=together[len(gradients.t) :])
    stored = np.load(cache)
    return finite("embedded model, its 396 prompts resampled", {name: stored[name] for name in ("t", "e")})


def read(path: Path) -> list[WeightCoverage]:
    """Lines of cells that an earlier run finished, with the same seed."""
    if not path.exists():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    nothing = dict.fromkeys(("coverage", "before", "width"), math.nan)
    lines = [{name: nothing[name] if x is None else x for name, x in line.items()} for line in stored["lines"]]
    return [WeightCoverage(**line) for line in lines] if stored["seed"] == SEED else []


def write(path: Path, lines: list[WeightCoverage]) -> None:
    """All lines, and what they were made with."""
    plain = [{name: None if x != x else x for name, x in asdict(line).items()} for line in lines]
    made = {"seed": SEED, "python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
    path.write_text(json.dumps(made | {"lines": plain}, indent=1) + "\n", encoding="utf-8")


def markdown(lines: list[WeightCoverage]) -> str:
    """The table."""
    upright = [line for line in lines if not line.population.startswith("V-statistics")]
    injected = [line for line in lines if line.population.startswith("V-statistics")]
    given = [line for line in upright if line.given >= COUNTED]
    before = [line for line in upright if line.before == line.before]
    held = sum(line.passed for line in upright)
    surely = sum(not line.passed and line.coverage + 2 * line.error < FLOOR for line in given)
    old = sum(line.before >= FLOOR for line in before)
    within = sum(0.935 <= line.coverage <= 0.965 for line in given)
    above = sum(line.coverage > 0.965 for line in given)
    text = [
        "# The interval of alpha under tails",
        "",
        "Nominal level 95%, the jackknife that the command uses (single prompts up to 256, else 20 groups), "
        f"populations and seeds drawn from the commit that froze the procedure ({SEED:x}). A cell is a population, N "
        "prompts and tau = eta L / B. Made by `python benchmarks/tails_of_alpha.py`, `reps` samples a cell.",
        "",
        f"**{held} of {len(upright)} cells pass**: where an interval is given in at least {COUNTED:.0%} of samples, "
        f"at least {FLOOR:.0%} of those given hold the truth; elsewhere at most {1 - FLOOR:.0%} of all samples carry "
        f"an interval that misses. {surely} of those that do not are below by two standard errors. Of {len(given)} "
        f"cells with intervals, coverage is within [.935, .965] in {within} and above in {above}. The interval before "
        f"this one reaches {FLOOR:.0%} in {old} of {len(before)} cells. "
        f"V-statistics pass {sum(line.passed for line in injected)} of {len(injected)}.",
        "",
        "`given`: share of samples with an interval; `cov`: coverage of those; `misled`: share of all samples with an "
        "interval that misses; `before`: coverage of the interval before (no hull, no widening, no refusal) where it "
        "was bounded; `n_eff`, `largest`: medians; `width`: over that of the interval before, where that is honest.",
        "",
        "| population | N | tau | alpha | reps | given | cov | misled | before | n_eff | largest | width | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for x in lines:
        number = lambda value: "-" if value != value else f"{value:.3f}"  # noqa: E731
        tau = "1" if x.tau == 1 else f"1/{round(1 / x.tau)}"
        text.append(
            f"| {x.population} | {x.prompts} | {tau} | {x.alpha:.2f} | {x.replicates} | {x.given:.2f} | "
            f"{number(x.coverage)} | {x.misled:.3f} | {number(x.before)} | {x.n_eff:.1f} | {x.largest:.2f} | "
            f"{'-' if x.width != x.width else f'{x.width:.2f}'} | {'' if x.passed else 'MISS'} |"
        )
    return "\n".join(text) + "\n"


def draw(lines: list[WeightCoverage], path: Path) -> None:
    """Coverage against n_eff, before and now."""
    shown = [x for x in lines if not x.population.startswith("V-statistics")]
    given = [x for x in shown if x.given >= COUNTED]
    with figure(path, width=7, height=4) as (_, axes):
        axes.scatter(
            [x.n_eff for x in shown], [x.before for x in shown], s=12, color=INK, label="before, wherever bounded"
        )
        axes.scatter([x.n_eff for x in given], [x.coverage for x in given], s=12, color=BLUE, label="now, where given")
        axes.axhspan(0.935, 0.965, color=BLUE, alpha=0.12, lw=0)
        axes.axhline(FLOOR, color=RED, lw=0.8)
        axes.set(xscale="log", xlabel="Median effective prompts, n_eff", ylabel="Coverage of the 95% interval")
        axes.set_ylim(0.5, 1.01)
        legend_below(axes)


def main() -> None:
    """Runs the cells that are missing and writes table, data and figure beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--only", default="", help="populations whose name holds this; the others stay as they are")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "runs" / "embedded_gradients.npz")
    parser.add_argument("--choose", action="store_true", help="other populations, for choosing; prints the table")
    arguments = parser.parse_args()
    if arguments.choose:
        chosen = [
            line
            for population in populations(CHOOSING)
            if arguments.only in population.name
            for size in arguments.sizes
            for line in coverage(population, size, arguments.replicates, CHOOSING)
        ]
        print(markdown(chosen))
        return
    data = HERE / "tails_of_alpha.json"
    lines = read(data)
    drawn = [*populations(SEED), embedded(arguments.cache)]
    upright = next(x for x in drawn if x.name.startswith("Gaussian, d = 5000"))
    v = replace(upright, name=f"V-statistics injected: {upright.name}", honest=False)
    for size in arguments.sizes:
        for population in [*drawn, v]:
            old = [x for x in lines if (x.population, x.prompts) == (population.name, size)]
            done = bool(old) and old[0].replicates >= arguments.replicates
            if done or arguments.only not in population.name:
                continue
            start = time.perf_counter()
            found = coverage(population, size, arguments.replicates, SEED, injected=population is v)
            lines = [x for x in lines if x not in old] + found
            write(data, lines)
            said = ", ".join(f"{x.coverage:.3f} of {x.given:.2f}" for x in found)
            print(f"{population.name}, N = {size}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
    order = {x.name: k for k, x in enumerate([*drawn, v])}
    lines = sorted(lines, key=lambda x: (order[x.population], x.prompts, -x.tau))
    write(data, lines)
    (HERE / "tails_of_alpha.md").write_text(markdown(lines), encoding="utf-8")
    draw(lines, HERE / "tails_of_alpha.png")


if __name__ == "__main__":
    main()
