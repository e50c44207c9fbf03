from __future__ import annotations

import copy
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Example
from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.records import MODES, Completion, to_dict
from bvpo_stats.sampling.engines.file_engine import Unusable, adopt_completions, adopt_into
from bvpo_stats.sampling.pairs import make_pairs
from bvpo_stats.sampling.sample import count_set_aside
from bvpo_stats.store.tables import fingerprint, read_records, write_records
from tests.sampling.samples import sample, template, truncated, unclosed

TEMPLATE = template()
EOS = TEMPLATE.tokenizer.eos_token_id
POLICY = ServedPolicy(TEMPLATE, (EOS,))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(count: int, **changes: Any) -> list[Completion]:
    return [
        sample(f"q{number}", index, str(number), mode=mode, **changes)
        for number in range(count)
        for mode in MODES
        for index in range(2)
    ]


def adopt_one(tmp_path: Path, **row: Any) -> Completion:
    (completion,) = adopt_completions(write(tmp_path / "x.jsonl", [row]), TEMPLATE)
    assert isinstance(completion, Completion)
    return completion


def test_our_own_records_come_back_unchanged(tmp_path: Path) -> None:
    ours = [*records(3), truncated("q9", 0), unclosed("q9", 1)]
    path = write(tmp_path / "x.jsonl", list(map(to_dict, ours)))
    assert list(adopt_completions(path, None)) == ours
    assert list(adopt_completions(path, TEMPLATE)) == ours
    for name in ("x.parquet", "y.jsonl.gz"):
        write_records(tmp_path / name, ours)
        assert list(adopt_completions(tmp_path / name, None)) == ours


def test_what_no_line_says_is_unknown(tmp_path: Path) -> None:
    """A table fills missing values with nulls; unknown temperatures and models are never taken for a default."""
    table = datasets.Dataset.from_list(
        [
            {
                "prompt_id": "q",
                "mode": "thinking",
                "prompt": "1+1?",
                "text": "1+1=2</think>2",
                "temperature": None,
                "finish_reason": "stop",
            },
            {
                "prompt_id": "q",
                "mode": "nothinking",
                "prompt": "1+1?",
                "text": "2",
                "temperature": 0.8,
                "finish_reason": "stop",
            },
        ]
    )
    table.to_parquet(tmp_path / "x.parquet")
    first, second = adopt_completions(tmp_path / "x.parquet", TEMPLATE)
    assert (first.temperature, first.top_p, first.model, first.max_new_tokens) == (None, None, None, None)
    assert (second.temperature, second.answer, first.answer) == (0.8, "2", "2")


def test_texts_are_tokenised_as_the_model_would_have_seen_them(tmp_path: Path) -> None:
    ours = sample("q", 0, "It is 17.")
    for mode, text in (("thinking", ours.text), ("nothinking", "It is 17.")):
        made = adopt_one(tmp_path, prompt_id="q", mode=mode, prompt=ours.prompt, text=text, finish_reason="stop")
        assert made.prompt_ids == TEMPLATE.prompt_ids(ours.prompt, mode)
        assert made.completion_ids == (*TEMPLATE.tokenizer.encode(text, add_special_tokens=False), EOS)
        assert (made.answer, made.finish_reason) == ("It is 17.", "stop")
    assert made.answer_start == 0


def test_a_cut_text_gets_no_end(tmp_path: Path) -> None:
    for word in ("length", "max_tokens"):
        made = adopt_one(
            tmp_path, prompt_id="q", mode="thinking", prompt="1+1", text="1+1=2</think>2", finish_reason=word
        )
        assert made.finish_reason == "length"
        assert made.completion_ids[-1] != EOS


def test_a_trace_that_never_closes_has_no_answer(tmp_path: Path) -> None:
    made = adopt_one(tmp_path, prompt_id="q", mode="thinking", prompt="1+1", text="1+1=", finish_reason="length")
    assert (made.answer_start, made.answer, made.trace) == (None, None, "1+1=")


def test_indices_are_counted_where_they_are_missing(tmp_path: Path) -> None:
    rows = [{"prompt_id": p, "mode": m, "prompt": "1+1", "text": "2"} for p in (1, 2) for m in MODES for _ in range(2)]
    made = list(adopt_completions(write(tmp_path / "x.jsonl", rows), TEMPLATE))
    assert [completion.key for completion in made] == [f"{p}/{m}/{i}" for p in (1, 2) for m in MODES for i in range(2)]


FULL = to_dict(sample("q", 0, "17"))


