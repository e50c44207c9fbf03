"""``bvpo-stats demo``: the whole story on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """Examples:

bvpo-stats demo

bvpo-stats demo --quick --output runs/demo-quick"""


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A first impression in a minute, with wide intervals.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides every random draw.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the results; the same folder again resumes the run.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Tell the whole story on the embedded model, in a few minutes on two cores, and write one HTML page of it.

    Each stage is a run of its own in a folder below the output, and goes on where it was stopped.
    """
    from bvpo_stats.pages.demo import FULL, QUICK, run_demo

    print(f"Open: {run_demo(output, seed, QUICK if quick else FULL)}")
