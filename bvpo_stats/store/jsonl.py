"""JSON lines that survive a kill at any moment, atomic writes for everything else, and compact sets of keys."""

from __future__ import annotations

import codecs
import errno
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from bvpo_stats.errors import UserError
from bvpo_stats.progress import say
from bvpo_stats.records import half_character


def encode_row(row: dict[str, Any]) -> str:
    """One JSON line without its newline; NaN and infinities are refused (they are not JSON)."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def read_jsonl(path: Path, *, growing: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) for every non-empty line, in constant memory.

    Args:
        path: The file; a name that ends in ``.gz`` is decompressed.
        growing: Another process may be appending to it: a last line without its newline is not there yet, and left out.

    Raises:
        UserError: The file is missing, not UTF-8, or a line is not a JSON object, or not as `append_jsonl` wrote it;
            the line is named.
    """
    sums = LineSums.of(path)
    for number, raw in enumerate(_lines(path), start=1):
        if not raw.strip() or (growing and not raw.endswith(b"\n")):
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(raw.decode("utf-8"))
        except ValueError as error:
            raise _line_error(where, raw, error) from error
        except RecursionError:  # its traceback is as deep
            raise UserError(f"{where}: nested too deeply to be a record.") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON {type(row).__name__}, not an object. Write one object a line.")
        if _SURROGATE.search(raw):
            check_encodable(row, where)
        if sums is not None:
            sums.check(raw, where)
        yield number, row


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # as JSON escapes half a surrogate pair


