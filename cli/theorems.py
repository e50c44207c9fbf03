"""``bvpo-stats theorems``: the paper's claims, put to the test."""

from __future__ import annotations

from pathlib import Path

import typer

from bvpo_stats.lab.theorems.config import TheoremConfig

EXAMPLES = """Examples:

bvpo-stats theorems

bvpo-stats theorems --seed 3 --beta 0.5 --output runs/theorems-3

bvpo-stats theorems --embedded-prompts 0 --output runs/oracle-only

Exits with 1 when a claim that should hold does not."""


def theorems(config: TheoremConfig, output: Path) -> None:
    """Check every theorem of the paper on models whose exact answers are known: claim, measured, exact, verdict.

    Takes about half a minute on one core; the same folder again makes every check again.
    """
    from bvpo_stats.lab.theorems.run import run_theorems

    report = run_theorems(config, output)
    report.print(output)
    if report.alarms:
        raise typer.Exit(1)
