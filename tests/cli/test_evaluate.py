"""``bvpo-stats evaluate`` from the command line: what it prints, and what a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import failed_politely, run


def test_help_shows_examples_and_defaults() -> None:
    text = " ".join(run("evaluate", "--help").stdout.replace("│", " ").split())
    assert "bvpo-stats evaluate --adapter" in text
    assert "32 for AIME and AMC" in text
    assert "32768 math" in text


def test_a_run_prints_the_table_and_a_config_file_counts(random_model: Path, tmp_path: Path) -> None:
    problems = tmp_path / "sums.jsonl"
    problems.write_text('{"problem": "1+1=?", "answer": 2}\n{"problem": "2+1=?", "answer": 3}\n')
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model: {random_model}\ndata: [{problems}]\nsamples: 2\nmax-new-tokens: 4\nmode: thinking\n")
    done = run("evaluate", "--config", settings, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "sums, avg@2" in done.stdout
    assert "Thinking" in done.stdout
    assert "NoThinking" not in done.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["sampling"]["temperature"] == 0.6
    assert report["sampling"]["max_new_tokens"] == 4
    assert list(report["scores"]["base"]) == ["thinking"]
    shard = run("evaluate", "--config", settings, "--output", tmp_path / "other", "--shard", "1/2")
    assert "Shard 1/2 is drawn" in shard.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "poetry"], ["--task poetry", "math"]),
        (["--data", "aime2024"], ["--data aime2024", "aime24"]),
        (["--data", "./none.jsonl"], ["none.jsonl", "--data"]),
        (["--adapter", "./none"], ["--adapter ./none", "no such folder"]),
        (["--adapter", "."], ["neither an adapter"]),
        (["--model", "./none"], ["--model ./none", "no such folder"]),
        (["--temperature", "0"], ["--temperature 0", "positive"]),
        (["--samples", "0"], ["--samples 0", "at least 1"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens 0"]),
        (["--level", "95"], ["--level 95", "0.95"]),
        (["--mode", "loud"], ["--mode loud"]),
        (["--shard", "3/2"], ["--shard 3/2"]),
        (["--limit", "0"], ["--limit 0"]),
        (["--engine", "magic"], ["--engine magic"]),
        (["--engine", "openai"], ["--model"]),
        (["--engine", "openai", "--model", "embedded"], ["--base-url"]),
        (["--engine", "file"], ["--samples-from"]),
        (["--samples-from", "x.jsonl"], ["--engine file"]),
        (["--judge", "reward"], ["--reward", "--baseline"]),
        (["--reward", "embedded"], ["--judge reward"]),
        (["--judge", "gpt-4o"], ["--judge gpt-4o"]),
        (["--judge", "reward", "--reward", "embedded", "--baseline", "b.json"], ["alpaca-eval and arena-hard"]),
        (["--task", "alpaca-eval", "--samples", "2"], ["--samples 2", "one answer per prompt"]),
        (["--task", "arena-hard", "--data", "embedded", "--data", "embedded"], ["one set of prompts"]),
        (
            ["--task", "alpaca-eval", "--judge", "reward", "--reward", "embedded", "--baseline", "none.json"],
            ["--baseline none.json", "no such file"],
        ),
        (["--engine", "file", "--samples-from", "none.jsonl"], ["none.jsonl"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed_politely(run("evaluate", *arguments, "--output", "run"), *words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"problem": "1+1"}', ["p.jsonl:1", "answer"]),
        ('{"answer": 2}', ["p.jsonl:1", "prompt"]),
        ('{"problem": "1+1", "answer": 2}\n{"problem": "1+1", "answer": 2}', ["p.jsonl:2", "twice", "p.jsonl:1"]),
        ("1+1", ["p.jsonl:1", "JSON"]),
    ],
)
def test_bad_problems(line: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    failed_politely(run("evaluate", "--data", path, "--output", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    failed_politely(run("evaluate", "--output", tmp_path), "not empty")