def check_encodable(row: dict[str, Any], where: str) -> None:
    """Refuses lone surrogates, halves of a character that JSON can spell and no file can hold; names the field."""
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise half_character(where, name, error) from error


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """Reads a ``.json`` file that holds a list of objects, as AlpacaEval's answer files do.

    Raises:
        UserError: The file cannot be read, or is no list of objects; the entry is named.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON in UTF-8 ({error}). It must hold a list of objects.") from error
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to hold records.") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: a JSON {type(rows).__name__}, not a list of objects.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}[{number}]: a JSON {type(row).__name__}, not an object.")
        check_encodable(row, f"{path}[{number}]")
    return rows


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
            for number, line in enumerate(handle):
                yield line if number else line.removeprefix(codecs.BOM_UTF8)  # as some editors begin a file
    except EOFError as error:
        raise UserError(f"Cannot read {path}: its end is missing. Copy or download it again.") from error
    except (OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"Cannot read {path}: {reason}. Check the path.") from error


def _line_error(where: str, raw: bytes, error: ValueError) -> UserError:
    if raw.startswith(b"{") and not raw.endswith(b"\n"):
        return UserError(
            f"{where}: the last line is cut off; whoever wrote it was interrupted. Finish that run, or delete the line."
        )
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{where}: not valid UTF-8 (byte {error.start}). Save the file as UTF-8.")
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return UserError(f"{where}: not JSON ({reason}). Each line must be one JSON object (JSONL).")


def repair_tail(path: Path) -> bool:
    """Cuts a half-written last line, the trace of a kill during a write.

    Returns:
        Whether something was cut. Complete lines are never touched.
    """
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb+") as handle:
        size = handle.seek(0, os.SEEK_END)
        position = size
        while position > 0:
            step = min(1 << 16, position)
            position -= step
            handle.seek(position)
            block = handle.read(step)
            newline = block.rfind(b"\n")
            if newline >= 0:
                keep = position + newline + 1
                break
        else:
            keep = 0
        if keep == size:
            return False
        handle.truncate(keep)
    return True


class LineSums:
    """The checksums of a file's lines as they were written, in a hidden file beside it.

    A line that is not among them is damaged, and one that comes again is a copy: rows name their draw or prompt, so no
    two of a file are equal. A line is on record before it is in the file, so that a kill in between costs nothing.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        import numpy as np  # a quarter of a second, which --help has not

        self._file, self._sums = path, sums_file(path)
        self._known = self._read()
        self._met = np.zeros(len(self._known), dtype=bool)

    @classmethod
    def of(cls, path: Path) -> LineSums | None:
        """The checksums of a file; None where it has none, because somebody else wrote it."""
        return cls(path) if sums_file(path).is_file() else None

    def _read(self) -> Any:
        import numpy as np

        data = self._sums.read_bytes()
        return np.unique(np.frombuffer(data[: len(data) // _SUM_BYTES * _SUM_BYTES], dtype="<u8"))

    def admits(self, line: bytes) -> bool:
        """Whether a line is one of those that were written, met for the first time."""
        place = self._place(line)
        if place is None:  # another process may have appended meanwhile
            import numpy as np

            met, self._known = self._known[self._met], self._read()
            self._met = np.isin(self._known, met)
            place = self._place(line)
        if place is None or self._met[place]:
            return False
        self._met[place] = True
        return True

    def _place(self, line: bytes) -> int | None:
        import numpy as np

        wanted = np.frombuffer(line_sum(line), dtype="<u8")[0]
        place = int(np.searchsorted(self._known, wanted))
        return place if place < len(self._known) and self._known[place] == wanted else None

    def check(self, line: bytes, where: str) -> None:
        """Raises UserError for a line that `admits` refuses."""
        if not self.admits(line):
            raise UserError(
                f"{where}: the line is not as it was written, or comes twice. Run the command that wrote it again in "
                f"{self._file.parent}: it does such lines anew. If you changed it on purpose, delete {self._sums}."
            )


_SUM_BYTES = 8


def line_sum(line: bytes) -> bytes:
    """Checksum of a line, whatever ends it."""
    return hashlib.blake2b(line.rstrip(b"\r\n"), digest_size=_SUM_BYTES).digest()


def sums_file(path: Path) -> Path:
    """Where the checksums of a file's lines are."""
    return path.with_name(f".{path.name}.sums")


def mend(path: Path, *, ordered: bool = False) -> None:
    """Cuts lines that are damaged or come twice, and says so; whoever wrote them does them again.

    Args:
        path: The file.
        ordered: The order of its lines counts, so that all from the first such line on are cut.

    Raises:
        UserError: The file cannot be read or written.
    """
    sums = LineSums.of(path)
    if sums is None or not path.is_file():
        return
    bad: set[int] = set()
    for number, line in enumerate(_lines(path), start=1):
        if line.strip() and ((ordered and bad) or not sums.admits(line)):
            bad.add(number)
    if not bad:
        return
    temporary, first = path.with_name(path.name + ".tmp"), min(bad)
    try:
        with temporary.open("wb") as handle:
            handle.writelines(line for number, line in enumerate(_lines(path), start=1) if number not in bad)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    if ordered:
        say(f"{path}: line {first} is damaged or a copy; cut with the {len(bad) - 1} behind it, and done again.")
    else:
        say(f"{path}: {len(bad)} damaged or copied lines cut, the first of them line {first}; done again.")


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]], *, sums: bool = True) -> None:
    """Appends rows and forces them to disk; if the disk fills up, the file is left as it was before the call.

    Args:
        path: The file.
        rows: The rows, each different from all others of the file.
        sums: Keep checksums of the lines, so that damage is noticed; not for files that people edit.

    Raises:
        UserError: The disk is full or the file cannot be written.
    """
    lines = [encode_row(row).encode("utf-8") for row in rows]
    if not lines:
        return
    data = b"".join(line + b"\n" for line in lines)
    before = path.stat().st_size if path.is_file() else 0
    if sums:
        _append_sums(path, lines, new=not before)
    try:
        with path.open("ab", buffering=0) as handle:
            view = memoryview(data)
            while view:
                view = view[handle.write(view) :]
            os.fsync(handle.fileno())
    except OSError as error:
        if path.is_file() and path.stat().st_size > before:
            os.truncate(path, before)
        raise write_error(path, error) from error


