"""Completions as Parquet, for ``datasets.load_dataset("parquet", data_files=...)`` and every other reader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from bvpo_stats.errors import UserError
from bvpo_stats.records import Completion

if TYPE_CHECKING:
    import pyarrow as pa

_ROW_GROUP = 1_000


def completion_schema() -> pa.Schema:
    """One column for each field of :class:`~bvpo_stats.records.Completion`."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        {
            "prompt_id": pa.string(),
            "sample_index": pa.int32(),
            "mode": pa.string(),
            "prompt": pa.string(),
            "prompt_ids": ids,
            "completion_ids": ids,
            "text": pa.string(),
            "finish_reason": pa.string(),
            "answer_start": pa.int32(),
            "trace": pa.string(),
            "answer": pa.string(),
            "seed": pa.int64(),
            "temperature": pa.float64(),
            "top_p": pa.float64(),
            "max_new_tokens": pa.int32(),
            "model": pa.string(),
            "template": pa.string(),
            "engine": pa.string(),
            "gold": pa.string(),
            "logprobs": pa.list_(pa.float64()),
        }
    )


def write_completions(path: Path, completions: Iterable[Completion]) -> int:
    """Writes a Parquet file, a row group at a time; the file appears only when it is whole.

    Args:
        path: Where to.
        completions: Streamed.

    Returns:
        Number of rows.

    Raises:
        UserError: The file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = completion_schema()
    temporary = path.with_name(path.name + ".tmp")
    rows = 0
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for group in _groups(iter(completions)):
                columns = {name: [getattr(completion, name) for completion in group] for name in schema.names}
                writer.write_table(pa.Table.from_pydict(columns, schema=schema))
                rows += len(group)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path}: {error.strerror or error}. Is the disk full?") from error
    return rows


def _groups(completions: Iterator[Completion]) -> Iterator[list[Completion]]:
    while group := list(islice(completions, _ROW_GROUP)):
        yield group
