from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.records import MODES, Completion, to_dict
from bvpo_stats.sampling.engines.file_engine import adopt_completions, adopt_into
from bvpo_stats.store.tables import fingerprint, read_records, write_records
from tests.sampling.samples import sample, template

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
    (completion,) = adopt_completions(write(tmp_path / "x.jsonl", [row]), TEMPLATE, EOS)
    return completion


def test_our_own_records_come_back_unchanged(tmp_path: Path) -> None:
    unclosed = replace(sample("q9", 0, ""), finish_reason="length", answer_start=None, answer=None)
    ours = [*records(3), unclosed]
    path = write(tmp_path / "x.jsonl", list(map(to_dict, ours)))
    assert list(adopt_completions(path, None)) == ours
    assert list(adopt_completions(path, TEMPLATE, EOS)) == ours
    for name in ("x.parquet", "y.jsonl.gz"):
        write_records(tmp_path / name, ours)
        assert list(adopt_completions(tmp_path / name, None)) == ours


def test_what_no_line_says_is_unknown(tmp_path: Path) -> None:
    """A table fills missing values with nulls; unknown temperatures and models are never taken for a default."""
    table = datasets.Dataset.from_list(
        [
            {"prompt_id": "q", "mode": "thinking", "prompt": "1+1?", "text": "1+1=2</think>2", "temperature": None},
            {"prompt_id": "q", "mode": "nothinking", "prompt": "1+1?", "text": "2", "temperature": 0.8},
        ]
    )
    table.to_parquet(tmp_path / "x.parquet")
    first, second = adopt_completions(tmp_path / "x.parquet", TEMPLATE, EOS)
    assert (first.temperature, first.top_p, first.model, first.max_new_tokens) == (None, None, None, None)
    assert (second.temperature, second.answer, first.answer) == (0.8, "2", "2")


def test_texts_are_tokenised_as_the_model_would_have_seen_them(tmp_path: Path) -> None:
    ours = sample("q", 0, "It is 17.")
    for mode, text in (("thinking", ours.text), ("nothinking", "It is 17.")):
        made = adopt_one(tmp_path, prompt_id="q", mode=mode, prompt=ours.prompt, text=text)
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
    made = list(adopt_completions(write(tmp_path / "x.jsonl", rows), TEMPLATE, EOS))
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
        list(adopt_completions(path, TEMPLATE if bound else None, EOS))


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
    rows = [{"prompt_id": "q", "mode": "thinking", "prompt": "8+9", "text": "8+9=17</think>17", "gold": "17"}]
    (tmp_path / "run").mkdir()
    adopt_into(tmp_path / "run", write(tmp_path / "x.jsonl", rows), POLICY, modes=MODES)
    (made,) = read_records(tmp_path / "run", Completion)
    assert (made.trace, made.answer, made.gold, made.engine) == ("8+9=17", "17", "17", "file")
    assert made.completion_ids[-1] == EOS
