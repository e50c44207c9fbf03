"""``bvpo-stats report``: one HTML page of all runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """Examples:

bvpo-stats report

bvpo-stats report runs/alpha-star --output alpha.html --title 'alpha* of our checkpoint 200'"""


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs, or the folder of one run.")] = Path("runs"),
    output: Annotated[Path | None, typer.Option(help="The HTML file.", show_default="report.html in FOLDER")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
) -> None:
    """Write one self-contained HTML file from the runs in a folder: tables, figures, verdicts, configuration."""
    from bvpo_stats.pages.page import write_page

    print(f"Written: {write_page(folder, output, title)}")
