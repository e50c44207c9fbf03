"""TRL's layouts in: every one gives the same exact pair, and what is ambiguous is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.model.templates import Template, find_template
from bvpo_stats.records import Mode, PreferencePair, default_prompt_id, to_dict
from bvpo_stats.sampling.layouts import as_pairs, read_pairs
from bvpo_stats.sampling.pairs import ScoredCompletion, build_pair, choose, reads_back
from bvpo_stats.sampling.prompts import prompt_from_row
from tests.sampling.samples import sample, template
from tests.tokenizers import EMBEDDED, R1_0528, R1_DISTILL, qwen3, r1

QUESTION, TRACE, GOOD, BAD = "What is 8+9?", "8+9=17", "The answer is 17.", "16."
TEMPLATES = {
    "embedded": template(),
    "embedded protocol": find_template(r1(EMBEDDED)),
    "r1-distill": find_template(r1(R1_DISTILL)),
    "r1-0528": find_template(r1(R1_0528)),
    "qwen3": find_template(qwen3()),
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": text, **more}


def layouts(rendered: Template, mode: Mode) -> dict[str, dict[str, Any]]:
    """The same pair in every layout that TRL knows."""
    opening = "" if rendered.protocol.thinking_opening else "<think>"
    start = f"{opening}{TRACE}</think>" if mode == "thinking" else ""
    good, bad = start + GOOD, start + BAD
    prompt = rendered.prompt_text(QUESTION, mode)
    ids = rendered.prompt_ids(QUESTION, mode)
    eos = str(rendered.tokenizer.eos_token)
    encode = lambda text: rendered.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    reasoning = {"reasoning_content": TRACE} if mode == "thinking" else {}
    return {
        "question and texts": {"prompt": QUESTION, "chosen": good, "rejected": bad},
        "rendered prompt and texts": {"prompt": prompt, "chosen": good, "rejected": bad + eos},
        "texts with the prompt inside": {"chosen": prompt + good, "rejected": prompt + bad},
        "messages": {"prompt": [user(QUESTION)], "chosen": [assistant(good)], "rejected": [assistant(bad)]},
        "messages with the prompt inside": {
            "chosen": [user(QUESTION), assistant(good)],
            "rejected": [user(QUESTION), assistant(bad)],
        },
        "messages, and the prompt as text too": {
            "prompt": QUESTION,
            "chosen": [user(QUESTION), assistant(good)],
            "rejected": [user(QUESTION), assistant(bad)],
        },
        "messages with the trace apart": {
            "prompt": [user(QUESTION)],
            "chosen": [assistant(GOOD, **reasoning)],
            "rejected": [assistant(BAD, **reasoning)],
        },
        "ids": {"prompt_ids": list(ids), "chosen_ids": encode(good + eos), "rejected_ids": encode(bad + eos)},
    }


@pytest.mark.parametrize("mode", ["thinking", "nothinking"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_layout_gives_the_pair_that_sampling_would_have_given(name: str, mode: Mode) -> None:
    rendered = TEMPLATES[name]
    eos = rendered.tokenizer.eos_token_id
    opening = "" if rendered.protocol.thinking_opening else "<think>"
    closing = rendered.empty_trace_ids(QUESTION)[1] if mode == "nothinking" else ()
    for layout, row in layouts(rendered, mode).items():
        (pair,) = as_pairs([row | {"source": "extra columns are ignored"}], rendered, mode)
        assert pair.prompt_ids == rendered.prompt_ids(QUESTION, "thinking"), layout
        assert pair.prompt_id == default_prompt_id(QUESTION), layout
        text = GOOD if mode == "nothinking" else f"{opening}{TRACE}</think>{GOOD}"
        assert pair.chosen_ids == (*closing, *rendered.tokenizer.encode(text, add_special_tokens=False), eos), layout
        assert (pair.chosen_answer, pair.rejected_answer) == (GOOD, BAD), layout
        start = pair.chosen_answer_start
        assert start is not None
        assert rendered.answer_text(pair.chosen_ids[start:]) == GOOD
        assert (pair.mode, pair.temperature, pair.model, pair.chosen_reward) == (mode, None, None, None)


def test_a_sampled_pair_comes_back_from_trls_columns() -> None:
    """``pairs`` writes text that TRL reads back as the sampler's ids; so does this."""
    for mode in ("thinking", "nothinking"):
        rows = [ScoredCompletion(sample("q", i, answer, mode=mode), i) for i, answer in enumerate((BAD, GOOD))]
        choice = choose(rows)
        assert not isinstance(choice, str)
        made = build_pair(choice, template())
        assert reads_back(made, template().tokenizer)
        row = {name: getattr(made, name) for name in ("prompt", "chosen", "rejected", "prompt_id")}
        (found,) = as_pairs([row], template(), mode)
        known = {k: v for k, v in to_dict(made).items() if to_dict(found).get(k) is not None}
        assert to_dict(found) == known