def _append_sums(path: Path, lines: Sequence[bytes], *, new: bool) -> None:
    target = sums_file(path)
    try:
        if new:
            target.unlink(missing_ok=True)
        elif not target.exists():  # a file that had none so far
            target.write_bytes(b"".join(line_sum(line) for line in _lines(path) if line.strip()))
        with target.open("ab") as handle:
            handle.truncate(handle.tell() // _SUM_BYTES * _SUM_BYTES)  # a kill may have left half of one
            handle.write(b"".join(map(line_sum, lines)))
    except OSError as error:
        raise write_error(target, error) from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write whole, through a temporary one and a rename: readers see the old or the new, never half.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes a whole file; see `replacing`."""
    with replacing(path) as handle:
        handle.write(data.encode("utf-8") if isinstance(data, str) else data)


def write_sealed(path: Path, data: str) -> None:
    """As `write_atomic`, with a checksum in a hidden file beside it, so that a change is noticed (`is_altered`).

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    write_atomic(_seal(path), hashlib.sha256(data.encode()).hexdigest() + "\n")
    write_atomic(path, data)


def is_altered(path: Path) -> bool:
    """Whether a file is not as `write_sealed` wrote it; one without a checksum is somebody else's, and is not."""
    try:
        return _seal(path).read_text(encoding="ascii").strip() != sha256_of(path)
    except (OSError, ValueError):
        return False


def altered_words(path: Path) -> str:
    """What to tell a user about a file that `is_altered`."""
    return (
        f"{path} is not as it was written (its checksum differs). Run the same command again to have it rewritten; if "
        f"you changed it on purpose, delete {_seal(path)}."
    )


def _seal(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def write_error(path: Path, error: OSError) -> UserError:
    """What to tell a user about a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"Disk full while writing {path}. Free some space and run the same command again: it goes on where it "
            "stopped."
        )
    return UserError(f"Cannot write {path}: {error.strerror}. Check the folder's permissions.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says what went wrong while a library wrote to a file or folder, in words of `write_error`.

    Raises:
        UserError: The disk is full, or the file cannot be written.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise write_error(Path(error.filename) if isinstance(error.filename, str) else path, error) from error
    except Exception as error:  # torch, safetensors and SQLite have errors of their own for it
        words = str(error).lower()
        if not any(sign in words for sign in _FULL):
            raise
        raise write_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error


_FULL = ("no space left", "storagefull", "disk is full", "quota", "file too large", "filetoolarge", "file write failed",
         "unexpected pos", "iostream error")  # fmt: skip


class RowLog:
    """An append-only JSONL file whose rows are asked for in the same order by every run.

    What a killed run has finished is read back, in constant memory; what it has not is computed and appended. A portion
    that is partly on file is computed whole and only its missing rows are written, so every run does the same
    computations on the same batches.

    Args:
        path: The file; a half-written last line must have been cut (:func:`~bvpo_stats.store.jsonl.repair_tail`).
            Damaged rows are cut here, with all that follow.
    """

    def __init__(self, path: Path) -> None:
        mend(path, ordered=True)
        self._path = path
        self._stored: Iterator[tuple[int, dict[str, Any]]] = read_jsonl(path) if path.exists() else iter(())

    def rows(
        self, keys: Sequence[dict[str, Any]], compute: Callable[[], Sequence[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """The rows of the next portion of work.

        Args:
            keys: The fields that identify each row of the portion.
            compute: Gives the remaining fields of all of them; called only where some are not on file.

        Raises:
            UserError: The file holds other rows than these.
        """
        stored = list(islice(self._stored, len(keys)))
        for (number, row), key in zip(stored, keys, strict=False):
            if any(row.get(name) != value for name, value in key.items()):
                raise UserError(
                    f"{self._path}:{number}: expected the row of {'/'.join(map(str, key.values()))}. The file was "
                    "changed since the run began; delete it to compute it anew."
                )
        found = [row for _, row in stored]
        if len(found) < len(keys):
            computed = [{**key, **values} for key, values in zip(keys, compute(), strict=True)]
            append_jsonl(self._path, computed[len(found) :])
            found += computed[len(found) :]
        return found


def sha256_of(*paths: Path) -> str:
    """SHA-256 of files, one after the other, in constant memory."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


_DIGEST_BYTES = 16


class KeySet:
    """Immutable set of strings, kept as sorted 128-bit digests.

    Two keys share a digest with probability below 1e-20 among a billion of them.

    Args:
        keys: The members; duplicates count once. Streamed.

    >>> keys = KeySet(["a", "b", "a"])
    >>> len(keys), "a" in keys, "c" in keys
    (2, True, False)
    """

    def __init__(self, keys: Iterable[str]) -> None:
        digests = bytearray()
        for key in keys:
            digests += _digest(key)
        import numpy as np  # a quarter of a second, which --help has not

        self._digests = np.unique(np.frombuffer(digests, dtype=f"S{_DIGEST_BYTES}"))

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, key: str) -> bool:
        if not len(self._digests):
            return False
        import numpy as np  # a quarter of a second, which --help has not

        wanted = np.frombuffer(_digest(key), dtype=f"S{_DIGEST_BYTES}")
        place = int(np.searchsorted(self._digests, wanted)[0])
        return place < len(self._digests) and bool(self._digests[place] == wanted[0])


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest()
