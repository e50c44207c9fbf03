"""Errors below the command line name fields; the command line says them as its options."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bvpo_stats.cli.build import in_options

import bvpo_stats
from bvpo_stats.studies.sample.report import SampleReport
from tests.cli.running import failed_politely, run

OPTIONS = {
    "limit": "--limit",
    "unmatched_prompts": "--unmatched",
    "trust_remote_code": "--trust-remote-code",
    "sources": "--sources",
    "empty_trace": "--empty-trace",
    "timeout": "--timeout",
    "level": "--level",
}


@pytest.mark.parametrize(
    ("message", "spoken"),
    [
        ("`limit=0`: at least 1.", "--limit 0: at least 1."),
        ("`limit=-7`: at least 1.", "--limit -7: at least 1."),
        ('Use `unmatched_prompts="drop"`.', "Use --unmatched drop."),
        ("Use `unmatched_prompts='drop'`.", "Use --unmatched drop."),
        ("Allow it with `trust_remote_code=True`.", "Allow it with --trust-remote-code."),
        ("`limit` and `level`: both.", "--limit and --level: both."),
        ('`sources=("anchor", "mh")`', "--sources anchor,mh"),
        ('`empty_trace="<think></think>"`', "--empty-trace '<think></think>'"),
        ("`timeout=inf`: finite.", "--timeout inf: finite."),
        ("Raise `moves` of `traces`.", "Raise --moves of `bvpo-stats traces`."),
    ],
)
def test_fields_become_options(message: str, spoken: str) -> None:
    assert in_options(message, OPTIONS) == spoken


@pytest.mark.parametrize(
    "message",
    [
        "a.jsonl:3: field `limit` must be a text",
        "give the fields `limit`, `level` and `sources` (0 for none)",
        "no column `limit`",
        "`prompt_id` is missing.",
        "`samples=3` is of another command.",
        "run `bvpo-stats sample` first",
        "limit=0",
        "",
    ],
)
def test_what_is_no_field_of_the_command_stays(message: str) -> None:
    assert in_options(message, OPTIONS) == message


def test_an_error_of_a_run_names_the_option(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.write_text("")
    failed_politely(run("variance", "--limit", "0", "--output", folder), "--limit 0")


def test_reports_name_options_on_the_command_line_and_fields_elsewhere(tmp_path: Path) -> None:
    options = ("--limit", 1, "--samples", 2, "--mode", "thinking", "--max-new-tokens", 3)
    done = run("sample", *options, "--output", tmp_path / "s")
    assert "100.0% of the thinking responses were cut at the token limit" in done.stdout
    assert "Raise --max-new-tokens." in done.stdout
    assert "Raise --max-new-tokens." in (tmp_path / "s" / "report.md").read_text()
    report = SampleReport.from_json((tmp_path / "s" / "report.json").read_text())
    assert "Raise `max_new_tokens`." in str(report)
    assert "Sample again with a larger limit on new tokens." in str(replace(report, engine="file"))
    done = run("pairs", "--samples", tmp_path / "s", "--reward", "embedded", "--output", tmp_path / "p")
    assert "Sample again with a larger limit on new tokens." in done.stdout  # `pairs` draws nothing


def test_no_message_of_the_package_names_an_option() -> None:
    """Docstrings may name commands; what reaches a Python user names fields."""
    package, found = Path(bvpo_stats.__file__).parent, []
    for path in sorted(package.rglob("*.py")):
        if path.is_relative_to(package / "cli"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            f"{path.relative_to(package)}:{node.lineno}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
            and re.search(r"(?<![\w-])--[a-z]", node.value)
        ]
    assert not found


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bvpo_stats.studies.sample.run.run_sample", stop)
    done = run("sample", "--output", tmp_path / "run")
    assert done.returncode == 130
    assert done.stderr == "Interrupted. What was finished is kept; the same command goes on from there.\n"


def test_an_end_that_nobody_expected_is_no_ctrl_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def end(*_: object) -> None:
        raise EOFError("ended early")

    monkeypatch.setattr("bvpo_stats.studies.sample.run.run_sample", end)
    done = run("sample", "--output", tmp_path / "run")
    assert done.returncode == 1
    assert "EOFError: ended early" in done.stderr
