"""``bvpo-stats oracle-training``: proof on the enumerable model that an estimated alpha pays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from bvpo_stats.cli import options as o

from bvpo_stats.errors import UserError

EXAMPLES = """Examples:

bvpo-stats oracle-training

bvpo-stats oracle-training --eta-l 0.2,1.4 --seeds 4 --steps 60 --output runs/oracle-quick

bvpo-stats oracle-training --oracle-seed 1 --probe-prompts 64 --output runs/oracle-other"""


def oracle_training(
    eta_l: Annotated[
        str, typer.Option(help="Step sizes: learning rate times the smoothness at the reference, separated by commas.")
    ] = "0.2,0.6,1.4",
    seeds: Annotated[int, typer.Option(help="Runs of each method at each step size.")] = 10,
    steps: Annotated[int, typer.Option(help="SGD steps of a run.")] = 150,
    batch_size: Annotated[int, typer.Option(help="Pairs of D_t and of D_e in a step.")] = 8,
    beta: Annotated[float, typer.Option(help="DPO's inverse temperature.")] = 1.0,
    probe_prompts: Annotated[int, typer.Option(help="Held-out pairs behind the estimated mu.")] = 256,
    traces_per_answer: Annotated[int, typer.Option(help="K, traces an answer for its score, and as many again.")] = 8,
    probe_every: Annotated[int, typer.Option(help="Steps from one probe to the next.")] = 10,
    symbols: Annotated[int, typer.Option(help="Trace symbols of the model's language.")] = 2,
    max_trace: Annotated[int, typer.Option(help="Longest trace.")] = 2,
    oracle_prompts: Annotated[int, typer.Option(help="Prompts of the language.")] = 2,
    oracle_seed: Annotated[int, typer.Option(help="Decides the model's weights and rewards.")] = 3,
    level: Annotated[float, typer.Option(help="Confidence level of the intervals over seeds.")] = 0.95,
    seed: o.Seed = 0,
    output: o.Output = Path("runs/oracle-training"),
    config: o.Config = None,
) -> None:
    """Train the enumerable model with fixed, estimated and exact alphas and compare the exact gradient norms.

    Results are kept after each method and step size; the same command goes on where it stopped.
    """
    from bvpo_stats.lab.oracle.build import OracleConfig
    from bvpo_stats.lab.oracle_training.config import OracleTrainingConfig
    from bvpo_stats.lab.oracle_training.run import run_oracle_training

    try:
        sizes = tuple(float(word) for word in eta_l.split(","))
    except ValueError as error:
        raise UserError(f"--eta-l {eta_l}: give numbers separated by commas, such as 0.2,0.6,1.4.") from error
    settings = OracleTrainingConfig(
        oracle=OracleConfig(n_symbols=symbols, max_trace=max_trace, n_prompts=oracle_prompts, seed=oracle_seed),
        beta=beta,
        eta_l=sizes,
        seeds=seeds,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        probe_prompts=probe_prompts,
        traces=traces_per_answer,
        probe_every=probe_every,
        level=level,
    )
    run_oracle_training(settings, output).print(output)
