"""Records in and out: JSONL, gzipped JSONL, JSON lists, Parquet, datasets, folders of runs. One reader for all.

Everything streams. Errors name the file, the line and the field.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, overload

from bvpo_stats.embedded.assets import EMBEDDED, embedded_prompts, embedded_records
from bvpo_stats.errors import UserError, check_choice, check_kind, rows_of
from bvpo_stats.records import (
    MODES,
    Completion,
    Message,
    Mode,
    PreferencePair,
    Prompt,
    Record,
    RecordT,
    TraceRecord,
    Vocabulary,
    arrow_schema,
    chat_turns,
    from_dict,
    record_fields,
    record_kind,
    to_dict,
)
from bvpo_stats.store.jsonl import encode_row, read_json_list, read_jsonl, sha256_of, sums_file, write_error
from bvpo_stats.store.run_folder import run_files

Source = str | os.PathLike[str] | Iterable[Any]
"""A path, the word ``embedded``, a ``datasets.Dataset``, or any iterable of rows and records."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_STEMS: dict[type[Record], tuple[str, ...]] = {
    PreferencePair: ("thinking", "nothinking"),
    TraceRecord: ("traces",),
    Completion: ("samples",),
    Prompt: ("prompts",),
}
_ROWS = 512  # of a row group: bounds memory
_HUB_FILE = "hf://"


@overload
def read_records(
    source: Source,
    kind: type[RecordT],
    *,
    mode: Mode | None = None,
    name: str = "source",
    vocabulary: Vocabulary | None = None,
) -> Iterator[RecordT]: ...
@overload
def read_records(
    source: Source,
    kind: None = None,
    *,
    mode: Mode | None = None,
    name: str = "source",
    vocabulary: Vocabulary | None = None,
) -> Iterator[Any]: ...
def read_records(
    source: Source,
    kind: type[Any] | None = None,
    *,
    mode: Mode | None = None,
    name: str = "source",
    vocabulary: Vocabulary | None = None,
) -> Iterator[Any]:
    """Streams records.

    Args:
        source: A ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, the folder of a run (its ``thinking``, ``nothinking``,
            ``traces`` or ``samples`` file, with all shards), a ``datasets.Dataset`` or the folder it was saved to, an
            iterable of rows, or ``embedded``: the records that ship with the package.
        kind: The record type; when None, what the first row looks like (in a folder: pairs, else traces, else samples).
        mode: Of a folder of pairs, only the file of this mode.
        name: What errors call the source.
        vocabulary: Of the model that the records are for; token ids are checked against it.

    Raises:
        UserError: Nothing there, a row that is no such record; file, line and field are named.
    """
    if kind is not None and kind not in list(_STEMS):
        known = ", ".join(sorted(known.__name__ for known in _STEMS))
        raise UserError(f"`kind` must be a record type ({known}), not {kind!r}.")
    for where, row in read_rows(source, kind, mode=mode, name=name):
        if not isinstance(row, Mapping):
            expected: tuple[type, ...] = tuple(_STEMS) if kind is None else (kind,)
            check_kind(where, row, expected, f"a {'record' if kind is None else kind.__name__} or a row of columns")
            yield row if vocabulary is None else vocabulary.checked(row, where)
            continue
        found: Any = kind or record_kind(dict(row))
        if found is None:
            hint = " TRL's columns become pairs by `as_pairs`." if {"chosen", "rejected"} <= row.keys() else ""
            raise UserError(
                f"{where}: neither a pair, a trace, a completion nor a prompt (fields: {', '.join(row) or 'none'})."
                + hint
            )
        yield from_dict(found, dict(row), where, vocabulary)


