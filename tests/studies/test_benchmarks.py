"""Benchmarks: the paper's six by name, files of problems, and what a user can get wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bvpo_stats.embedded.assets import embedded_prompts
from bvpo_stats.errors import UserError
from bvpo_stats.sampling.prompts import load_prompts
from bvpo_stats.studies.evaluate import benchmarks
from bvpo_stats.studies.evaluate.benchmarks import BOXED, PRESETS, load_benchmarks, problem_from_row, prompt_rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_papers_six_and_their_k() -> None:
    """Section 5.1: avg@32 for AIME 2024, AIME 2025 and AMC, pass@1 for the rest; in Table 2's order."""
    assert {name: preset.samples for name, preset in PRESETS.items()} == {
        "aime24": 32,
        "aime25": 32,
        "amc": 32,
        "math-500": 1,
        "minerva": 1,
        "olympiadbench": 1,
    }
    assert all(preset.source.count("/") == 1 for preset in PRESETS.values())


def test_presets_ask_the_hub_and_drop_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def rows(source: str, split: str, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.append((source, split))
        for number, text in enumerate(("a?", "b?", "a?"), start=1):
            yield f"{source}[{number}]", {"question": text, "final_answer": ["1", "2"], "solution": ["long"]}

    monkeypatch.setattr(benchmarks, "source_rows", rows)
    found = load_benchmarks(["paper"])
    assert asked == [(preset.source, preset.split) for preset in PRESETS.values()]
    assert [benchmark.name for benchmark in found] == list(PRESETS)
    assert [benchmark.metric for benchmark in found] == ["avg@32"] * 3 + ["pass@1"] * 3
    assert {(len(benchmark.problems), benchmark.duplicates) for benchmark in found} == {(2, 1)}
    assert found[0].problems[0].prompt == f"a?\n{BOXED}"
    assert found[0].problems[0].gold == "1, 2"
    assert [benchmark.samples for benchmark in load_benchmarks(["AIME24"], samples=4)] == [4]


def test_files_and_the_embedded_task(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"id": 1, "problem": "x?", "answer": 2}, {"problem": "y?", "answer": "3"}])
    mine, embedded = load_benchmarks([path, "embedded"], instruction="Briefly.")
    assert (mine.name, mine.samples, mine.verifier) == ("mine", 1, "math-verify")
    assert [(p.prompt, p.gold) for p in mine.problems] == [("x?\nBriefly.", "2"), ("y?\nBriefly.", "3")]
    assert mine.problems[0].prompt_id == "1"
    assert (embedded.samples, embedded.verifier, len(embedded.problems)) == (8, "embedded", 200)
    assert load_benchmarks(["embedded"], limit=3)[0].problems == tuple(embedded_prompts(3))  # no instruction of its own
    assert len(load_benchmarks([path], limit=1)[0].problems) == 1
    as_list = tmp_path / "mine.json"
    as_list.write_text(json.dumps([{"id": 1, "problem": "x?", "answer": 2}]))
    assert load_benchmarks([str(as_list)])[0].problems == load_benchmarks([path], limit=1)[0].problems


def test_problems_on_file_read_back(tmp_path: Path) -> None:
    problems = load_benchmarks(["embedded"], limit=3)[0].problems
    path = write(tmp_path / "p.jsonl", list(prompt_rows(problems)))
    assert tuple(load_prompts(path)) == problems


def test_other_answers_make_another_benchmark(tmp_path: Path) -> None:
    one = load_benchmarks([write(tmp_path / "a.jsonl", [{"problem": "x?", "answer": 2}])])[0]
    two = load_benchmarks([write(tmp_path / "a.jsonl", [{"problem": "x?", "answer": 3}])])[0]
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"problem": "x?"}], r"bad\.jsonl:1: no field `answer`.*problem"),
        ([{"problem": "x?", "answer": " "}], r"no field `answer`"),
        ([{"problem": "x?", "solution": "so 5"}], r"no field `answer`"),  # a worked solution is no gold answer
        ([{"answer": 1}], r"bad\.jsonl:1: no field `prompt`"),
        ([{"problem": "x?", "answer": 1}] * 2, r"bad\.jsonl:2: .*twice \(first at .*bad\.jsonl:1\)"),
        ([{"id": 1, "problem": "x?", "answer": 1}, {"id": 2, "problem": "x?", "answer": 1}], "independent clusters"),
        ([{"id": 1, "problem": "x?", "answer": 1}, {"id": 1, "problem": "y?", "answer": 1}], "twice"),
        ([], "holds no problems"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_benchmarks([write(tmp_path / "bad.jsonl", rows)])


def test_unknown_and_repeated_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`data='aime2024'`: unknown.*aime24"):
        load_benchmarks(["aime2024"])
    with pytest.raises(UserError, match="does not exist"):
        load_benchmarks([str(tmp_path / "none.jsonl")])
    path = write(tmp_path / "amc.jsonl", [{"problem": "x?", "answer": 2}])
    with pytest.raises(UserError, match="two benchmarks are called amc"):
        load_benchmarks([path, path])
    with pytest.raises(UserError, match="at least 1"):
        load_benchmarks(["embedded"], limit=0)


def test_a_gold_answer_of_zero_counts() -> None:
    assert problem_from_row({"problem": "1-1", "answer": 0}, "here").gold == "0"
