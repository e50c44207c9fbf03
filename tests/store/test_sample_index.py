"""Samples by prompt: whatever the order, the shards and the state of the files."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.records import MODES, Completion
from bvpo_stats.store.sample_index import open_sample_index, samples_fingerprint
from tests.sampling.samples import both_modes, sample, write_samples


def records(prompts: int = 7) -> list[Completion]:
    return [c for p in range(prompts) for c in both_modes(f"p{p}", ["17", "18", "the answer is 1\u201d7"])]


def read(folder: Path, modes=MODES) -> list[list[Completion]]:
    with open_sample_index(folder, folder.parent / "index.sqlite", modes) as index:
        return [responses for window in index.windows(3) for responses in window]


def test_order_and_shards_do_not_matter(tmp_path: Path) -> None:
    rows = records()
    shuffled = random.Random(1).sample(rows, len(rows))
    expected = [rows[i : i + 6] for i in range(0, len(rows), 6)]
    assert read(write_samples(tmp_path / "a", shuffled)) == expected
    write_samples(tmp_path / "b", shuffled[:20], "samples-00001-of-00002.jsonl")
    write_samples(tmp_path / "b", shuffled[20:], "samples-00002-of-00002.jsonl")
    assert read(tmp_path / "b") == expected
    assert not (tmp_path / "index.sqlite").exists()


def test_one_mode_and_the_counts(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "a", [*records(), sample("only-thinking", 0, "17")])
    assert {c.mode for responses in read(folder, ("nothinking",)) for c in responses} == {"nothinking"}
    with open_sample_index(folder, tmp_path / "index.sqlite") as index:
        assert (index.source.n_prompts, index.source.n_responses) == (8, 43)
        assert (index.source.model, index.source.template) == ("embedded@test", "embedded")


def test_a_half_written_last_line_is_passed_over_and_counted(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "a", records(2))
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with open_sample_index(folder, tmp_path / "index.sqlite") as index:
        assert (index.source.n_responses, index.source.half_written) == (11, 1)
        assert [len(index.completions(p)) for p in index.prompt_ids()] == [6, 5]
    assert path.read_bytes() == whole[:-40]  # somebody else's file is left alone
    path.write_bytes(whole[:-1])  # whole, but for the newline
    with open_sample_index(folder, tmp_path / "index.sqlite") as index:
        assert (index.source.n_responses, index.source.half_written) == (12, 0)
        assert [len(index.completions(p)) for p in index.prompt_ids()] == [6, 6]


def broken(line: str) -> str:
    return json.dumps({"prompt_id": "p9"}) if line == "fields" else line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not a sample"),
        ("fields", "check mode, sample_index"),
        ('{"prompt_id": "p", "chosen": "a", "rejected": "b"}', "not a sample"),
    ],
)
def test_lines_that_are_no_samples(tmp_path: Path, line: str, words: str) -> None:
    folder = write_samples(tmp_path / "a", records(1))
    with (folder / "samples.jsonl").open("a") as handle:
        handle.write(broken(line) + "\n")
    with pytest.raises(UserError, match=rf"samples\.jsonl:7: .*{words}"):
        read(folder)


def test_the_same_draw_twice(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "a", [*records(1), sample("p0", 1, "another")])
    with pytest.raises(UserError, match=r"samples\.jsonl:7: the sample p0/thinking/1 occurs twice .*samples\.jsonl:2"):
        read(folder)


@pytest.mark.parametrize("field", ["model", "template"])
def test_mixed_sources(tmp_path: Path, field: str) -> None:
    other = replace(sample("p1", 0, "17"), **{field: "other"})
    folder = write_samples(tmp_path / "a", [*records(1), other])
    with pytest.raises(UserError, match=rf"samples\.jsonl:7: samples of several {field}s are mixed"):
        read(folder)


def test_folders_that_hold_no_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        samples_fingerprint(tmp_path / "none")
    (tmp_path / "thinking.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"no samples\.jsonl there"):
        read(tmp_path)
    folder = write_samples(tmp_path / "a", [sample("p", 0, "17")])
    with pytest.raises(UserError, match="no responses in nothinking mode"):
        read(folder, ("nothinking",))


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "a", records(2))
    first = samples_fingerprint(folder)
    assert samples_fingerprint(write_samples(tmp_path / "b", records(2))) == first
    write_samples(folder, records(3))
    assert samples_fingerprint(folder) != first


def test_a_policy_that_did_not_draw_the_samples_is_refused(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "a", [replace(c, engine="transformers") for c in records(1)])
    with open_sample_index(folder, tmp_path / "index.sqlite") as index:
        index.source.check_sampling_model("embedded@test")
        with pytest.raises(UserError, match="drawn by embedded@test, but `model` is other"):
            index.source.check_sampling_model("other")
