"""What every study has in common: a report that is data, and what people see of it.

A study's report is a frozen dataclass that inherits from `Report`. It says what it found (`present`) and may draw it
(`figures`); reading and writing ``report.json``, Markdown, terminal tables and notebook HTML follow from these.
"""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from html import escape
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bvpo_stats.errors import UserError, one_line, wording
from bvpo_stats.progress import say
from bvpo_stats.store.jsonl import write_atomic, write_sealed, writing

ReportT = TypeVar("ReportT", bound="Report")

REPORT_FILE = "report.json"
"""Written last of all files of a run: whoever sees it finds the rest."""

Mark = Literal["holds", "fails", "open", "plain"]
"""How a finding stands: it holds, it fails, the data cannot say, or it is no question of holding."""

MODE_NAMES = {"thinking": "Thinking", "nothinking": "NoThinking"}
"""The two modes as people read them."""
FEW_PROMPTS = 20

_PACKAGES = ("bvpo-stats", "torch", "transformers", "peft", "tokenizers", "numpy", "scipy")


@dataclass(frozen=True)
class Finding:
    """An answer in a sentence, and how it stands."""

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

    def __post_init__(self) -> None:
        spoken = wording.get()
        findings = tuple(replace(finding, sentence=spoken(finding.sentence)) for finding in self.findings)
        object.__setattr__(self, "findings", findings)
        for name in ("notes", "cautions"):
            object.__setattr__(self, name, tuple(map(spoken, getattr(self, name))))

    def lines(self) -> list[str]:
        """Notes and cautions, the latter marked as such."""
        return [*self.notes, *(f"Careful: {caution}" for caution in self.cautions)]

    def text(self) -> str:
        """The answer in a few lines: findings (without any: the tables' cells) and cautions."""
        lines = [finding.sentence for finding in self.findings]
        if not lines:
            lines = [self.title, *(", ".join(map(str.strip, row)) for table in self.tables for row in table.rows)]
        return "\n".join([*lines, *(f"Careful: {caution}" for caution in self.cautions)])

    def print(self, written: str | None = None) -> None:
        """Prints findings, tables and notes on standard output; tables with one head become sections of one.

        Args:
            written: What was written, and where, for a last line.
        """
        if find_spec("rich") is None:  # the extra [cli] is not there
            print(self.text())
            return
        from rich.console import Console
        from rich.markup import escape as without_markup
        from rich.table import Table

        def plain(text: str) -> str:
            return without_markup(one_line(text))

        console = Console()
        for head, group in groupby(self.tables, key=lambda table: table.head):
            parts = list(group)
            title = self.title if len(parts) > 1 else parts[0].title
            indent = "  " if len(parts) > 1 else ""
            rows = [(indent + row[0], *row[1:]) for part in parts for row in part.rows]
            sections = [part.title for part in parts] if len(parts) > 1 else []
            for widths in _column_widths([head, *rows], sections, console.width):
                grid = Table(title=plain(title), title_justify="left", title_style="bold")
                for column, width in widths.items():
                    justify: Literal["left", "right"] = "left" if parts[0].is_text(column) else "right"
                    grid.add_column(plain(head[column]), justify=justify, width=width)
                for part in parts:
                    if len(parts) > 1:
                        grid.add_section()
                        grid.add_row(plain(part.title), style="bold")
                    for row in part.rows:
                        grid.add_row(*(indent * (column == 0) + plain(row[column]) for column in widths))
                console.print(grid)
        for finding in self.findings:
            console.print(plain(finding.sentence), highlight=False, soft_wrap=True, style="bold")
        for line in self.lines():
            console.print(plain(line), highlight=False, soft_wrap=True, style="dim")
        if written is not None:
            console.print(plain(f"Written: {written}."), highlight=False, soft_wrap=True)

    def markdown(self, figures: Sequence[Path], versions: Mapping[str, str]) -> str:
        """Markdown, with links to figures in the folder ``figures`` beside it."""
        lines = [f"# {escaped(self.title)}", ""]
        for finding in self.findings:
            lines += [f"**{escaped(finding.sentence)}**", ""]
        for table in self.tables:
            lines += [f"## {escaped(table.title)}", "", *_markdown_table(table), ""]
        if self.lines():
            lines += ["## What the numbers are", "", *(f"- {escaped(line)}" for line in self.lines()), ""]
        if figures:
            lines += ["## Figures", "", *(f"![{caption(path)}](figures/{path.name})" for path in figures), ""]
        lines += ["Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".", ""]
        return "\n".join(lines)

    def html(self) -> str:
        """Findings, tables and cautions as an HTML fragment, for notebooks."""
        parts = [f"<p><b>{escape(finding.sentence)}</b></p>" for finding in self.findings]
        for table in self.tables:
            rows = [_html_row("th", table.head), *(_html_row("td", row) for row in table.rows)]
            parts.append(f"<table><caption>{escape(table.title)}</caption>{''.join(rows)}</table>")
        parts += [f"<p>Careful: {escape(caution)}</p>" for caution in self.cautions]
        return "".join(parts)


def _column_widths(rows: Sequence[Sequence[str]], sections: Sequence[str], most: int) -> list[dict[int, int]]:
    """Widths of a table's columns by which no word is cut; a table too wide for that becomes several.

    Args:
        rows: Cells, the head's among them.
        sections: What stands in the first column besides.
        most: Characters of a line.

    Returns:
        Column to width, one entry a table; the first column is in all of them.
    """
    cells = [*zip(*rows, strict=True)]
    cells[0] = (*cells[0], *sections)
    needed = [max(len(word) for text in column for word in (text.split() or [""])) for column in cells]
    needed[0] = max(needed[0] + 2, min(24, max(map(len, cells[0]))))  # the indent of a section's rows; room to read
    tables = [{0: needed[0]}]
    for column in range(1, len(cells)):
        if len(tables[-1]) > 1 and sum(tables[-1].values()) + needed[column] + 3 * len(tables[-1]) + 4 > most:
            tables.append({0: needed[0]})
        tables[-1][column] = needed[column]
    for table in tables:
        wanted = {column: max(map(len, cells[column])) for column in table}
        wanted[0] += max(0, min(64, most) - sum(wanted.values()) - 3 * len(table) - 1)  # room for the title
        spare = max(0, most - sum(table.values()) - 3 * len(table) - 1)
        for longest in (30, most):  # numbers stay on one line; then sentences share what is left
            while spare and (short := [column for column in table if table[column] < min(longest, wanted[column])]):
                for column in sorted(short, key=lambda column: wanted[column] - table[column])[:spare]:
                    table[column] += 1
                    spare -= 1
    return tables


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # pragma: no cover - only when run from a source tree that was never installed
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class Report:
    """Base of the studies' reports: a subclass names its ``study``, adds fields, and implements `present`.

    Fields may be numbers, strings, lists, tuples, dictionaries with string keys and dataclasses of these, each with
    ``| None``. A NaN is written as null; a null that stands where a ``float`` is expected is read as NaN.

    Attributes:
        versions: Software that made it.
    """

    study: ClassVar[str]
    """What stands under ``study`` in ``report.json``."""

    drawn_by: ClassVar[str | None] = None
    """Module with ``draw(report, folder)``; it is imported, and seaborn with it, when figures are wanted."""

    versions: dict[str, str] = field(default_factory=software_versions, kw_only=True)

    def present(self) -> Presentation:
        """Findings, tables, notes and cautions."""
        raise NotImplementedError

    def figures(self, folder: Path) -> list[Path]:
        """Draws the figures as PNG files into a folder and returns their paths; what it has no data for is left out."""
        if self.drawn_by is None:
            return []
        drawn: list[Path] = import_module(self.drawn_by).draw(self, folder)
        return drawn

    def written(self, folder: Path) -> str:
        """What a run leaves in its folder, in words, for the last line on the terminal."""
        return f"{folder / REPORT_FILE}, report.md, figures/"

    def to_dict(self) -> dict[str, Any]:
        """The report as it stands in ``report.json``: plain values, None for NaN, ``study`` first, versions last."""
        plain: dict[str, Any] = clean(asdict(self))
        plain["versions"] = plain.pop("versions")
        return {"study": self.study, **plain}

    def to_json(self) -> str:
        """The text of ``report.json``."""
        return to_json(self.to_dict())

    @classmethod
    def from_dict(cls: type[ReportT], plain: dict[str, Any]) -> ReportT:
        """Reads what `to_dict` made; entries that it does not know are passed over.

        Raises:
            UserError: Not a report of this study, or of another version of it.
        """
        try:
            found: ReportT = decode(cls, {"versions": {}} | plain, "report")
        except (ValueError, TypeError, KeyError, AttributeError, UserError) as error:
            raise UserError(f"This is no {cls.study} report ({error}). Give the report.json of such a run.") from error
        return found

    @classmethod
    def from_json(cls: type[ReportT], text: str) -> ReportT:
        """Reads what `to_json` wrote.

        Raises:
            UserError: Not JSON, or not a report of this study.
        """
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise UserError(f"This is not JSON ({error}). Give the report.json of a {cls.study} run.") from error
        return cls.from_dict(plain)

    def print(self, folder: Path | None = None) -> None:
        """Prints tables, findings and notes on standard output, and what lies in the run's folder if it has one."""
        self.present().print(None if folder is None else self.written(folder))

    def markdown(self, figures: Sequence[Path] = ()) -> str:
        """The report as Markdown, with links to figures in the folder ``figures`` beside it."""
        return self.present().markdown(figures, self.versions)

    def plot(self, folder: Path | str | None = None) -> list[Path]:
        """Draws the figures.

        Args:
            folder: Where the PNG files go; None shows them in a notebook, without keeping them.

        Returns:
            The files; none where they were only shown.

        Raises:
            UserError: No folder was given outside a notebook.
        """
        if folder is not None:
            return self.figures(Path(folder))
        shell = sys.modules.get("IPython")
        if shell is None or shell.get_ipython() is None:
            raise UserError("`folder=None` shows figures in a notebook; elsewhere, give plot() a folder for them.")
        from IPython.display import Image, display

        with TemporaryDirectory() as place:
            for path in self.figures(Path(place)):
                display(Image(path.read_bytes(), width=640))  # type: ignore[no-untyped-call]
        return []

    def write(self, folder: Path) -> None:
        """Writes figures, ``report.md`` and, last, ``report.json``."""
        figures: list[Path] = []
        if find_spec("seaborn") is None:
            say("No figures: no seaborn (pip install 'bvpo-stats[plots]'; `bvpo-stats figures` draws them later).")
        else:
            with writing(folder / "figures"):
                figures = self.figures(folder / "figures")
        write_atomic(folder / "report.md", self.markdown(figures))
        write_sealed(folder / REPORT_FILE, self.to_json())

    def __str__(self) -> str:
        return self.present().text()

    def _repr_html_(self) -> str:
        return self.present().html()


def decode(kind: Any, value: Any, where: str) -> Any:
    """A plain value of JSON as the type that a field was declared with.

    Args:
        kind: A type: plain, list, tuple, dictionary, Literal, dataclass, a union of these, or Any.
        value: What `json.loads` gave.
        where: Place of the value, for errors.

    Raises:
        UserError: The value is not of that type; its place is named.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _decode_union(arguments, value, where)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin is Literal:
        _expect(value in arguments, where, f"one of {', '.join(map(str, arguments))}", value)
        return value
    if origin in (list, tuple):
        _expect(isinstance(value, (list, tuple)), where, "a list", value)
        kinds = [arguments[0]] * len(value) if origin is list or arguments[1:] == (...,) else list(arguments)
        _expect(len(kinds) == len(value), where, f"a list of {len(kinds)}", value)
        return origin(
            decode(k, entry, f"{where}[{at}]") for at, (k, entry) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        _expect(isinstance(value, dict), where, "an object", value)
        return {key: decode(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if kind is float:
        _expect(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)), where, kind, value)
        return math.nan if value is None else value
    _expect(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), where, kind, value)
    return value


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    problem = None
    for kind in (kind for kind in kinds if kind is not type(None)):
        try:
            return decode(kind, value, where)
        except UserError as error:
            problem = error
    assert problem is not None  # a union has several members
    raise problem


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, "an object", value)
    hints, values = get_type_hints(kind), {}
    for entry in fields(kind):
        if entry.name in value:
            values[entry.name] = decode(hints[entry.name], value[entry.name], f"{where}.{entry.name}")
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"{where} has no `{entry.name}`")
    return kind(**values)


def _expect(holds: bool, where: str, wanted: Any, value: Any) -> None:
    if not holds:
        wanted = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", wanted)
        raise UserError(f"{where} is {str(value)[:60]!r}, not {wanted}")


def to_json(plain: dict[str, Any]) -> str:
    """Indented JSON with a final newline; NaN and infinities become null, so that any reader takes it."""
    return json.dumps(clean(plain), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def clean(value: Any) -> Any:
    """The same plain value with lists for tuples, and None for NaN and infinities, for which JSON has no word."""
    if isinstance(value, dict):
        return {str(key): clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def few_cautions(count: int, what: str = "prompts") -> list[str]:
    """A caution where fewer than 20 clusters stand behind an interval; what covers then is hardly ever checked."""
    if count >= FEW_PROMPTS:
        return []
    return [f"{count} {what} are few: intervals from fewer than {FEW_PROMPTS} are rough. Give more `prompts`."]


def caption(figure: Path) -> str:
    """A figure's name in words: what its file is called."""
    return figure.stem.replace("_", " ")


def number(value: float | None) -> str:
    """Four significant digits, or a dash where there is no number."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def counted(count: int, noun: str) -> str:
    """A number of things in words.

    >>> counted(1, "prompt"), counted(1200, "step")
    ('1 prompt', '1,200 steps')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _markdown_table(table: ResultTable) -> list[str]:
    rule = "".join("---|" if table.is_text(column) else "--:|" for column in range(len(table.head)))
    return [_markdown_row(table.head), f"|{rule}", *(_markdown_row(row) for row in table.rows)]


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(escaped(cell.strip()) for cell in cells) + " |"


_CODE = re.compile(r"`[\w ,.:;=+/()'\"-]+`")  # a field or a command between backticks, as our sentences write them
_MARKS = re.compile(r"[\\`*|~]|\](?=\()|(?<![^\W_])_|_(?![^\W_])")


def escaped(text: str) -> str:
    r"""A text in Markdown that shows as it is: names of models and prompts may hold anything.

    Line breaks and control characters go (`one_line`), marks get a backslash, ``<`` and ``&`` their entities; fields
    that our own sentences put between backticks stay code.

    >>> print(escaped("alpha* of a|b, <b>: raise `limit`"))
    alpha\* of a\|b, &lt;b>: raise `limit`
    """
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    parts, at = [], 0
    for code in _CODE.finditer(text):
        parts += [_MARKS.sub(r"\\\g<0>", text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, _MARKS.sub(r"\\\g<0>", text[at:])])


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
