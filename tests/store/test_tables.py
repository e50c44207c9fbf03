"""One reader: the same records from every form, and errors that name file, line and field."""

from __future__ import annotations

import gzip
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle import draw_pairs, draw_traces
from bvpo_stats.records import (
    Completion,
    Message,
    PreferencePair,
    Prompt,
    Record,
    TraceRecord,
    arrow_schema,
    from_dict,
    record_fields,
    to_dict,
)
from bvpo_stats.store.tables import dataset_rows, fingerprint, read_records, record_paths, write_records
from tests.sampling.samples import both_modes, unclosed
from tests.studies.alpha_inputs import small_oracle


def oracle_records() -> tuple[list[PreferencePair], list[PreferencePair], list[TraceRecord]]:
    oracle, rng = small_oracle(), np.random.default_rng(0)
    thinking, nothinking = draw_pairs(oracle, 4, rng)
    return thinking, nothinking, draw_traces(oracle, thinking, 2, rng)


THINKING, NOTHINKING, TRACES = oracle_records()
SAMPLES = [*both_modes("a", ["17", "It is 17."]), *both_modes("b", ["16"]), unclosed("b", 1)]
PROMPTS = [Prompt("a", "1+1?"), Prompt("b", "2+2?", "4")]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("records", [THINKING, TRACES, SAMPLES, PROMPTS], ids=["pairs", "traces", "samples", "prompts"])
def test_what_is_written_is_read_back(records: list[Any], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    assert write_records(path, iter(records)) == len(records)
    assert list(read_records(path, type(records[0]))) == records
    assert list(read_records(str(path))) == records  # the type is seen in the rows
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_datasets_in_memory_on_disk_and_formatted(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([to_dict(pair) for pair in THINKING])
    table.save_to_disk(tmp_path / "saved")
    for source in (table, tmp_path / "saved", table.with_format("numpy"), table.with_format("torch"), THINKING):
        assert list(read_records(source, PreferencePair)) == THINKING  # type: ignore[arg-type]
    assert list(read_records(table.to_list())) == THINKING
    assert len(fingerprint(tmp_path / "saved")) == 16


def test_folders_of_runs(tmp_path: Path) -> None:
    write_records(tmp_path / "thinking.jsonl.gz", THINKING)
    write_records(tmp_path / "nothinking.parquet", NOTHINKING)
    write_records(tmp_path / "traces.jsonl", TRACES)
    assert list(read_records(tmp_path, PreferencePair)) == [*THINKING, *NOTHINKING]
    assert list(read_records(tmp_path, mode="nothinking")) == NOTHINKING
    assert list(read_records(tmp_path, TraceRecord)) == TRACES
    with pytest.raises(UserError, match=r"holds no samples\.jsonl"):
        list(read_records(tmp_path, Completion))
    for part, name in enumerate(("samples-00001-of-00002", "samples-00002-of-00002")):
        write_records(tmp_path / f"{name}.jsonl", SAMPLES[part::2])
    assert list(read_records(tmp_path, Completion)) == [*SAMPLES[::2], *SAMPLES[1::2]]


def test_the_embedded_records() -> None:
    pairs = list(read_records("embedded"))
    assert {pair.mode for pair in pairs} == {"thinking", "nothinking"}
    assert next(read_records("embedded", TraceRecord)).source == "anchor"
    (path,) = record_paths("embedded", PreferencePair, mode="thinking")
    assert path.name == "thinking.jsonl.gz"


def test_parquet_has_trls_columns_in_front_and_leaves_out_what_it_is_told(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    without = ("ref_chosen_logps", "ref_rejected_logps")
    write_records(tmp_path / "x.parquet", [], PreferencePair, without=without)
    names = pq.read_schema(tmp_path / "x.parquet").names
    assert names[:3] == ["prompt", "chosen", "rejected"]
    assert set(names) == {field.name for field in fields(PreferencePair)} - set(without)
    with pytest.raises(UserError, match="columns are unknown"):
        write_records(tmp_path / "y.parquet", [])
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        write_records(tmp_path / "y.csv", THINKING)


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    def failing() -> Any:
        yield THINKING[0]
        raise UserError("stop")

    path = tmp_path / "x.jsonl"
    write_records(path, THINKING)
    before = path.read_bytes()
    with pytest.raises(UserError, match="stop"):
        write_records(path, failing())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [Prompt, Completion, PreferencePair, TraceRecord])
def test_the_schema_follows_the_dataclass(kind: type[Record]) -> None:
    """Every field has a column, and every column a type that holds the field's values."""
    schema = arrow_schema(kind)
    assert schema.names == [field.name for field in fields(kind)]
    for name, field in record_fields(kind).items():
        element = schema.field(name).type
        assert pa.types.is_list(element) == field.many
        element = element.value_type if field.many else element
        plain = {str: pa.types.is_string, int: pa.types.is_integer, float: pa.types.is_floating}
        check = plain | {Message: pa.types.is_struct}
        assert check[field.type](element), name


def test_turns_survive_every_format(tmp_path: Path) -> None:
    turns = (Message("system", "Be kind."), Message("user", "1+1?"), Message("assistant", "2"), Message("user", "And?"))
    prompts = [Prompt("a", "And?", "2", turns), Prompt("b", "1+1?")]
    for name in ("p.jsonl", "p.jsonl.gz", "p.parquet"):
        write_records(tmp_path / name, prompts)
        assert list(read_records(tmp_path / name, Prompt)) == prompts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen_ids": ["1", "2"]}, "field `chosen_ids` must be a list of integers from 0"),
        ({"chosen_ids": [1, -2]}, "field `chosen_ids`"),
        ({"chosen_ids": [1, 2.5]}, "field `chosen_ids`"),
        ({"chosen_ids": [True]}, "field `chosen_ids`"),
        ({"chosen_ids": "12"}, "field `chosen_ids`"),
        ({"prompt_id": 3}, "field `prompt_id` must be a text, not 3"),
        ({"mode": "dreaming"}, "field `mode` must be `thinking` or `nothinking`, not 'dreaming'"),
        ({"chosen": None}, "missing chosen"),
        ({"ref_chosen_logps": float("nan")}, "field `ref_chosen_logps` must be a finite number or null, not nan"),
        ({"temperature": "1"}, "field `temperature` must be a finite number"),
        ({"chosen_index": -1}, "field `chosen_index` must be an integer from 0"),
        ({"chosen_answer_start": 10_000}, "`chosen_answer_start` is 10000, but `chosen_ids` has"),
        ({"rejected_ids": None}, "missing rejected_ids"),
    ],
)
def test_wrong_values_are_refused_at_the_door(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    rows = [to_dict(pair) for pair in THINKING[:2]]
    rows[1] |= change
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"x\.jsonl:2: ") as caught:
        list(read_records(path, PreferencePair))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_and_whole_numbers_are_taken() -> None:
    row = to_dict(THINKING[0])
    given = row | {"temperature": 1, "chosen_index": np.int64(2), "chosen_ids": np.array(row["chosen_ids"])}
    found = from_dict(PreferencePair, given)
    assert found == replace(THINKING[0], temperature=1.0, chosen_index=2)
    assert isinstance(found.temperature, float)