def test_records_and_their_rows_keep_their_mode() -> None:
    pairs = [
        *as_pairs([layouts(template(), "thinking")["messages"]], template(), "thinking"),
        *as_pairs([layouts(template(), "nothinking")["messages"]], template(), "nothinking"),
    ]
    assert as_pairs([pairs[0], to_dict(pairs[1])], template) == pairs
    assert pairs[0].prompt_id == pairs[1].prompt_id
    assert pairs[0].prompt_ids == pairs[1].prompt_ids


def test_what_a_record_says_of_itself_must_hold() -> None:
    responses = [
        ScoredCompletion(sample("p", i, text), reward) for i, (text, reward) in enumerate([("17", 1.0), ("16", 0.0)])
    ]
    choice = choose(responses)
    assert not isinstance(choice, str)
    row = to_dict(build_pair(choice, template()))
    length = row["chosen_answer_start"]
    for start in (0, 1, length - 1):
        with pytest.raises(UserError, match=rf"`chosen_answer_start` is {start}, but the trace ends at {length}"):
            as_pairs([row | {"chosen_answer_start": start}], template())
    unknown = as_pairs([row | {"chosen_answer_start": None}], template())[0]
    assert unknown.chosen_answer_start in (None, length)
    assert as_pairs([row | {"chosen_answer_start": 1, "template": "another"}], template())  # not ours to judge
    for name in ("cut_share", "unclosed_share"):
        for share in (-0.1, 1.5):
            with pytest.raises(UserError, match=f"`{name}` must lie between 0 and 1"):
                as_pairs([row | {name: share}], template())


def test_what_is_known_of_the_sampling_is_kept() -> None:
    row = layouts(template(), "thinking")["messages"]
    more = {"prompt_id": 7, "temperature": 1, "top_p": 1.0, "model": "m", "chosen_reward": 2.0}
    (pair,) = as_pairs([row | more], template(), "thinking")
    assert (pair.prompt_id, pair.temperature, pair.model, pair.chosen_reward) == ("7", 1.0, "m", 2.0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_opening_tag_that_the_prompt_has_is_the_same_tag(name: str) -> None:
    """People's texts hold the whole turn; templates of the R1 kind end their prompts in its opening tag."""
    rendered = TEMPLATES[name]
    rows = [{"prompt": QUESTION, "chosen": f"{tag}{TRACE}</think>{GOOD}", "rejected": f"{tag}{TRACE}</think>{BAD}"}
            for tag in ("<think>", rendered.protocol.thinking_opening or "<think>")]  # fmt: skip
    first, second = as_pairs(rows, rendered, "thinking")
    assert first == second
    assert rendered.tokenizer.decode([*first.prompt_ids, *first.chosen_ids]).count("<think>") == 1


def test_a_trace_that_never_closes_has_no_answer() -> None:
    (pair,) = as_pairs([{"prompt": QUESTION, "chosen": "17", "rejected": "16"}], template(), "thinking")
    assert (pair.chosen_answer_start, pair.chosen_answer) == (None, None)


def test_every_source(tmp_path: Path) -> None:
    rows = [layouts(template(), "thinking")["messages"], layouts(template(), "thinking")["messages"]]
    rows[1] = rows[1] | {"prompt": [user("What is 1+1?")]}
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "x.parquet")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = as_pairs(rows, template(), "thinking")
    assert len({pair.prompt_id for pair in expected}) == 2
    assert as_pairs(table, template(), "thinking") == expected
    for source in (table, rows, tmp_path / "x.parquet", tmp_path / "x.jsonl", tmp_path / "saved"):
        assert read_pairs(source, template, "thinking") == expected  # type: ignore[arg-type]
    assert {type(pair) for pair in read_pairs("embedded", template, "nothinking")} == {PreferencePair}