@pytest.mark.parametrize(
    ("rows", "bound", "words"),
    [
        ([FULL, FULL], False, r"x\.jsonl:2: the response q/thinking/0 occurs twice"),
        ([FULL | {"mode": "both"}], False, ":1: field `mode`"),
        ([{"mode": "thinking"}], False, ":1: no field `prompt_id`"),
        ([FULL | {"completion_ids": []}], False, ":1: the completion is empty"),
        ([{"prompt_id": "q", "mode": "thinking", "prompt": "a", "text": "b"}], False, ":1: no token ids, and no model"),
        ([{"prompt_id": "q", "mode": "thinking", "prompt": "a"}], True, ":1: needs `prompt_ids`"),
        ([{"prompt_id": "q", "mode": "thinking", "text": "a"}], True, ":1: needs `prompt_ids`"),
        ([{k: v for k, v in FULL.items() if k != "answer_start"}], False, ":1: no `answer_start`"),
    ],
)
def test_lines_that_cannot_be_used_are_named(
    tmp_path: Path, rows: list[dict[str, Any]], bound: bool, words: str
) -> None:
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError, match=words):
        list(adopt_completions(path, TEMPLATE if bound else None))


def adopt_file(folder: Path, source: Path, **options: Any) -> int:
    folder.mkdir(exist_ok=True)
    return adopt_into(folder, source, None, **{"modes": MODES, **options}).responses


def test_a_file_is_taken_over(tmp_path: Path) -> None:
    ours = records(3)
    source = write(tmp_path / "x.jsonl", list(map(to_dict, ours)))
    assert adopt_file(tmp_path / "run", source) == 12
    assert list(read_records(tmp_path / "run", Completion)) == ours
    assert adopt_file(tmp_path / "run", source) == 0  # once


def test_modes_and_limit_choose(tmp_path: Path) -> None:
    ours = records(3)
    source = write(tmp_path / "x.jsonl", [to_dict(ours[i]) for i in (0, 4, 8, 1, 5, 9, 2, 6, 10)])
    adopt_file(tmp_path / "run", source, modes=("thinking",), limit=2)
    assert [completion.key for completion in read_records(tmp_path / "run", Completion)] == [
        "q0/thinking/0",
        "q1/thinking/0",
        "q0/thinking/1",
        "q1/thinking/1",
    ]
    with pytest.raises(UserError, match="no responses in mode nothinking"):
        adopt_file(tmp_path / "other", write(tmp_path / "y.jsonl", [FULL]), modes=("nothinking",))


def test_an_interrupted_file_goes_on_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bvpo_stats.sampling.engines.file_engine._ROWS", 5)
    ours = records(4)
    source = write(tmp_path / "x.jsonl", list(map(to_dict, ours)))
    adopt_file(tmp_path / "whole", source)
    lines = (tmp_path / "whole" / "samples.jsonl").read_text().splitlines(keepends=True)
    for done in range(len(lines)):
        folder = tmp_path / f"cut{done}"
        folder.mkdir()
        (folder / "samples.jsonl").write_text("".join(lines[:done]))
        assert adopt_file(folder, source) == 16 - done
        assert (folder / "samples.jsonl").read_text() == "".join(lines)


@pytest.mark.parametrize("field", ["model", "template"])
def test_mixed_sources_are_refused_and_nothing_is_lost(
    tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bvpo_stats.sampling.engines.file_engine._ROWS", 2)
    rows = [to_dict(record) for record in records(1)]
    source = write(tmp_path / "x.jsonl", [*rows[:3], rows[3] | {field: "other"}])
    with pytest.raises(UserError, match=f"q0/nothinking/1 is of {field} 'other', those before it of "):
        adopt_file(tmp_path / "run", source)
    assert len(list(read_records(tmp_path / "run", Completion))) == 2


def test_a_source_that_was_cut_off_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [FULL])
    source.write_text(source.read_text() + '{"prompt_id": "q')
    with pytest.raises(UserError, match=":2: the last line is cut off"):
        adopt_file(tmp_path / "run", source)


