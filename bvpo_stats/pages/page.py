"""One self-contained HTML file from all runs of a folder: no network, no script, images inlined."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bvpo_stats import __version__
from bvpo_stats.errors import UserError
from bvpo_stats.pages.figures import draw_figures
from bvpo_stats.pages.runs import KINDS, Run, find_runs, story_order
from bvpo_stats.progress import progress
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.studies.base import Presentation, ResultTable, caption

_MOST_ROWS = 80
_LARGEST_IMAGE = 4 * 2**20  # bytes of a picture found in the folder of an unknown study


@dataclass(frozen=True)
class Image:
    """A picture as it stands in the page.

    Attributes:
        source: Data URI.
        words: What stands in for it where it cannot be seen.
    """

    source: str
    words: str


@dataclass(frozen=True)
class Section:
    """One run on the page.

    Attributes:
        anchor: Its id in the page.
        run: The run.
        shown: What its report says; None where there is no report to read.
        images: Its figures.
        problem: What is wrong with it.
        configuration: Name and value of each setting.
        versions: Software that made it.
    """

    anchor: str
    run: Run
    shown: Presentation | None
    images: list[Image]
    problem: str | None
    configuration: list[tuple[str, str]]
    versions: str


def write_page(root: Path, output: Path | None = None, title: str | None = None) -> Path:
    """Writes the page of all runs in a folder.

    Args:
        root: Folder that holds the runs, or the folder of one.
        output: The HTML file; ``root/report.html`` if left out.
        title: Its title.

    Returns:
        The file written.

    Raises:
        UserError: No run found, or the file cannot be written.
    """
    runs = sorted(find_runs(root), key=lambda run: (story_order(run.study), run.name))
    output = output or (root if root.is_dir() else root.parent) / "report.html"
    if output.is_dir():
        raise UserError(f"`output={str(output)!r}` is a folder. Name the HTML file.")
    if output.exists() and not _is_page(output):
        raise UserError(f"`output={str(output)!r}` is another file, no HTML page; nothing was overwritten.")
    sections = []
    with progress("Reporting", len(runs), "runs") as advance:
        for place, run in enumerate(runs, start=1):
            sections.append(_section(run, f"run-{place}"))
            advance(1)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create {output.parent}: {error.strerror}. Check the path.") from error
    write_atomic(output, render(sections, title or f"Runs in {root.resolve().name}"))
    return output


def _is_page(path: Path) -> bool:
    """Whether a file may be written over: a page, or nothing at all."""
    with path.open("rb") as handle:
        head = handle.read(100).lstrip().lower()
    return not head or head.startswith((b"<!doctype html", b"<html"))


def render(sections: list[Section], title: str) -> str:
    """The page's HTML; everything that comes from data is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bvpo_stats.pages", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(sections=sections, title=title, version=__version__)


def _section(run: Run, anchor: str) -> Section:
    shown, problem = _present(run)
    versions: Any = (run.report or {}).get("versions")
    return Section(
        anchor=anchor,
        run=run,
        shown=shown,
        images=list(_images(run)),
        problem=problem,
        configuration=[(name, _plain(value)) for name, value in _flatten(run.configuration)],
        versions=", ".join(f"{name} {number}" for name, number in versions.items())
        if isinstance(versions, dict)
        else "",
    )


def _present(run: Run) -> tuple[Presentation | None, str | None]:
    """(what to show, what is wrong)."""
    if run.report is None:
        return None, run.problem
    if run.study not in KINDS:
        return _anything(run.report), f"No page is known for a report of {run.study or 'an unnamed study'}; its values:"
    try:
        return run.read().present(), None
    except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return _anything(run.report), (
            f"The report is of another version of {run.study} ({type(error).__name__}: {error}); its values:"
        )


def _anything(report: dict[str, Any]) -> Presentation:
    """A report of any shape: its plain values, by their place in it."""
    rows = [(name, _plain(value)) for name, value in _flatten({k: v for k, v in report.items() if k != "versions"})]
    left = len(rows) - _MOST_ROWS
    notes = (f"{left} further values are in report.json.",) if left > 0 else ()
    table = ResultTable("Values", ("Name", "Value"), tuple(rows[:_MOST_ROWS]), text_columns=(1,))
    return Presentation("Report", tables=(table,), notes=notes)


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not name):
        for key, entry in value.items():
            yield from _flatten(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        shown = ", ".join(_plain(entry) for entry in value[:8])
        return f"{shown}, ... ({len(value)} in all)" if len(value) > 8 else shown
    return str(value)


def _images(run: Run) -> Iterator[Image]:
    """The run's figures, drawn from its report; for studies unknown here, the PNG files it left itself."""
    title = run.study if run.study in KINDS else "figure"
    with TemporaryDirectory() as folder:
        paths = draw_figures(run, Path(folder)).figures
        if not paths and run.study not in KINDS:
            found = sorted((run.folder / "figures").glob("*.png"))
            paths = [path for path in found if path.stat().st_size <= _LARGEST_IMAGE]
        for path in paths:
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            yield Image(f"data:image/png;base64,{data}", f"{title}: {caption(path)}")
