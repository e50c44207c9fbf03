"""Answer files: what AlpacaEval and Arena-Hard read, baselines read back, prompts of both benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.records import Prompt
from bvpo_stats.studies.evaluate import benchmarks
from bvpo_stats.studies.evaluate.benchmarks import INSTRUCTION_FILES, instruction_from_row, load_instructions
from bvpo_stats.studies.evaluate.judge import (
    FinalAnswer,
    alpaca_eval_text,
    arena_hard_text,
    markdown_counts,
    read_answer_file,
)

PROMPTS = (Prompt("u1", "Write a poem."), Prompt("u2", "1+1?\nExplain."), Prompt("u3", "Sing."))
ANSWERS = [FinalAnswer(PROMPTS[0], "Roses…", 3), FinalAnswer(PROMPTS[1], "**2**", 4), FinalAnswer(PROMPTS[2], "", 0)]
DATASETS = {"u1": "vicuna", "u2": "koala", "u3": "koala"}


def test_alpaca_evals_form() -> None:
    rows = json.loads(alpaca_eval_text(ANSWERS, "mine", DATASETS))
    assert rows[0] == {
        "instruction": "Write a poem.",
        "output": "Roses…",
        "generator": "mine",
        "dataset": "vicuna",
        "datasplit": "eval",
    }
    assert [row["output"] for row in rows] == ["Roses…", "**2**", ""]


def test_arena_hards_form() -> None:
    text = arena_hard_text(ANSWERS, "mine", 12.5)
    rows = [json.loads(line) for line in text.splitlines()]
    assert list(rows[1]) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
    assert rows[1]["messages"] == [
        {"role": "user", "content": "1+1?\nExplain."},
        {"role": "assistant", "content": {"answer": "**2**"}},
    ]
    assert rows[1]["metadata"]["token_len"] == 4
    assert rows[1]["metadata"]["bold_count"] == {"**": 1, "__": 0}
    assert len({row["ans_id"] for row in rows}) == 3
    assert text == arena_hard_text(ANSWERS, "mine", 12.5)


def test_markdown_is_counted_outside_code() -> None:
    text = "# One\n## Two\n- a\n* b\n 1. c\n__d__ **e**\n```\n# no\n- no **no**\n```\nend"
    assert markdown_counts(text) == {
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 1, "unordered": 2},
        "bold_count": {"**": 1, "__": 1},
    }


@pytest.mark.parametrize(("suffix", "text"), [("json", alpaca_eval_text), ("jsonl", arena_hard_text)])
def test_what_is_written_reads_back(suffix: str, text: Any, tmp_path: Path) -> None:
    path = tmp_path / f"base.{suffix}"
    path.write_text(text(ANSWERS, "mine", DATASETS if suffix == "json" else 0.0))
    held = read_answer_file(path)
    assert held.name == "mine"
    assert held.answers_to(PROMPTS, path) == ["Roses…", "**2**", ""]
    with pytest.raises(UserError, match=r"no answer to 1 of the 2 prompts, e\.g\. u9"):
        held.answers_to([PROMPTS[0], Prompt("u9", "Another.")], path)


def test_arena_hards_first_form_reads_too(tmp_path: Path) -> None:
    path = tmp_path / "gpt-4-0314.jsonl"
    row = {"question_id": "u1", "model_id": "gpt-4-0314", "choices": [{"turns": [{"content": "Violets"}]}]}
    path.write_text(json.dumps(row) + "\n")
    assert read_answer_file(path).answers_to([PROMPTS[0]], path) == ["Violets"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"instruction": "a"}]', r"b\.json\[1\]: not an answer"),
        ('[{"output": "a"}]', r"b\.json\[1\]: not an answer"),
        (
            '[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "c"}]',
            r"\[2\]: a second answer to 'a'",
        ),
        ("[]", "holds no answers"),
        ("{}", "not a list"),
        ("[1]", "not an object"),
        ("[", "not JSON"),
    ],
)
def test_baselines_that_are_wrong(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_answer_file(path)


def test_prompts_of_both_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts: dict[str, list[dict[str, Any]]] = {
        "alpaca-eval": [{"instruction": "a?", "output": "b", "generator": "gpt4_turbo", "dataset": "koala"}] * 2,
        "arena-hard": [
            {"question_id": "u1", "category": "v0.1", "turns": [{"content": "a?"}]},
            {"uid": "u2", "category": "v0.1", "prompt": "b?"},
        ],
    }

    def rows(source: str, split: str, option: str, config_name: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        (task,) = (task for task, file in INSTRUCTION_FILES.items() if file == source)
        yield from ((f"{task}[{number}]", row) for number, row in enumerate(layouts[task], start=1))

    monkeypatch.setattr(benchmarks, "source_rows", rows)
    alpaca = load_instructions("alpaca-eval", "alpaca-eval")
    assert [p.prompt for p in alpaca.benchmark.problems] == ["a?"]
    assert alpaca.benchmark.duplicates == 1
    assert list(alpaca.datasets.values()) == ["koala"]
    arena = load_instructions("arena-hard", "arena-hard")
    assert [(p.prompt_id, p.prompt) for p in arena.benchmark.problems] == [("u1", "a?"), ("u2", "b?")]


def test_rows_that_are_no_prompt() -> None:
    with pytest.raises(UserError, match="2 turns"):
        instruction_from_row({"turns": [{"content": "a"}, {"content": "b"}]}, "here")
    with pytest.raises(UserError, match="no field `prompt`"):
        instruction_from_row({"text": "a"}, "here")


_JUDGE = """
import sys, types
from importlib.metadata import distribution
from packaging.version import parse
try:
    import pkg_resources