def read_rows(
    source: Source, kind: type[Record] | None = None, *, mode: Mode | None = None, name: str = "source"
) -> Iterator[tuple[str, Any]]:
    """Streams (place for errors, row) of a source of :func:`read_records`, whatever columns it has.

    Raises:
        UserError: Nothing there, or unreadable; a bad line is named.
    """
    if mode is not None:
        check_choice("mode", mode, MODES)
    if not isinstance(source, (str, os.PathLike)):
        # NumPy's and torch's formats of a dataset round to float32
        rows = rows_of(name, source.with_format(None) if hasattr(source, "with_format") else source)
        yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    if str(source) == EMBEDDED and kind is Prompt:
        yield from ((f"{name}, prompt {number}", prompt) for number, prompt in enumerate(embedded_prompts(), start=1))
        return
    for path in record_paths(source, kind, mode=mode, name=name):
        yield from _path_rows(path, name)


def record_paths(
    source: str | os.PathLike[str], kind: type[Record] | None = None, *, mode: Mode | None = None, name: str = "source"
) -> list[Path]:
    """The files (or saved dataset's folder) behind a source on disk; see :func:`read_records`.

    Raises:
        UserError: They are not there.
    """
    if str(source) == EMBEDDED:
        folder = embedded_records()
        stems: Sequence[str] = _stems(kind, mode)
        paths = [path for stem in stems if (path := _in_folder(folder, stem))]
        if not paths:
            raise UserError(
                f"`{name}`: this installation has no embedded {stems[0]} records; install the package again."
            )
        return paths
    given = Path(source).expanduser()
    if given.is_file():
        return [given]
    if not given.is_dir():
        stem = _stems(kind, mode)[0]
        raise UserError(
            f"`{name}={str(source)!r}`: no such file. Give a {stem}.jsonl, or the folder of the run that made it."
        )
    if is_saved_dataset(given):
        return [given]
    for known in [kind] if kind is not None else list(_STEMS):
        paths = []
        for stem in _stems(known, mode):
            paths += run_files(given, f"{stem}.jsonl") or [p for p in [_in_folder(given, stem)] if p is not None]
        if paths:
            return paths
    wanted = " or ".join(f"{stem}.jsonl" for stem in _stems(kind, mode))
    raise UserError(f"`{name}={str(source)!r}`: the folder holds no {wanted}.")


def _stems(kind: type[Record] | None, mode: Mode | None) -> tuple[str, ...]:
    stems = _STEMS[kind or PreferencePair]
    return tuple(stem for stem in stems if stem == mode) or stems


def _in_folder(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None)


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets`` saved a dataset to this folder."""
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def _path_rows(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.is_dir():
        yield from dataset_rows(str(path), "train", name)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".json":
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(read_json_list(path), start=1))
    else:
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"Cannot read {path} ({str(error).splitlines()[0]}). Is it a Parquet file?") from error


def source_rows(
    source: str, split: str, name: str = "prompts", *, config_name: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams the rows of a file or of any dataset, each with its place for error messages.

    Args:
        source: A file of :func:`read_records`, a ``.json`` file with a list of objects, a single file on the hub
            (``hf://datasets/OWNER/NAME/PATH.json``), or whatever ``datasets.load_dataset`` accepts.
        split: Split of a dataset.
        name: What errors call the source.
        config_name: Configuration of a dataset that has several.

    Raises:
        UserError: Missing or unreadable source, or a configuration of what has none.
    """
    path = Path(source)
    if path.is_file() and path.suffix != ".arrow":
        if config_name is not None:
            raise UserError(f"`config_name={config_name!r}` is for datasets with several; {source} is a file.")
        yield from _path_rows(path, name)
    else:
        yield from dataset_rows(source, split, name, config_name)


