from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.records import Prompt
from bvpo_stats.sampling.prompts import load_prompts, prompt_from_row, survey_prompts


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


USER = {"role": "user", "content": "1+1?"}
ASSISTANT = {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1?"},
        {"question": "1+1?"},
        {"problem": "1+1?"},
        {"instruction": "1+1?", "output": "2"},
        {"prompt": [USER]},
        {"messages": [USER, ASSISTANT]},
        {"prompt": "1+1?", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT], "messages": [USER]},
    ],
)
def test_usual_layouts_are_recognised(row: dict[str, Any]) -> None:
    prompt = prompt_from_row(row, "here")
    assert prompt == Prompt("p" + hashlib.sha256(b"1+1?").hexdigest()[:16], "1+1?")


def test_ids_and_gold_answers_are_kept() -> None:
    row = {"prompt_id": 7, "prompt": "1+1?", "answer": 2}
    assert prompt_from_row(row, "here") == Prompt("7", "1+1?", "2")
    assert prompt_from_row({"id": "a", "problem": "x", "solution": "y"}, "here") == Prompt("a", "x", "y")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "here: no field `prompt`"),
        ({"prompt": " \n"}, "here: the prompt is empty"),
        ({"prompt": 3}, "here: no field `prompt`"),
        ({"messages": [{"role": "system", "content": "be kind"}, USER]}, "role 'system'"),
        ({"messages": [USER, USER]}, "2 user turns"),
        ({"messages": [ASSISTANT]}, "0 user turns"),
        ({"messages": ["hello"]}, "role None"),
    ],
)
def test_rows_without_a_single_prompt_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prompt_from_row(row, "here")


def test_a_repeated_id_names_both_places(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])
    with pytest.raises(UserError, match=r"p\.jsonl:3: prompt id .* occurs twice \(first at .*p\.jsonl:1\)"):
        list(load_prompts(source))


def test_limit_and_emptiness(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [{"prompt": text} for text in "abc"])
    assert [prompt.prompt for prompt in load_prompts(source, limit=2)] == ["a", "b"]
    with pytest.raises(UserError, match="limit=0"):
        list(load_prompts(source, limit=0))
    with pytest.raises(UserError, match="holds no prompts"):
        list(load_prompts(write(tmp_path / "empty.jsonl", [])))
    with pytest.raises(UserError, match="does not exist"):
        list(load_prompts(str(tmp_path / "none.jsonl")))


def test_prompts_are_streamed(tmp_path: Path) -> None:
    """The fault in the last line is met only when it is reached."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nnonsense\n')
    prompts = load_prompts(str(path))
    assert (next(prompts).prompt, next(prompts).prompt) == ("a", "b")
    with pytest.raises(UserError, match=":3: not JSON"):
        next(prompts)


def test_datasets_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": "a", "chosen": [ASSISTANT]}, {"prompt": "b", "chosen": [ASSISTANT]}]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "both")
    table.to_parquet(tmp_path / "one.parquet")
    (tmp_path / "folder").mkdir()
    table.to_json(tmp_path / "folder" / "train.jsonl")
    for name in ("saved", "both", "one.parquet", "folder"):
        assert [prompt.prompt for prompt in load_prompts(str(tmp_path / name))] == ["a", "b"], name
    assert [prompt.prompt for prompt in load_prompts(str(tmp_path / "both"), split="test")] == ["b"]
    with pytest.raises(UserError, match="split 'nope'"):
        list(load_prompts(str(tmp_path / "both"), split="nope"))


def test_the_fingerprint_knows_order_ids_and_texts() -> None:
    base = [Prompt("1", "a"), Prompt("2", "b")]
    same = survey_prompts(iter([Prompt("1", "a", gold="x"), Prompt("2", "b")]))
    assert same.fingerprint == survey_prompts(base).fingerprint
    others = [base[::-1], [Prompt("1", "a"), Prompt("2", "c")], [Prompt("1", "a"), Prompt("3", "b")], base[:1], []]
    prints = {survey_prompts(other).fingerprint for other in [base, *others]}
    assert len(prints) == 6
    assert same.count == 2


def test_the_longest_prompts_are_found_in_any_order() -> None:
    sizes = [(number * 37) % 101 for number in range(101)]
    survey = survey_prompts(Prompt(str(number), "x" * size) for number, size in enumerate(sizes))
    assert [len(text) for text in survey.longest] == list(range(100, 92, -1))
