"""Coverage of intervals of mean variances and of their ratio (the paper's Appendix B), where a few questions rule.

    make acceptance            # or: python benchmarks/tails.py --replicates 2000

The populations, but for the embedded model's own, are drawn from the seed; procedure, floors and the rule that says
"few questions" were committed before it was chosen. The interval that `variance` had before is held against the same
table, and must fail it.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bvpo_stats.lab.acceptance.tails import (
    FLOORS,
    TailCoverage,
    VariancePopulation,
    coverage,
    jackknife_ends,
    measured,
    populations,
)
from bvpo_stats.records import MODES, Completion
from bvpo_stats.sampling.sample import SAMPLES_FILE
from bvpo_stats.sampling.scoring import LOGPROBS_FILE, read_logprobs
from bvpo_stats.statistics.moments import Array
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.variance.config import VarianceConfig
from bvpo_stats.studies.variance.report import reduce_sample
from bvpo_stats.studies.variance.run import run_variance

SEED = 0xDBB5146
"""The commit that froze the procedure."""


def embedded_variances(seed: int) -> dict[str, Array]:
    """Per-question variances of log p and length of the embedded model, ``[questions, 2 modes]`` each."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        run_variance(VarianceConfig(seed=seed), folder)
        logprobs = dict(read_logprobs(folder / LOGPROBS_FILE))
        drawn: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for response in read_records(folder / SAMPLES_FILE, Completion):
            if response.complete:
                found = reduce_sample(response, np.asarray(logprobs[response.key]))
                drawn.setdefault((found.prompt_id, found.mode), []).append((found.logp, found.length))
    kept = sorted({prompt for prompt, _ in drawn if all(len(drawn.get((prompt, mode), [])) >= 2 for mode in MODES)})
    table = np.array([[np.var(drawn[prompt, mode], axis=0, ddof=1) for mode in MODES] for prompt in kept])
    return {"log p": table[..., 0], "length": table[..., 1]}


def judge(judged: list[VariancePopulation], replicates: int, seed: int) -> list[tuple[TailCoverage, TailCoverage]]:
    """Every line of the table, beside the same samples under the interval before."""
    lines = []
    for population in judged:
        for questions in FLOORS:
            new = coverage(population, questions, replicates, seed)
            old = coverage(population, questions, replicates, seed, ends=jackknife_ends)
            lines += list(zip(new, old, strict=True))
        print(population.name, *(f"{new.coverage:.3f}" for new, _ in lines[-2 * len(FLOORS) :]), flush=True)
    return lines


def markdown(lines: list[tuple[TailCoverage, TailCoverage]], replicates: int, seed: int) -> str:
    """The table."""
    floors = ", ".join(f"{floor:.0%} at {n:,}" for n, floor in FLOORS.items())
    held = [(new, old) for new, old in lines if not new.power_law]
    passed = sum(new.passed for new, _ in lines), sum(old.coverage >= FLOORS[old.questions] for _, old in lines)
    worst = min(old.coverage for _, old in held), min(new.coverage for new, _ in held)
    text = [
        "# Coverage of intervals of mean variances",
        "",
        f"{replicates:,} samples a line, nominal level 95%, seed {seed:#x}. `mean` is a mean over questions of the "
        "variance with a trace, `ratio` the paper's ratio of two. A question's variance is estimated from its few "
        "responses.",
        "",
        f"Floors: {floors} questions. {passed[0]} of {len(lines)} lines pass; under the jackknife interval of log "
        f"theta that `variance` had before, {passed[1]} do. At worst that one covers {worst[0]:.2f}, the present one "
        f"{worst[1]:.2f} (the last population aside).",
        "",
        "`low` is the share of intervals that lie below the truth, `before` the coverage of the interval before; "
        "`width` the median of the two ends' ratio, `times before` its log over that of the interval before; `few` how "
        "often the report says that few questions rule. Where variances follow a power law without a variance (Student "
        "t_3 scales), no interval of the mean holds: the line passes if most samples say that few questions rule.",
        "",
        "| population | questions | of the | coverage | low | before | width | times before | n_eff | few | verdict |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for new, old in lines:
        verdict = "pass" if new.passed else "FAIL"
        if new.passed and new.coverage < FLOORS[new.questions]:
            verdict = "said by n_eff"
        text.append(
            f"| {new.population} | {new.questions:,} | {new.statistic} | {new.coverage:.3f} | {new.below:.3f} "
            f"| {old.coverage:.3f} | {new.width:.3g} | {np.log(new.width) / np.log(old.width):.2f} | {new.n_eff:.1f} "
            f"| {new.few:.0%} | {verdict} |"
        )
    return "\n".join(text) + "\n"


def main() -> None:
    """Runs all lines and writes ``tails.md`` and ``tails.json`` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    own = embedded_variances(arguments.seed)
    judged = populations(arguments.seed)
    judged[-1:-1] = [measured(f"embedded model, variance of {name}", table, 5) for name, table in own.items()]
    lines = judge(judged, arguments.replicates, arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "tails.md").write_text(markdown(lines, arguments.replicates, arguments.seed), encoding="utf-8")
    plain = {
        "replicates": arguments.replicates,
        "seed": arguments.seed,
        "floors": FLOORS,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "lines": [
            asdict(new) | {"passed": new.passed, "before": {"coverage": old.coverage, "width": old.width}}
            for new, old in lines
        ],
    }
    (arguments.output / "tails.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    before = sum(old.coverage < FLOORS[old.questions] for _, old in lines)
    if not all(new.passed for new, _ in lines) or not before:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