@pytest.mark.parametrize("name", ["chosen_index", "chosen_reward", "temperature", "chosen_answer_start"])
def test_numbers_of_any_length_are_one_line(name: str) -> None:
    """JSON's whole numbers have no end; Python's floats and SQLite's integers do."""
    for value in (10**400, -(10**400)):
        with pytest.raises(UserError, match=f"field `{name}` must be"):
            from_dict(PreferencePair, to_dict(THINKING[0]) | {name: value})
    for ids in ([10**400], [2**63], [1, 10**30]):
        with pytest.raises(UserError, match="field `chosen_ids` must be a list of integers"):
            from_dict(PreferencePair, to_dict(THINKING[0]) | {"chosen_ids": ids})


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    whole = gzip.compress(b'{"prompt_id": "a", "prompt": "b"}\n' * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-10])
    for name in ("x.jsonl.gz", "x.parquet", "cut.jsonl.gz"):
        with pytest.raises(UserError, match=f"Cannot read .*{name}"):
            list(read_records(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        list(read_records(tmp_path / "none"))
    (tmp_path / "odd.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=r"odd\.jsonl:1: neither a pair"):
        list(read_records(tmp_path / "odd.jsonl"))


def test_a_folder_of_other_files_is_one_line(tmp_path: Path) -> None:
    """`datasets` streams, and so notices only while it reads."""
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="Cannot load `prompts`"):
        list(dataset_rows(str(tmp_path), "train", "prompts"))
