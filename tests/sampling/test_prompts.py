from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.records import Prompt, from_dict, to_dict
from bvpo_stats.sampling.prompts import load_prompts, prompt_from_row, survey_prompts


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


USER = {"role": "user", "content": "1+1?"}
ASSISTANT = {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1?"},
        {"question": "1+1?"},
        {"problem": "1+1?"},
        {"instruction": "1+1?", "output": "2"},
        {"prompt": [USER]},
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}]},
        {"messages": [SYSTEM | {"content": " "}, USER, ASSISTANT]},
        {"prompt": None, "question": "1+1?", "system": None, "answer": float("nan"), "id": float("nan")},
        {"instruction": "1+1?", "input": "", "history": None},
        {"prompt": "1+1?", "input": "no business of a prompt's"},
        {"prompt": "1+1?", "context": "no business of a prompt's"},
        {"question": "1+1?", "context": ""},
        {"prompt": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
        {"prompt": "1+1?", "gold": [], "answer": {"text": ["2"]}},
        {"prompt": "1+1?", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT], "messages": [USER]},
    ],
)
def test_usual_layouts_are_recognised(row: dict[str, Any]) -> None:
    prompt = prompt_from_row(row, "here")
    assert prompt == Prompt("p" + hashlib.sha256(b"1+1?").hexdigest()[:16], "1+1?")


def test_ids_and_gold_answers_are_kept() -> None:
    row = {"prompt_id": 7, "prompt": "1+1?", "answer": 2}
    assert prompt_from_row(row, "here") == Prompt("7", "1+1?", "2")
    for gold in (["2"], [2.0], np.int64(2), np.array(["2"]), "2"):
        assert prompt_from_row({"prompt": "1+1?", "gold": gold}, "here").gold == "2"
    assert prompt_from_row({"prompt": "1+1?", "gold": 10**400}, "here").gold == str(10**400)
    assert prompt_from_row({"instruction": "Add.", "context": "1 and 1"}, "here").prompt == "Add.\n1 and 1"
    assert prompt_from_row({"id": "a", "problem": "x", "solution": "y"}, "here") == Prompt("a", "x", "y")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "here: no field `prompt`"),
        ({"prompt": "x", "gold": ["1", "2"]}, "here: field `gold` must be a text or a number, not a list"),
        ({"prompt": "x", "gold": {"value": 1}}, "here: field `gold` must be a text or a number, not a dict"),
        ({"prompt": "x", "gold": float("inf")}, "here: field `gold` must be a text or a number, not inf"),
        ({"messages": "[{'role': 'user'}]"}, "here: field `messages` must be a list of messages, not a text"),
        ({"question": "x", "context": "y"}, "Put both into `prompt`, or leave `context` out"),
        ({"prompt": " \n"}, "here: the prompt is empty"),
        ({"prompt": 3}, "here: field `prompt` must be a text or messages, not 3"),
        ({"prompt": None, "answer": "2"}, "here: field `prompt` is null"),
        ({"messages": [ASSISTANT]}, "the turns are assistant; a user turn must stand last"),
        ({"messages": [USER, ASSISTANT, SYSTEM]}, "the turns are user, assistant, system"),
        ({"messages": ["hello"]}, "message 1: must have `role` and `content`, not 'hello'"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [USER | {"role": "tool"}]}, "message 1: the role must be system, user or assistant, not 'tool'"),
        ({"prompt": [USER | {"content": None}]}, "message 1: field `content` must be a text, not null"),
        ({"prompt": [USER | {"content": 3}]}, "message 1: field `content` must be a text, not 3"),
        ({"prompt": [USER | {"content": [{"type": "image_url", "image_url": "x"}]}]}, "content part of type image_url"),
        ({"prompt": [USER | {"tool_calls": [{"id": 1}]}]}, "calls of tools are not supported"),
        ({"prompt": [SYSTEM, USER], "system": "Be brief."}, "two different system prompts"),
        ({"prompt": "1+1?", "system": 3}, "field `system` must be a text, not 3"),
        ({"instruction": "Add.", "input": 3}, "field `input` must be a text, not 3"),
        ({"prompt": "1+1? \ud83d"}, "field `prompt` has half a character in it"),
        ({"prompt": "1+1?", "answer": "\ud83d"}, "field `answer` has half a character in it"),
        ({"prompt": "1+1?", "id": True}, "field `id` must be a text or a number, not True"),
    ],
)
def test_rows_without_a_single_prompt_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prompt_from_row(row, "here")


@pytest.mark.parametrize(
    ("row", "roles", "texts"),
    [
        ({"prompt": [SYSTEM, USER]}, "su", ["Be kind.", "1+1?"]),
        ({"prompt": "1+1?", "system": "Be kind."}, "su", ["Be kind.", "1+1?"]),
        ({"prompt": [SYSTEM, USER], "system_prompt": "Be kind."}, "su", ["Be kind.", "1+1?"]),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, "uau", ["1+1?", "2", "1+1?"]),
        ({"instruction": "And now?", "history": [["1+1?", "2"]], "system": "Be kind."}, "suau",
         ["Be kind.", "1+1?", "2", "And now?"]),
    ],
)  # fmt: skip
def test_conversations_keep_every_turn(row: dict[str, Any], roles: str, texts: list[str]) -> None:
    prompt = prompt_from_row(row, "here")
    assert prompt.messages is not None
    assert "".join(turn.role[0] for turn in prompt.messages) == roles
    assert [turn.content for turn in prompt.messages] == texts
    assert prompt.prompt == texts[-1]
    assert from_dict(Prompt, json.loads(json.dumps(to_dict(prompt)))) == prompt
    assert prompt.prompt_id != prompt_from_row({"prompt": texts[-1]}, "here").prompt_id


def test_alpacas_input_stands_behind_its_instruction() -> None:
    assert prompt_from_row({"instruction": "Add.", "input": "1+1"}, "here").prompt == "Add.\n1+1"


@pytest.mark.parametrize(
    ("value", "gold"), [(3.0, "3"), (2.5, "2.5"), (float("nan"), None), (None, None), (" ", None), (float("inf"), None)]
)
def test_an_empty_cell_is_no_gold_answer(value: Any, gold: str | None) -> None:
    assert prompt_from_row({"prompt": "1+1?", "answer": value}, "here").gold == gold


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


def test_a_configuration_of_a_dataset_is_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "several"
    for name in ("easy", "hard"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("easy", "hard"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [prompt.prompt for prompt in load_prompts(str(folder), config_name="hard")] == ["hard"]
    with pytest.raises(UserError, match=r"easy.*hard.*`config_name`"):
        list(load_prompts(str(folder)))
    with pytest.raises(UserError, match="`config_name='x'` is for datasets with several"):
        list(load_prompts(write(tmp_path / "p.jsonl", [{"prompt": "a"}]), config_name="x"))
