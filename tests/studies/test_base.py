"""One presentation, three outputs: nothing is lost or misread in any of them. One report, read as it was written."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.studies.base import Finding, Presentation, Report, ResultTable, number

SHOWN = Presentation(
    title="Which?",
    findings=(Finding("It holds [95%].", "holds"),),
    tables=(
        ResultTable("First", ("", "Value", "Why"), (("a|b", "1", "<b>"), ("  part", "2", "[red]")), text_columns=(2,)),
        ResultTable("Second", ("", "Value", "Why"), (("c", "3", "word"),), text_columns=(2,)),
    ),
    notes=("a note",),
    cautions=("few prompts",),
)


@dataclass(frozen=True)
class Point:
    at: float
    name: str | None = None


@dataclass(frozen=True)
class Small(Report):
    study: ClassVar[str] = "small"
    n: int
    how: Literal["fast", "slow"]
    best: Point | None
    points: list[Point]
    pair: tuple[float, str]
    many: tuple[int, ...] = ()
    by_name: dict[str, dict[str, Point]] = field(default_factory=dict)
    loose: Any = None

    def present(self) -> Presentation:
        return SHOWN

    def figures(self, folder: Path) -> list[Path]:
        assert not (folder.parent / "report.json").exists()
        folder.mkdir(exist_ok=True)
        (folder / "by_layer.png").write_bytes(b"png")
        return [folder / "by_layer.png"]


SMALL = Small(
    n=3,
    how="fast",
    best=Point(0.5, "x"),
    points=[Point(1.0), Point(2.0, "b")],
    pair=(0.25, "quarter"),
    many=(1, 2),
    by_name={"a": {"b": Point(3.0)}},
    loose={"any": [1, "thing"]},
)


def test_markdown_keeps_cells_apart() -> None:
    text = SHOWN.markdown([Path("x/by_layer.png")], {"torch": "2"})
    assert "| a\\|b | 1 | &lt;b> |" in text
    assert "|---|--:|---|" in text
    assert "**It holds [95%].**" in text
    assert "- Careful: few prompts" in text
    assert "![by layer](figures/by_layer.png)" in text
    assert text.endswith("Versions: torch 2.\n")


def test_terminal_shows_brackets_and_sections(capsys: pytest.CaptureFixture[str]) -> None:
    SHOWN.print("x")
    printed = capsys.readouterr().out
    for words in ("It holds [95%].", "[red]", "First", "Second", "Careful: few prompts", "Written: x."):
        assert words in printed


NASTY = "a|b *c* <script>`x\x1b[31m\n# title ![i](u) __d__"


@pytest.mark.parametrize("place", ["title", "finding", "cell", "note", "caution"])
def test_names_show_as_they_are_everywhere(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = {name: NASTY if name == place else "x" for name in ("title", "finding", "cell", "note", "caution")}
    shown = Presentation(
        said["title"],
        (Finding(said["finding"]),),
        (ResultTable("Table", ("", "n"), ((said["cell"], "1"),)),),
        (said["note"],),
        (said["caution"],),
    )
    text = shown.markdown([], {})
    assert "a\\|b \\*c\\* &lt;script>\\`x\\\\x1b[31m # title ![i\\](u) \\_\\_d\\_\\_" in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == [text.splitlines()[0]]
    shown.print()
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "<script>" in printed.replace("\n", "") or place == "title"


def test_html_escapes() -> None:
    assert "<td>&lt;b&gt;</td>" in SHOWN.html()
    assert "<b>It holds" in SHOWN.html()


def test_number() -> None:
    assert (number(None), number(math.nan), number(0.000123456)) == ("-", "-", "0.0001235")


def test_a_report_is_read_as_it_was_written() -> None:
    assert Small.from_json(SMALL.to_json()) == SMALL
    plain = json.loads(SMALL.to_json())
    assert next(iter(plain)) == "study"
    assert list(plain)[-1] == "versions"
    assert plain["versions"]["python"]
    assert Small.from_dict(plain | {"of a later version": 1}) == SMALL


def test_nan_is_null() -> None:
    found = Small.from_json(replace(SMALL, points=[Point(math.nan)], pair=(math.inf, "x")).to_json())
    assert math.isnan(found.points[0].at)
    assert math.isnan(found.pair[0])
    assert found.points[0].name is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": "3"}, "report.n is '3', not int"),
        ({"n": True}, "report.n is 'True', not int"),
        ({"how": "never"}, "report.how is 'never', not one of fast, slow"),
        ({"best": 3}, "report.best is '3', not an object"),
        ({"points": [{"at": 1.0}, {"name": "b"}]}, r"report.points\[1\] has no `at`"),
        ({"pair": [1.0]}, "report.pair is .* not a list of 2"),
        ({"by_name": {"a": {"b": {"at": "far"}}}}, "report.by_name.a.b.at is 'far', not float"),
    ],
)
def test_what_is_no_report_says_where(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"This is no small report.*{words}"):
        Small.from_dict(SMALL.to_dict() | change)


def test_missing_entries_and_no_json_are_told() -> None:
    with pytest.raises(UserError, match="report has no `n`"):
        Small.from_dict({})
    with pytest.raises(UserError, match="not JSON"):
        Small.from_json("{")


def test_a_run_leaves_the_report_last(tmp_path: Path) -> None:
    SMALL.write(tmp_path)
    assert Small.from_json((tmp_path / "report.json").read_text()) == SMALL
    assert "![by layer](figures/by_layer.png)" in (tmp_path / "report.md").read_text()


def test_printed_a_report_is_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(SMALL) == "It holds [95%].\nCareful: few prompts"
    assert "<b>It holds" in SMALL._repr_html_()
    SMALL.print(tmp_path)
    assert "report.md, figures/" in capsys.readouterr().out.replace("\n", "")


def test_figures_are_shown_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bytes] = []
    notebook = SimpleNamespace(get_ipython=object, display=SimpleNamespace(Image=lambda data, width: data))
    notebook.display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", notebook.display)
    assert SMALL.plot() == []
    assert shown == [b"png"]


def test_figures_need_a_folder_outside_notebooks(tmp_path: Path) -> None:
    assert SMALL.plot(tmp_path / "figures") == [tmp_path / "figures" / "by_layer.png"]
    with pytest.raises(UserError, match="give plot"):
        SMALL.plot()


def test_no_word_of_a_table_is_cut_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A table too wide for the terminal becomes several, each with the first column."""
    monkeypatch.setenv("COLUMNS", "80")
    head = ("alpha from", *(f"incomparably-{number}" for number in range(7)))
    rows = tuple((f"a name of five words {row}", *(f"{row}.{n}234567890123" for n in range(7))) for row in range(2))
    tables = tuple(ResultTable(f"A section with quite some words, {part}", head, rows) for part in "ab")
    Presentation("Title", tables=tables).print()
    said = capsys.readouterr().out
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 80
    for word in (*head[1:], *(cell for row in rows for cell in row[1:])):
        assert word in said
    assert said.count("a name of five words 1") == 2 * said.count("alpha from") > 2
    Presentation("Title", tables=tables[:1]).print()
    assert "A section with quite some words, a" in capsys.readouterr().out
