"""What a report shows people - findings, tables, notes - before it is terminal text, Markdown or HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Literal

Mark = Literal["holds", "fails", "open", "plain"]
"""How a finding stands: it holds, it fails, the data cannot say, or it is no question of holding."""


@dataclass(frozen=True)
class Finding:
    """An answer in a sentence.

    Attributes:
        sentence: What was found.
        mark: How it stands.
    """

    sentence: str
    mark: Mark = "plain"


@dataclass(frozen=True)
class ResultTable:
    """A table of ready-made cells; the first column names the row, the others are aligned to the right.

    Attributes:
        title: What it shows, units included.
        head: Column headings.
        rows: Cells, one tuple a row.
        text_columns: Further columns that hold words, aligned to the left.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: tuple[int, ...] = ()

    def is_text(self, column: int) -> bool:
        """Whether a column holds words rather than numbers."""
        return column == 0 or column in self.text_columns


@dataclass(frozen=True)
class Presentation:
    """A report as people see it.

    Attributes:
        title: The question that the study answers.
        findings: Answers in sentences, the most important first.
        tables: Tables.
        notes: What the numbers are.
        cautions: What to know before quoting one.
    """

    title: str
    findings: tuple[Finding, ...] = ()
    tables: tuple[ResultTable, ...] = ()
    notes: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Notes and cautions, the latter marked as such."""
        return [*self.notes, *(f"Careful: {caution}" for caution in self.cautions)]


def print_presentation(shown: Presentation, written: str) -> None:
    """Prints findings, tables and notes on standard output; tables with one head become sections of one.

    Args:
        shown: What to print.
        written: What was written, and where, for the last line.
    """
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.table import Table

    console = Console()
    for head, group in groupby(shown.tables, key=lambda table: table.head):
        parts = list(group)
        title = shown.title if len(parts) > 1 else parts[0].title
        grid = Table(title=plain(title), title_justify="left", title_style="bold", min_width=64)
        for column, name in enumerate(head):
            grid.add_column(plain(name), justify="left" if parts[0].is_text(column) else "right")
        for part in parts:
            if len(parts) > 1:
                grid.add_section()
                grid.add_row(plain(part.title), style="bold")
            for row in part.rows:
                indent = "  " if len(parts) > 1 else ""
                grid.add_row(indent + plain(row[0]), *map(plain, row[1:]))
        console.print(grid)
    for finding in shown.findings:
        console.print(plain(finding.sentence), highlight=False, soft_wrap=True, style="bold")
    for line in shown.lines():
        console.print(plain(line), highlight=False, soft_wrap=True, style="dim")
    console.print(plain(f"Written: {written}."), highlight=False, soft_wrap=True)


def markdown(shown: Presentation, figures: Sequence[Path], versions: dict[str, str]) -> str:
    """The report as Markdown, with links to figures in the folder ``figures`` beside it."""
    lines = [f"# {shown.title}", ""]
    for finding in shown.findings:
        lines += [f"**{finding.sentence}**", ""]
    for table in shown.tables:
        lines += [f"## {table.title}", "", *_markdown_table(table), ""]
    if shown.lines():
        lines += ["## What the numbers are", "", *(f"- {line}" for line in shown.lines()), ""]
    if figures:
        lines += ["## Figures", "", *(f"![{caption(path)}](figures/{path.name})" for path in figures), ""]
    lines += ["Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".", ""]
    return "\n".join(lines)


def html(shown: Presentation) -> str:
    """Findings, tables and cautions as an HTML fragment, for notebooks."""
    parts = [f"<p><b>{escape(finding.sentence)}</b></p>" for finding in shown.findings]
    for table in shown.tables:
        rows = [_html_row("th", table.head), *(_html_row("td", row) for row in table.rows)]
        parts.append(f"<table><caption>{escape(table.title)}</caption>{''.join(rows)}</table>")
    parts += [f"<p>Careful: {escape(caution)}</p>" for caution in shown.cautions]
    return "".join(parts)


def caption(figure: Path) -> str:
    """A figure's name in words: what its file is called."""
    return figure.stem.replace("_", " ")


def number(value: float | None) -> str:
    """Four significant digits, or a dash where there is no number."""
    return "-" if value is None else f"{value:.4g}"


def _markdown_table(table: ResultTable) -> list[str]:
    rule = "".join("---|" if table.is_text(column) else "--:|" for column in range(len(table.head)))
    return [_markdown_row(table.head), f"|{rule}", *(_markdown_row(row) for row in table.rows)]


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |"


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
