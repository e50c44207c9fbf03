"""One presentation, three outputs: nothing is lost or misread in any of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bvpo_stats.studies.presentation import (
    Finding,
    Presentation,
    ResultTable,
    html,
    markdown,
    number,
    print_presentation,
)

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


def test_markdown_keeps_cells_apart() -> None:
    text = markdown(SHOWN, [Path("x/by_layer.png")], {"torch": "2"})
    assert "| a\\|b | 1 | <b> |" in text
    assert "|---|--:|---|" in text
    assert "**It holds [95%].**" in text
    assert "- Careful: few prompts" in text
    assert "![by layer](figures/by_layer.png)" in text
    assert text.endswith("Versions: torch 2.\n")


def test_terminal_shows_brackets_and_sections(capsys: pytest.CaptureFixture[str]) -> None:
    print_presentation(SHOWN, "x")
    printed = capsys.readouterr().out
    for words in ("It holds [95%].", "[red]", "First", "Second", "Careful: few prompts", "Written: x."):
        assert words in printed


def test_html_escapes() -> None:
    assert "<td>&lt;b&gt;</td>" in html(SHOWN)
    assert "<b>It holds" in html(SHOWN)


def test_number() -> None:
    assert (number(None), number(0.000123456)) == ("-", "0.0001235")
