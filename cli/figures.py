"""``bvpo-stats figures``: pictures from reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """Examples:

bvpo-stats figures runs/variance runs/alpha-star

bvpo-stats figures runs --output pictures

bvpo-stats figures"""


def figures(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of runs, or folders that hold some.",
            show_default="the reports that lie in --output",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures: one folder a run, its report beside them.")] = (
        Path("figures")
    ),
) -> None:
    """Draw the figures of runs from their report.json alone; without RUNS, draw those in --output anew."""
    from bvpo_stats.pages.figures import draw_all

    for drawn in draw_all(runs or [], output):
        if drawn.figures:
            print(f"{drawn.run.name}: {', '.join(str(path) for path in drawn.figures)}")
        else:
            print(f"{drawn.run.name}: nothing drawn, {drawn.reason}")