except ImportError:  # setuptools no longer ships it, alpaca_eval asks it for versions
    sys.modules["pkg_resources"] = module = types.ModuleType("pkg_resources")
    module.get_distribution, module.parse_version = distribution, parse
import alpaca_eval
board, judged = alpaca_eval.evaluate(
    model_outputs=sys.argv[1], reference_outputs=sys.argv[2], annotators_config=sys.argv[3], fn_metric="get_winrate",
    sort_by="win_rate", precomputed_leaderboard=None, is_return_instead_of_print=True, output_path=None,
    caching_path=None, is_avoid_reannotations=False,
)
assert list(board.index) == ["mine"], board
assert int(board.loc["mine", "n_total"]) == len(judged) == 3, board
assert {row["output_2"] for row in judged} == {"Roses…", "**2**", ""}, judged
assert {row["dataset"] for row in judged} == {"vicuna", "koala"}, judged
"""


@pytest.mark.skipif(find_spec("alpaca_eval") is None, reason="alpaca_eval is not installed")
def test_alpaca_eval_judges_our_file(tmp_path: Path) -> None:
    """The tool itself, with a judge that calls no server: it finds, merges and counts all answers, empty ones too."""
    for name in ("mine", "reference"):
        answers = ANSWERS if name == "mine" else [FinalAnswer(a.prompt, "what the baseline says", 0) for a in ANSWERS]
        (tmp_path / f"{name}.json").write_text(alpaca_eval_text(answers, name, DATASETS))
    judge = tmp_path / "judge"
    judge.mkdir()
    prompt = "<|im_start|>user\n{instruction}\n{output_1}\n{output_2}\n<|im_end|>\n"
    (judge / "prompt.txt").write_text(prompt)
    (judge / "configs.yaml").write_text(
        f"judge:\n  prompt_template: {judge / 'prompt.txt'}\n  fn_completions: test_completions\n"
        "  completions_kwargs: {model_name: test, value: 'second'}\n"
        "  completion_parser_kwargs: {outputs_to_match: {1: first, 2: second}}\n  batch_size: 1\n"
    )
    arguments = [tmp_path / "mine.json", tmp_path / "reference.json", judge]
    command = [sys.executable, "-c", _JUDGE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
