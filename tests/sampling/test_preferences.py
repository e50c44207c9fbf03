"""Preference data as people have it: every layout gives the same pair, ties give none, and the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.sampling.layouts import as_pairs, read_pairs
from bvpo_stats.sampling.preferences import check_layout, layout_of, preference_rows
from tests.sampling.samples import template

QUESTION, GOOD, BAD = "What is 8+9?", "The answer is 17.", "16."


def turns(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]


def completion(text: str, fine: float | None, overall: float) -> dict[str, Any]:
    return {
        "model": "gpt-4", "principle": "helpfulness", "custom_system_prompt": "...", "response": text,
        "annotations": {"helpfulness": {"Rating": "4", "Rationale": "..."}}, "critique": "...",
        "fine-grained_score": fine, "overall_score": overall,
    }  # fmt: skip


def helpsteer(text: str, score: int, prompt: str = QUESTION) -> dict[str, Any]:
    return {"prompt": prompt, "response": text, "helpfulness": score, "correctness": 4, "coherence": 4,
            "complexity": 2, "verbosity": 1}  # fmt: skip


def strength(value: int) -> dict[str, Any]:
    return {"split": "train", "prompt": QUESTION, "response_1": BAD, "response_2": GOOD, "preference_strength": value,
            "preference_statement": "...", "all_preferences_unprocessed": []}  # fmt: skip


def helpsteer3(value: int) -> dict[str, Any]:
    return {"domain": "general", "language": "english", "context": turns("")[:1], "response1": GOOD, "response2": BAD,
            "overall_preference": value, "individual_preference": []}  # fmt: skip


def open_r1(correct: list[bool], complete: list[bool]) -> dict[str, Any]:
    texts = [f"<think>8+9</think>{answer}" for answer in (BAD, GOOD, "It is 18.")]
    return {"problem": QUESTION, "solution": "17", "answer": "17", "problem_type": "Algebra", "uuid": "u",
            "is_reasoning_complete": complete, "generations": texts, "correctness_math_verify": correct,
            "correctness_llama": None, "messages": turns(GOOD)}  # fmt: skip


BINARISED = {"prompt": QUESTION, "prompt_id": "p1", "chosen": turns(GOOD), "rejected": turns(BAD),
             "messages": turns(GOOD), "score_chosen": 8.5, "score_rejected": 7.0}  # fmt: skip
LAYOUTS: dict[str, tuple[list[dict[str, Any]], tuple[float | None, float | None]]] = {
    "UltraFeedback binarised": ([BINARISED], (8.5, 7.0)),
    "Argilla's binarised": (
        [{"source": "x", "prompt": QUESTION, "chosen": turns(GOOD), "chosen-rating": 4.5, "chosen-model": "a",
          "rejected": turns(BAD), "rejected-rating": 2.0, "rejected-model": "b"}],
        (4.5, 2.0),
    ),
    "UltraFeedback": (
        [{"source": "x", "instruction": QUESTION, "models": ["a"], "correct_answers": [], "completions":
          [completion(BAD, 1.5, 10.0), completion("It is 18.", 3.0, 5.0), completion(GOOD, 4.75, 8.5)]}],
        (4.75, 1.5),
    ),
    "UltraFeedback without one fine-grained score": (
        [{"instruction": QUESTION, "completions": [completion(BAD, None, 5.0), completion(GOOD, 1.0, 8.5)]}],
        (8.5, 5.0),
    ),
    "ratings": ([{"instruction": QUESTION, "generations": [GOOD, BAD], "ratings": np.array([5.0, 2.0])}], (5.0, 2.0)),
    "Skywork": ([{"chosen": turns(GOOD), "rejected": turns(BAD), "source": "magpie_pro"}], (None, None)),
    "Orca": ([{"system": "", "question": QUESTION, "chosen": GOOD, "rejected": BAD}], (None, None)),
    "HelpSteer": ([helpsteer("It is 18.", 2), helpsteer(GOOD, 4), helpsteer(BAD, 0)], (4.0, 0.0)),
    "HelpSteer2 preferences": ([strength(2)], (2.0, 0.0)),
    "HelpSteer3": ([helpsteer3(-3)], (3.0, 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_pair(name: str, tmp_path: Path) -> None:
    rows, rewards = LAYOUTS[name]
    (plain,) = as_pairs([{"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}], template(), "nothinking")
    (pair,) = as_pairs(rows, template(), "nothinking")
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == (
        plain.prompt_ids,
        plain.chosen_ids,
        plain.rejected_ids,
    )
    assert (pair.chosen_reward, pair.rejected_reward) == rewards
    assert pair.prompt_id == ("p1" if "prompt_id" in rows[0] else plain.prompt_id)
    if name != "ratings":  # an array is no JSON
        (tmp_path / "it.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert read_pairs(tmp_path / "it.jsonl", template(), "nothinking") == [pair]


def test_open_r1_pairs_a_right_and_a_wrong_solution_that_are_whole() -> None:
    row = open_r1([False, True, False], [False, True, True])  # the first one was cut
    (pair,) = as_pairs([row], template(), "thinking")
    assert (pair.chosen_answer, pair.rejected_answer) == (GOOD, "It is 18.")
    assert pair.chosen_answer_start
    assert (pair.chosen_reward, pair.rejected_reward) == (1.0, 0.0)
    right = [open_r1([True] * 3, [True] * 3)]
    assert [row for _, row in preference_rows([("", right[0])])] == [None]


@pytest.mark.parametrize(
    "rows",
    [
        [strength(0)],
        [helpsteer3(0)],
        [helpsteer(GOOD, 3), helpsteer(BAD, 3)],
        [helpsteer(GOOD, 3)],
        [{"instruction": QUESTION, "completions": []}],
        [{"instruction": QUESTION, "generations": [GOOD, BAD], "ratings": ["N/A", 3]}],
    ],
)
def test_a_row_that_prefers_nothing_is_left_out_and_said(
    rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (pair,) = as_pairs([*rows, BINARISED], template(), "nothinking")
    assert pair.prompt_id == "p1"
    assert "1 prompts prefer no answer" in capsys.readouterr().err


def test_rows_of_one_prompt_follow_each_other_in_helpsteer() -> None:
    other = "What is 1+1?"
    rows = [helpsteer(GOOD, 4), helpsteer(BAD, 1), helpsteer("3", 0, other), helpsteer("2", 4, other)]
    found = as_pairs(rows, template(), "nothinking")
    assert [(p.chosen_answer, p.rejected_answer) for p in found] == [(GOOD, BAD), ("2", "3")]


def test_helpsteer2_of_several_turns_becomes_messages() -> None:
    prompt = "Hello\n<extra_id_1>Assistant\nHi.\n<extra_id_1>User\nWhat is 8+9?\n<extra_id_1>Assistant\n"
    rows = [("", helpsteer(GOOD, 4, prompt)), ("", helpsteer(BAD, 1, prompt))]
    ((_, row),) = preference_rows(rows)
    assert row["prompt"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "What is 8+9?"},
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "label": 1}, r"row 3: no preference data that is known \(columns: text, label\)"),
        ({"problem": "p", "solution": "s", "source": "x"}, "as in NuminaMath, hold no preferences"),
        ({"prompt": "p", "response": "r"}, r"columns: prompt, response\)"),
        (["a"], "a list, no row of columns"),
    ],
)
def test_unknown_columns_are_refused_by_name(row: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_layout(row, "row 3")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "q", "completions": "none"}, "`completions` must be a list"),
        ({"instruction": "q", "completions": [{"text": "x"}]}, "objects with a `response`"),
        ({"instruction": "q", "generations": ["a"], "ratings": [1, 2]}, "1 `generations` have 2 `ratings`"),
        (open_r1([True, False], [True] * 3), "3 `generations` have 2 `correctness_math_verify`"),
        (strength(2) | {"preference_strength": float("inf")}, "must be a finite number"),
        ({**BINARISED, "score_chosen": True}, "`score_chosen` must be a finite number"),
    ],
)
def test_a_cell_that_is_not_what_its_layout_says_is_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"row 1: .*{words}"):
        list(preference_rows([("row 1", row)]))


def test_a_layout_is_known_by_its_columns_alone() -> None:
    assert layout_of(BINARISED) == "chosen and rejected"
    assert layout_of({**helpsteer(GOOD, 1), "more": 1}) == "HelpSteer"
    assert layout_of({"prompt": "p"}) is None
