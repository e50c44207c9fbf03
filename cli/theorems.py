"""``bvpo-stats theorems``: the paper's claims, put to the test."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from bvpo_stats.cli import options as o

EXAMPLES = """Examples:

bvpo-stats theorems

bvpo-stats theorems --seed 3 --beta 0.5 --output runs/theorems-3

bvpo-stats theorems --embedded-prompts 0 --output runs/oracle-only

Exits with 1 when a claim that should hold does not."""


def theorems(
    beta: Annotated[float, typer.Option(help="Inverse temperature of the DPO loss.")] = 0.1,
    draws: Annotated[int, typer.Option(help="Examples drawn where a claim is measured on samples.")] = 16_384,
    embedded_prompts: Annotated[
        int, typer.Option(help="Questions put to the embedded model for Appendix B; 0 leaves it out.")
    ] = 40,
    seed: o.Seed = 0,
    output: Annotated[
        Path, typer.Option(help="Folder for the results; the same folder again makes every check again.")
    ] = Path("runs/theorems"),
    config: o.Config = None,
) -> None:
    """Check every theorem of the paper on models whose exact answers are known: claim, measured, exact, verdict.

    Takes about half a minute on one core.
    """
    from bvpo_stats.lab.theorems.config import TheoremConfig
    from bvpo_stats.lab.theorems.run import run_theorems

    report = run_theorems(TheoremConfig(beta, draws, seed, embedded_prompts), output)
    report.print(output)
    if report.alarms:
        raise typer.Exit(1)