def dataset_rows(
    source: str, split: str, name: str, config_name: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams the rows of a saved dataset's folder, a file or dataset on the hub, or a folder of data files."""
    path = Path(source)
    looks_like_a_path = source.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json", ".parquet", ".txt")
    if not path.exists() and looks_like_a_path and not source.startswith(_HUB_FILE):
        raise UserError(f"The file {source} does not exist. Check `{name}`.")
    import datasets

    number = 0
    try:
        rows: Iterable[Any]
        if path.is_file():
            rows = datasets.Dataset.from_file(str(path))
        elif source.startswith(_HUB_FILE):
            rows = datasets.load_dataset("json", data_files=source, split="train")
        elif is_saved_dataset(path):
            loaded = datasets.load_from_disk(str(path))
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(source, config_name, split=split, streaming=True)
        for row in rows:  # a streamed dataset may only now notice that it is none
            number += 1
            yield f"{source}[{number}]", dict(row)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if config_name is None and "config name" in reason.lower():
            reason = f"{reason} Choose one with `config_name`."
        raise UserError(
            f"Cannot load `{name}` {source!r} (split {split!r}): {reason} "
            "Give a JSONL file with one object a line, or a dataset that `datasets` can load."
        ) from error


def write_records(
    path: str | os.PathLike[str],
    records: Iterable[Record],
    kind: type[Record] | None = None,
    *,
    without: Sequence[str] = (),
) -> int:
    """Writes records as ``.jsonl``, ``.jsonl.gz`` or ``.parquet``; the file appears only when it is whole.

    Parquet has one column per field, TRL's ``prompt``, ``chosen`` and ``rejected`` first.

    Args:
        path: Where to; its name decides the format.
        records: Streamed.
        kind: Their type; that of the first when None.
        without: Fields to leave out of a Parquet file.

    Returns:
        Number of records.

    Raises:
        UserError: The file cannot be written, its name has another suffix, or no record says what it should hold.
    """
    check_kind("path", path, (str, os.PathLike), "a path")
    target, stream = Path(path).expanduser(), rows_of("records", records)
    if not target.name.endswith(SUFFIXES):
        raise UserError(f"Cannot write {target}: name a file that ends in {', '.join(SUFFIXES)}.")
    first = list(islice(stream, 1))
    kind = kind or (type(first[0]) if first else None)
    known = ", ".join(sorted(each.__name__ for each in _STEMS))
    if kind is not None and kind not in list(_STEMS):
        raise UserError(f"`records` must be of one type of record ({known}), not {kind.__name__}.")

    def checked() -> Iterator[Record]:
        for number, record in enumerate(chain(first, stream), start=1):
            if kind is not None:
                check_kind(f"records, row {number}", record, kind, f"a {kind.__name__} like the rest")
            yield record

    temporary = target.with_name(target.name + ".tmp")
    count = 0
    try:
        if target.suffix == ".parquet":
            if kind is None:
                raise UserError(f"Cannot write {target}: there are no records, so its columns are unknown.")
            count = _write_parquet(temporary, checked(), kind, without)
        else:
            with temporary.open("wb") as raw:
                compressed = gzip.GzipFile("", "wb", mtime=0, fileobj=raw) if target.suffix == ".gz" else None
                handle = compressed or raw
                for record in checked():
                    handle.write(f"{encode_row(to_dict(record))}\n".encode())
                    count += 1
                if compressed is not None:
                    compressed.close()
                raw.flush()
                os.fsync(raw.fileno())
        temporary.replace(target)
        sums_file(target).unlink(missing_ok=True)  # of what stood there before
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_parquet(path: Path, records: Iterator[Record], kind: type[Record], without: Sequence[str]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = [name for name in ("prompt", "chosen", "rejected") if kind is PreferencePair]
    columns = [*first, *(name for name in record_fields(kind) if name not in (*first, *without))]
    schema = arrow_schema(kind, columns)
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(records, _ROWS)):
            values = {name: [_cell(getattr(record, name)) for record in group] for name in columns}
            writer.write_table(pa.Table.from_pydict(values, schema=schema))
            count += len(group)
    return count


def _cell(value: Any) -> Any:
    """A value as Arrow takes it: turns of a conversation as mappings."""
    turns = isinstance(value, tuple) and bool(value) and isinstance(value[0], Message)
    return chat_turns(value) if turns else value


def fingerprint(path: Path, name: str = "source") -> str:
    """SHA-256 of a file (of a saved dataset's Arrow files), 16 hex digits, in constant memory.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return sha256_of(*(sorted(path.rglob("*.arrow")) if path.is_dir() else [path]))[:16]
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check `{name}`.") from error