BASE = {"prompt": QUESTION, "chosen": f"{TRACE}</think>{GOOD}", "rejected": f"{TRACE}</think>{BAD}"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected": None}, "no column `rejected` (columns: prompt, chosen, rejected)"),
        ({"chosen": [assistant("x")]}, "both be text or both messages"),
        ({"prompt": 3}, "`prompt` must be a text"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": f"{QUESTION}</think>"}, "holds </think>, which the model would read as a control token"),
        ({"prompt": f"<｜end▁of▁sentence｜>{QUESTION}"}, "holds <｜end▁of▁sentence｜>"),
        ({"prompt": None}, "no column `prompt`"),
        ({"chosen": ""}, "`chosen` is empty"),
        ({"chosen": f"<think><think>{TRACE}</think>{GOOD}"}, "`chosen` has a doubled think tag"),
        ({"chosen": f"{TRACE}<think></think>{GOOD}"}, "`chosen` has a doubled think tag"),
        ({"chosen": f"{TRACE}</think>{GOOD}</think>"}, "doubled think tag"),
        ({"chosen": f"{TRACE}</think><｜User｜>{GOOD}"}, "special token <｜User｜> inside"),
        ({"rejected": BASE["chosen"]}, "chosen and rejected are the same"),
        ({"mode": "dreaming"}, "field `mode`"),
        ({"temperature": "hot"}, "field `temperature`"),
        (
            {"prompt": [{"role": "tool", "content": "be kind"}, user(QUESTION)]},
            "role must be system, user or assistant",
        ),
        ({"prompt": [user(QUESTION), assistant("8")]}, "last turn is an assistant's"),
    ],
)
def test_what_is_ambiguous_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    row = BASE | change
    if change.get("prompt") and isinstance(row["prompt"], list):
        row |= {"chosen": [assistant(BASE["chosen"])], "rejected": [assistant(BASE["rejected"])]}
    with pytest.raises(UserError) as caught:
        as_pairs([BASE, row], template(), "thinking", name="train_dataset")
    assert str(caught.value).startswith("train_dataset, row 2: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "mode", "words"),
    [
        (BASE, "nothinking", "think tag in it, but a pair of D_e"),
        (BASE, None, "`mode`"),
        ({"chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
          "rejected": [user("a"), assistant("b"), user("x"), assistant("e")]}, "thinking", "exactly one assistant"),
        ({"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("c")]}, "thinking", "one assistant"),
        ({"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2]}, "thinking", "`prompt_ids` is empty"),
        ({"prompt_ids": [1], "chosen_ids": [1.5], "rejected_ids": [2]}, "thinking", "field `chosen_ids`"),
        (["x"], "thinking", "a list, neither a pair nor a row"),
    ],
)  # fmt: skip
def test_more_refusals(row: Any, mode: Mode | None, words: str) -> None:
    with pytest.raises(UserError, match=r"row, row 1: ") as caught:
        as_pairs([row], template(), mode)
    assert words in str(caught.value)


def test_tokens_that_merge_across_the_boundary() -> None:
    """A rendered prompt that ends inside a word: `` ans`` + ``wer`` are one token together."""
    prompt = template().prompt_text(QUESTION, "thinking") + "The"
    row = {"prompt": prompt + " ans", "chosen": f"wer</think>{GOOD}", "rejected": f"wer</think>{BAD}"}
    with pytest.raises(UserError, match="merges with the end of the prompt"):
        as_pairs([row], template(), "thinking")


def test_conversations_and_system_prompts_in_every_layout() -> None:
    """Turns in a column, in front of both answers, the system prompt in a column of its own, or all of it rendered."""
    turns = [{"role": "system", "content": "Be kind."}, user("1+1?"), assistant("2"), user(QUESTION)]
    good, bad = BASE["chosen"], BASE["rejected"]
    ends = {"chosen": [assistant(good)], "rejected": [assistant(bad)]}
    rows: list[dict[str, Any]] = [
        {"prompt": turns, **ends},
        {name: turns + end for name, end in ends.items()},
        {"prompt": turns[1:], "system": "Be kind.", **ends},
    ]
    pairs = as_pairs(rows, template(), "thinking")
    assert pairs[1:] == pairs[:1] * 2
    question = prompt_from_row({"messages": turns}, "here").question
    assert pairs[0].prompt_ids == template().prompt_ids(question, "thinking")
    assert pairs[0].prompt_id == default_prompt_id(question)
    rendered = {"prompt": template().prompt_text(question, "thinking"), "chosen": good, "rejected": bad}
    (same,) = as_pairs([rendered], template(), "thinking")
    assert (same.prompt_ids, same.chosen_ids) == (pairs[0].prompt_ids, pairs[0].chosen_ids)
    (empty,) = as_pairs([{"prompt": turns, "chosen": GOOD, "rejected": BAD}], template(), "nothinking")
    assert (empty.prompt_ids, empty.prompt_id) == (pairs[0].prompt_ids, pairs[0].prompt_id)
