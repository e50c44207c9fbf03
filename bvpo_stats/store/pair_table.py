"""Preference pairs as Parquet, with TRL's columns in front."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bvpo_stats.errors import UserError
from bvpo_stats.records import PreferencePair
from bvpo_stats.store.jsonl import read_jsonl

_TYPES = {
    "str": pa.string(),
    "Mode": pa.string(),
    "tuple[int, ...]": pa.list_(pa.int32()),
    "int": pa.int64(),
    "float": pa.float64(),
    "float | None": pa.float64(),
}
_ROWS = 512  # rows per group: bounds memory
TRL_COLUMNS = ("prompt", "chosen", "rejected")


def pair_schema(*, ref_logps: bool) -> pa.Schema:
    """Columns of a pairs table: TRL's first, then the record's others; reference log-probabilities where asked for."""
    types = {field.name: _TYPES[str(field.type)] for field in fields(PreferencePair)}
    names = [*TRL_COLUMNS, *(name for name in types if name not in TRL_COLUMNS)]
    return pa.schema([(name, types[name]) for name in names if ref_logps or not name.startswith("ref_")])


def write_parquet(source: Path, target: Path, *, ref_logps: bool) -> None:
    """Copies a JSONL file of pairs into Parquet, in constant memory, through a temporary file.

    Args:
        source: JSONL file of :class:`~bvpo_stats.records.PreferencePair` rows.
        target: The Parquet file.
        ref_logps: Whether the rows hold reference log-probabilities.

    Raises:
        UserError: The file cannot be written.
    """
    schema = pair_schema(ref_logps=ref_logps)
    part = target.with_name(target.name + ".tmp")
    rows = (row for _, row in read_jsonl(source))
    try:
        with pq.ParquetWriter(part, schema) as writer:
            while group := list(islice(rows, _ROWS)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"Cannot write {target}: {error.strerror or error}. Check free space and permissions."
        ) from error
