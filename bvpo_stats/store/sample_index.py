"""Samples by prompt, in constant memory: an on-disk index of where each response stands in its file.

Samples are written in the order in which they were drawn: batches of one mode, prompts of like length together, several
shards side by side. Whatever needs all responses of a prompt at once reads them through this index, in the order of
prompt ids, so its results do not depend on how a sampling run was cut, resumed or sharded.
"""

from __future__ import annotations

import json
import sqlite3
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from bvpo_stats.errors import UserError
from bvpo_stats.records import MODES, Completion, Mode, Truncation, Vocabulary, content_of, draw_key, from_dict
from bvpo_stats.store.jsonl import LineSums, sha256_of, writing
from bvpo_stats.store.run_folder import run_files

_CACHE_KIB = 64 * 1024
_TABLES = """
CREATE TABLE samples (
    prompt_id TEXT, mode INTEGER, sample_index INTEGER, file INTEGER, start INTEGER, bytes INTEGER, line INTEGER,
    PRIMARY KEY (prompt_id, mode, sample_index)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class SampleSource:
    """What all samples of an index have in common, and how many there are.

    Attributes:
        model: Identity of the model that wrote them, None where they do not say.
        template: Name of the template protocol, likewise.
        engine: Name of the engine of the first one, likewise.
        n_prompts: Prompts with a response in one of the wanted modes.
        n_responses: Responses in the wanted modes.
        half_written: Half-written last lines that were passed over, the trace of a kill during sampling.
        truncation: How many of the responses in each wanted mode have no answer.
    """

    model: str | None
    template: str | None
    engine: str | None
    n_prompts: int
    n_responses: int
    half_written: int
    truncation: dict[Mode, Truncation]

    def check_sampling_model(self, identity: str) -> None:
        """Refuses a policy that did not draw these samples; a server's name for its model cannot be checked.

        Args:
            identity: Identity of the policy (:attr:`bvpo_stats.model.policy.Policy.identity`).

        Raises:
            UserError: It is another model.
        """
        check_sampling_model(self.engine, self.model, identity)


def check_sampling_model(engine: str | None, model: str | None, identity: str) -> None:
    """Refuses a policy that did not draw some samples; a server's name for its model cannot be checked.

    Args:
        engine: Who drew them.
        model: The model they name.
        identity: Identity of the policy (:attr:`bvpo_stats.model.policy.Policy.identity`).

    Raises:
        UserError: It is another model.
    """
    known = engine == "transformers" or (engine == "vllm" and "@" in str(model) and "@" in identity)
    if known and content_of(identity) != content_of(model):
        raise UserError(
            f"The samples were drawn by {model}, but `model` is {identity}. Reference log-probabilities and "
            "traces need the sampling model: give the same `model` and `adapter` as in sampling."
        )


class SampleIndex:
    """Random access to the responses of a prompt. Made by :func:`open_sample_index`."""

    def __init__(
        self,
        database: sqlite3.Connection,
        files: Sequence[tuple[Path, BinaryIO]],
        source: SampleSource,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._database = database
        self._files = files
        self.source = source

    def prompt_ids(self) -> Iterator[str]:
        """All prompts, in the order of their ids."""
        last = ""
        query = "SELECT DISTINCT prompt_id FROM samples WHERE prompt_id > ? ORDER BY prompt_id LIMIT 512"
        while page := [row[0] for row in self._database.execute(query, (last,))]:
            yield from page
            last = page[-1]

    def completions(self, prompt_id: str) -> list[Completion]:
        """Responses to one prompt, by mode (thinking first) and sample index.

        Raises:
            UserError: A line is not a completion record; the line is named.
        """
        query = "SELECT file, start, bytes, line FROM samples WHERE prompt_id = ? ORDER BY mode, sample_index"
        found = []
        for file, start, length, line in self._database.execute(query, (prompt_id,)):
            path, handle = self._files[file]
            handle.seek(start)
            found.append(from_dict(Completion, json.loads(handle.read(length)), f"{path}:{line}", self._vocabulary))
        return found

    def windows(self, prompts: int = 256) -> Iterator[list[list[Completion]]]:
        """The responses of ``prompts`` prompts at a time, one list per prompt."""
        stream = self.prompt_ids()
        while window := list(islice(stream, prompts)):
            yield [self.completions(prompt_id) for prompt_id in window]


@contextmanager
def open_sample_index(
    samples: Path, database: Path, modes: Sequence[Mode] = MODES, vocabulary: Vocabulary | None = None
) -> Iterator[SampleIndex]:
    """Indexes the samples of a folder; the index is removed on the way out.

    Args:
        samples: Folder of a sampling run (or one samples file).
        database: Where the index goes: a file on a real disk. About 100 bytes per response.
        modes: Which responses count.
        vocabulary: Of the model that the token ids are for.

    Yields:
        The index.

    Raises:
        UserError: No samples there, a line that is no sample, the same draw twice, or records of several models or
            templates; the line is named.
    """
    paths = sample_files(samples)
    database.unlink(missing_ok=True)
    with ExitStack() as stack:
        with writing(database):
            connection = sqlite3.connect(database, isolation_level=None)
            stack.callback(database.unlink, missing_ok=True)
            stack.callback(connection.close)
            for pragma in ("journal_mode = off", "synchronous = off", f"cache_size = -{_CACHE_KIB}"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute(_TABLES)
            source = _fill(connection, paths, samples, modes)
        files = [(path, stack.enter_context(path.open("rb"))) for path in paths]
        yield SampleIndex(connection, files, source, vocabulary)


def sample_files(samples: Path) -> list[Path]:
    """The sample files of a folder: ``samples.jsonl``, and those of shards.

    Raises:
        UserError: There are none.
    """
    if samples.is_file():
        return [samples]
    if not samples.exists():
        raise UserError(f"`samples={str(samples)!r}`: no such folder. Give the `output` folder of `bvpo-stats sample`.")
    paths = run_files(samples, "samples.jsonl")
    if not paths:
        raise UserError(
            f"`samples={str(samples)!r}`: no samples.jsonl there, so it is not the folder of a sampling run. Give the "
            "`output` folder of `bvpo-stats sample`."
        )
    return paths


def samples_fingerprint(samples: Path) -> str:
    """Identity of a samples folder: the content of its files."""
    paths = sample_files(samples)
    try:
        return sha256_of(*paths)[:16]
    except OSError as error:
        raise UserError(f"Cannot read {error.filename}: {error.strerror}. Check `samples`.") from error


@dataclass(frozen=True)
class _Line:
    path: Path
    file: int
    number: int
    start: int
    raw: bytes

    @property
    def where(self) -> str:
        return f"{self.path}:{self.number}"


def _fill(connection: sqlite3.Connection, paths: Sequence[Path], samples: Path, modes: Sequence[Mode]) -> SampleSource:
    first: dict[str, str | None] = {}
    half_written = count = 0
    sums = [LineSums.of(path) for path in paths]
    truncation = {mode: Truncation() for mode in MODES if mode in modes}
    connection.execute("BEGIN")
    for line in _lines(paths):
        row = _parse(line)
        if row is None:
            half_written += 1
            continue
        if (known := sums[line.file]) is not None:
            known.check(line.raw, line.where)
        _check_same_source(row, line, first)
        if row["mode"] not in modes:
            continue
        count += 1
        truncation[row["mode"]] = truncation[row["mode"]].count(row["finish_reason"], row["answer_start"])
        key = (row["prompt_id"], MODES.index(row["mode"]), row["sample_index"])
        try:
            connection.execute(
                "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*key, line.file, line.start, len(line.raw), line.number),
            )
        except sqlite3.IntegrityError as error:
            raise UserError(f"{line.where}: {_twice(connection, paths, row, key)}") from error
    connection.execute("COMMIT")
    if not count:
        raise UserError(f"`samples={str(samples)!r}`: no responses in {' or '.join(modes)} mode there.")
    prompts = connection.execute("SELECT COUNT(*) FROM (SELECT DISTINCT prompt_id FROM samples)").fetchone()[0]
    return SampleSource(first["model"], first["template"], first["engine"], prompts, count, half_written, truncation)


def _lines(paths: Sequence[Path]) -> Iterator[_Line]:
    for file, path in enumerate(paths):
        start = 0
        try:
            with path.open("rb") as handle:
                for number, raw in enumerate(handle, start=1):
                    if raw.strip():
                        yield _Line(path, file, number, start, raw)
                    start += len(raw)
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error.strerror}. Check the path.") from error


def _parse(line: _Line) -> dict[str, Any] | None:
    """The fields of a line that the index needs; None for a half-written last line."""
    try:
        row = json.loads(line.raw.decode("utf-8"))
    except ValueError as error:
        if not line.raw.endswith(b"\n"):
            return None  # only a last line lacks its newline, and only a kill during its write leaves half of it
        raise UserError(f"{line.where}: not JSON in UTF-8. Each line must be one sample (JSONL).") from error
    text: Any = (str, types.NoneType)
    wanted = {"prompt_id": str, "mode": str, "sample_index": int, "model": text, "template": text, "engine": text}
    bad = [name for name, kind in wanted.items() if not isinstance(row, dict) or not isinstance(row.get(name), kind)]
    if bad or row["mode"] not in MODES or not row["prompt_id"]:
        raise UserError(
            f"{line.where}: not a sample (check {', '.join(bad or ['mode', 'prompt_id'])}). Give the `output` folder "
            "of `bvpo-stats sample`; responses from elsewhere go through its file engine first."
        )
    return {name: row.get(name) for name in (*wanted, "finish_reason", "answer_start")}


def _check_same_source(row: dict[str, Any], line: _Line, first: dict[str, str | None]) -> None:
    for name in ("model", "template", "engine"):
        value = row[name]
        if first.setdefault(name, value) != value and name != "engine":
            raise UserError(
                f"{line.where}: samples of several {name}s are mixed: {first[name]} before, {value} here. "
                f"Keep one folder for each {name}."
            )


def _twice(connection: sqlite3.Connection, paths: Sequence[Path], row: dict[str, Any], key: tuple[object, ...]) -> str:
    file, number = connection.execute(
        "SELECT file, line FROM samples WHERE (prompt_id, mode, sample_index) = (?, ?, ?)", key
    ).fetchone()
    name = draw_key(row["prompt_id"], row["mode"], row["sample_index"])
    return f"the sample {name} occurs twice (first at {paths[file]}:{number}). Remove one of them."