def test_memory_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records themselves pass through; what is remembered is a digest of each key and a count for each prompt."""

    monkeypatch.setattr("bvpo_stats.sampling.engines.file_engine._ROWS", 50)

    def peak(prompts: int) -> int:
        source = tmp_path / f"{prompts}.jsonl"
        with source.open("w") as out:
            for number in range(prompts):
                for index in range(2):
                    row = FULL | {"prompt_id": f"q{number}", "sample_index": index}
                    out.write(json.dumps(row) + "\n")
        tracemalloc.start()
        try:
            adopt_file(tmp_path / f"run{prompts}", source)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # whatever is set up once
    small, large = peak(100), peak(700)
    assert (large - small) / 1_200 < 400  # bytes a response; a record takes over 2,000


def test_fingerprints_of_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * 3_000_000)
    first = fingerprint(path)
    path.write_bytes(b"a" * 2_999_999 + b"b")
    assert fingerprint(path) != first
    with pytest.raises(UserError, match="samples_from"):
        fingerprint(tmp_path / "none", "samples_from")


def test_adopting_with_the_model_fills_in_what_is_missing(tmp_path: Path) -> None:
    rows = [
        {
            "prompt_id": "q",
            "mode": "thinking",
            "prompt": "8+9",
            "text": "8+9=17</think>17",
            "gold": "17",
            "finish_reason": "stop",
        }
    ]
    (tmp_path / "run").mkdir()
    adopt_into(tmp_path / "run", write(tmp_path / "x.jsonl", rows), POLICY, modes=MODES)
    (made,) = read_records(tmp_path / "run", Completion)
    assert (made.trace, made.answer, made.gold, made.engine) == ("8+9=17", "17", "17", "file")
    assert made.completion_ids[-1] == EOS


QUESTION, TEXT = "Compute 1+2.", "First 1+2=3.</think>It is 3."
PAD, OPEN, CLOSE = (TEMPLATE.tokenizer.convert_tokens_to_ids(t) for t in ("<｜▁pad▁｜>", "<think>", "</think>"))
PROMPT_IDS = list(TEMPLATE.prompt_ids(QUESTION, "thinking"))
IDS = [*TEMPLATE.tokenizer.encode(TEXT, add_special_tokens=False), EOS]
ROW = {"prompt_id": "q", "mode": "thinking", "prompt": QUESTION, "text": TEXT, "finish_reason": "stop"}
EXACT = ROW | {"prompt_ids": PROMPT_IDS, "completion_ids": IDS}
EMPTY = ROW | {"mode": "nothinking", "text": "It is 3."}
EMPTY_IDS = [*TEMPLATE.tokenizer.encode("It is 3.", add_special_tokens=False), EOS]


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        EXACT,
        ROW | {"text": f"<think>{TEXT}"},  # the tag that the prompt ends in is the same tag
        ROW | {"text": f"{TEXT}<｜end▁of▁sentence｜>", "finish_reason": None},
        ROW | {"text": "It is 3.", "reasoning_content": "First 1+2=3."},
        ROW | {"text": "It is 3.", "reasoning": "First 1+2=3.", "thinking": None},
        ROW | {"reasoning_content": "First 1+2=3."},  # it stands in the text, too
        EXACT | {"completion_ids": [*IDS, PAD, PAD]},
        EXACT | {"completion_ids": [*IDS, EOS, EOS]},
        EXACT | {"completion_ids": IDS[:-1]},  # samplers may keep the last token to themselves
        EXACT | {"prompt_ids": [PAD, PAD, PAD, *PROMPT_IDS]},
        EXACT | {"completion_ids": [*IDS, 9, 9], "completion_mask": [1] * len(IDS) + [0, 0]},
        EXACT | {"prompt_ids": [9, *PROMPT_IDS], "prompt_attention_mask": [0] + [1] * len(PROMPT_IDS)},
        EXACT | {"finish_reason": None},  # the end of sequence is on record
        EXACT | {"logprobs": [-0.5] * len(IDS) + [-90.0] * 2, "completion_ids": [*IDS, PAD, PAD]},
        ROW | {"prompt": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]},
        {"prompt_id": "q", "mode": "thinking", "messages": [{"role": "user", "content": QUESTION}], "text": TEXT,
         "finish_reason": {"type": "stop", "matched": EOS}},
    ],
)  # fmt: skip
def test_what_is_certain_is_repaired(tmp_path: Path, row: dict[str, Any]) -> None:
    """However the response comes, it is the sequence that the model saw."""
    made = adopt_one(tmp_path, **row)
    assert (list(made.prompt_ids), list(made.completion_ids)) == (PROMPT_IDS, IDS)
    assert (made.finish_reason, made.answer, made.trace) == ("stop", "It is 3.", "First 1+2=3.")
    assert made.logprobs in (None, (-0.5,) * len(IDS))


@pytest.mark.parametrize("text", ["It is 3.", "</think>It is 3.", "<think></think>It is 3."])
def test_a_nothinking_answer_has_one_empty_trace(tmp_path: Path, text: str) -> None:
    made = adopt_one(tmp_path, **EMPTY | {"text": text})
    assert list(made.completion_ids) == EMPTY_IDS
    thinking_form = EMPTY | {"prompt_ids": PROMPT_IDS, "completion_ids": [CLOSE, *EMPTY_IDS]}
    assert replace(adopt_one(tmp_path, **thinking_form), text=made.text) == made


@pytest.mark.parametrize(
    "value",
    ["length", "LENGTH", "max_tokens", "MAX_LENGTH", "max_new_tokens", "FinishReason.MAX_TOKENS", {"type": "length"},
     {"finish_reason": {"type": "length", "length": 64}}, ["length"], {"reason": "max_output_tokens"}],
)  # fmt: skip
def test_a_cut_response_is_cut_in_any_spelling(tmp_path: Path, value: Any) -> None:
    for row in (ROW, EXACT | {"completion_ids": IDS[:-1]}):
        made = adopt_one(tmp_path, **row | {"finish_reason": value})
        assert made.finish_reason == "length"
        assert list(made.completion_ids) == IDS[:-1]


@pytest.mark.parametrize("value", ["stop", "STOP", "eos", "eos_token", "EOS_TOKEN", "end_turn", {"type": "stop"}])
def test_a_response_that_stopped_stopped_in_any_spelling(tmp_path: Path, value: Any) -> None:
    assert list(adopt_one(tmp_path, **ROW | {"finish_reason": value}).completion_ids) == IDS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"finish_reason": "abort"}, "finish-abort"),
        ({"finish_reason": "content_filter"}, "finish-content_filter"),
        ({"finish_reason": None}, "finish-unknown"),
        ({"finish_reason": {"type": "abort", "message": "x"}}, "finish-abort"),
        ({"finish_reason": {"type": "stop", "matched": "\n\n"}}, "finish-stop-sequence"),
        ({"finish_reason": {"type": "stop", "matched": 9}}, "finish-stop-sequence"),
        ({"stop_reason": "User:"}, "finish-stop-sequence"),
        ({"finish_reason": 3}, "finish-unknown"),
        ({"finish_reason": ["stop", "length"]}, "finish-unknown"),
        ({"prompt": "What is </think>?"}, "control-tokens"),
        ({"mode": "nothinking", "text": "It </think> is 3."}, "think-tag-in-answer"),
    ],
)
def test_what_did_not_end_by_itself_is_set_aside(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    """Never taken for a stop: nobody wrote its end of sequence."""
    source = write(tmp_path / "x.jsonl", [ROW, ROW | change])
    _, lost = adopt_completions(source, TEMPLATE)
    assert isinstance(lost, Unusable)
    assert (lost.outcome.reason, lost.where) == (reason, f"{source}:2")
    (tmp_path / "run").mkdir()
    for calls in range(2):  # an interrupted call finds both on record
        tally = adopt_into(tmp_path / "run", source, POLICY, modes=MODES)
        assert (tally.responses, tally.set_aside) == ((1, 1) if not calls else (0, 0))
    assert count_set_aside([tmp_path / "run" / "set_aside.jsonl"]) == {reason: 1}
    (tmp_path / "none").mkdir()
    alone = write(tmp_path / "y.jsonl", [ROW | change])
    with pytest.raises(UserError, match=r"none of the 1 responses can be used\. .*y\.jsonl:1: "):
        adopt_into(tmp_path / "none", alone, POLICY, modes=MODES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"completion_ids": [str(i) for i in IDS]}, "field `completion_ids` must be a list of integers"),
        ({"completion_ids": [float(i) for i in IDS]}, "field `completion_ids` must be a list of integers"),
        ({"completion_ids": [True, *IDS]}, "field `completion_ids` must be a list of integers"),
        ({"completion_ids": [-100, *IDS]}, "field `completion_ids` must be a list of integers"),
        ({"prompt_ids": [-100, *PROMPT_IDS]}, "field `prompt_ids` must be a list of integers"),
        ({"completion_ids": [*IDS[:-1], 305, EOS]}, "holds the id 305, but the model's are 0 to 304"),
        ({"prompt_ids": [99999, *PROMPT_IDS]}, "field `prompt_ids` holds the id 99999"),
        ({"completion_ids": [*IDS, 9, 9]}, "goes on behind an end of sequence (id 3)"),
        ({"completion_ids": [PAD, PAD, *IDS]}, "begins with padding (id 0)"),
        ({"completion_ids": [OPEN, *IDS]}, "begins with the opening tag"),
        ({"completion_ids": [*IDS, EOS], "finish_reason": "length"}, "its ids end in several ends"),
        ({"completion_ids": [*IDS, 9], "completion_mask": [1, 0]}, "field `completion_mask` must be a run of ones"),
        ({"completion_ids": IDS, "attention_mask": [0, 1] * (len(IDS) // 2) + [1]}, "field `attention_mask`"),
        ({"prompt_ids": PROMPT_IDS[:-1]}, "field `prompt_ids` is not what template embedded renders"),
        ({"prompt_ids": [*PROMPT_IDS, PAD]}, "has padding (id 0) inside"),
        ({"prompt": "Compute 1+3."}, "from token 6 on"),
        ({"answer_start": 3}, "field `answer_start` is 3, but the trace ends at 9"),
        ({"temperature": "1"}, "field `temperature` must be a finite number"),
        ({"temperature": -1.0}, "field `temperature` must not be negative"),
        ({"top_p": 1.5}, "field `top_p` must lie between 0 and 1"),
        ({"logprobs": [-1.0]}, "field `logprobs` must hold a number up to 0 for each"),
        ({"logprobs": [1.0] * len(IDS)}, "field `logprobs` must hold a number up to 0"),
        ({"prompt_id": {"a": 1}}, "field `prompt_id` must be a text or a number"),
        ({"prompt_ids": None, "text": "It is 99999."}, "not the `text` beside it"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_ambiguous_is_refused_with_line_and_field(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    source = write(tmp_path / "x.jsonl", [EXACT, EXACT | change])
    with pytest.raises(UserError) as caught:
        list(adopt_completions(source, TEMPLATE))
    assert str(caught.value).startswith(f"{source}:2: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "<think><think>First.</think>3."}, "field `text` opens its trace twice"),
        ({"reasoning_content": "Second 1+2=4."}, "both `text` and `reasoning_content` hold a trace"),
        ({"text": f"{TEXT}<｜end▁of▁sentence｜>and on"}, "field `text` goes on behind an end of sequence"),
        ({"mode": "nothinking", "text": "3.", "reasoning": "First."}, "`reasoning` holds a trace, but the response is"),
        ({"text": 3}, "needs `prompt_ids` and `completion_ids`, or `prompt` and `text`"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "a content part of type image"),
    ],
)
def test_texts_that_are_wrong_or_ambiguous_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl:1: ") as caught:
        adopt_one(tmp_path, **ROW | change)
    assert words in str(caught.value)


def test_padding_that_is_the_end_of_sequence_is_told_by_the_prompt(tmp_path: Path) -> None:
    """Where padding and end of sequence are one token, the rendered prompt says where the padding ends."""
    tokenizer = copy.deepcopy(TEMPLATE.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    same = replace(TEMPLATE, tokenizer=tokenizer)
    assert same.vocabulary.pad_id is None
    row = EXACT | {"prompt_ids": [EOS, EOS, *PROMPT_IDS], "completion_ids": [*IDS, EOS, EOS]}
    (made,) = adopt_completions(write(tmp_path / "x.jsonl", [row]), same)
    assert isinstance(made, Completion)
    assert (list(made.prompt_ids), list(made.completion_ids)) == (PROMPT_IDS, IDS)


def test_a_trace_without_an_answer_never_closed(tmp_path: Path) -> None:
    """A reasoning parser that met no closing tag calls all of it reasoning."""
    row = ROW | {"text": None, "reasoning_content": "First 1+2", "finish_reason": "length"}
    made = adopt_one(tmp_path, **row)
    assert (made.trace, made.answer, made.answer_start) == ("First 1+2", None, None)


def test_unknown_and_mixed_temperatures_rule_out_the_reference_point() -> None:
    """b_t = 0 needs temperature 1 and no cut of the vocabulary, on record and for both responses of a pair."""
    ours = [sample("q", index, answer) for index, answer in enumerate(("17", "16"))]

    def reason(*changes: dict[str, Any]) -> str | None:
        rows = [replace(response, **change) for response, change in zip(ours, changes, strict=True)]
        pairs = make_pairs(rows, lambda _, answer: float(answer), policy=TEMPLATE)
        return Example("q", pairs[0], pairs[0]).not_plain

    assert reason({}, {}) is None
    for name in ("temperature", "top_p", "top_k"):
        words = f"the {name.replace('_', '-')} of D_t{' (0 for none)' if name == 'top_k' else ''} is not recorded"
        assert reason({name: None}, {name: None}) == words
        assert reason({}, {name: 0.5 if name != "top_k" else 20}) == words
    assert reason({"top_k": 20}, {"top_k": 20}) == "pairs were sampled with top-k 20, not without"
    assert reason({"temperature": 0.6}, {"temperature": 0.6}) == (
        "pairs were sampled at temperature 0.6 and top-p 1, not 1 and 1"
    )
