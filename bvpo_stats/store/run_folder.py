"""The output folder of one run: its identity, its locks, its append-only files, and the shards that share it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bvpo_stats.errors import UserError
from bvpo_stats.progress import spoken_bytes
from bvpo_stats.records import content_of
from bvpo_stats.store.jsonl import repair_tail, sha256_of, write_atomic

_SHARD = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count`` of a run; the default is the whole run.

    The prompts are cut into windows (:func:`bvpo_stats.sampling.sample.window_size`) and dealt out in turn. Batches
    never cross a window, so a shard draws the very batches that one process would draw, whatever ``count`` is.

    Attributes:
        index: 1 .. count.
        count: Number of shards.
    """

    index: int = 1
    count: int = 1

    @property
    def whole(self) -> bool:
        """Whether this is the entire run."""
        return self.count == 1

    @property
    def suffix(self) -> str:
        """What sets the shard's files apart: empty for the whole run, else e.g. ``-00001-of-00004``."""
        return "" if self.whole else f"-{self.index:05d}-of-{self.count:05d}"

    def file(self, folder: Path, name: str) -> Path:
        """The shard's own version of a file, e.g. ``samples.jsonl`` becomes ``samples-00001-of-00004.jsonl``."""
        stem, dot, extension = name.partition(".")
        return folder / f"{stem}{self.suffix}{dot}{extension}"

    def owns(self, window: int) -> bool:
        """Whether window number ``window`` (from 0) belongs to this shard."""
        return window % self.count == self.index - 1

    def share(self, n_prompts: int, window: int) -> int:
        """How many of ``n_prompts`` prompts fall to this shard when windows hold ``window`` prompts."""
        starts = range((self.index - 1) * window, n_prompts, self.count * window)
        return sum(min(window, n_prompts - start) for start in starts)


WHOLE = Shard()


def parse_shard(value: str) -> Shard:
    """Reads ``--shard i/n``.

    Raises:
        UserError: Not of that form, or ``i`` is not among 1 .. n.

    >>> parse_shard("2/4").suffix
    '-00002-of-00004'
    """
    match = _SHARD.fullmatch(value.strip())
    if match is None:
        raise UserError(f"`shard={value!r}`: give i/n, e.g. 1/4 for the first of four.")
    index, count = int(match[1]), int(match[2])
    if not 1 <= index <= count:
        raise UserError(f"`shard={value!r}`: shards are numbered 1 to {max(count, 1)}.")
    return Shard(index, count)


def run_files(folder: Path, name: str) -> list[Path]:
    """Every version of a file in a run's folder, sorted by name: the whole run's and those of all shards.

    Args:
        folder: Folder of the run.
        name: Name in an unsharded run, e.g. ``samples.jsonl``.
    """
    stem, dot, extension = name.partition(".")
    shard = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?{re.escape(dot + extension)}")
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if shard.fullmatch(path.name) and path.is_file())


try:
    import fcntl
except ImportError:  # no advisory locks on this platform; two writers remain the user's business
    fcntl = None  # type: ignore[assignment]

RUN_FILE = "run.json"
_LOCK = ".lock"
_SETUP_LOCK = ".lock-setup"


@contextmanager
def open_run(
    folder: Path, command: str, identity: dict[str, Any], *, shard: Shard = WHOLE, growing: Iterable[str] = ()
) -> Iterator[Path]:
    """Creates or re-opens the folder of a run and holds its lock.

    A run is resumed only by the same command with the same ``identity``: everything that decides its numbers (model,
    prompts, seed, ...), and nothing that does not (device, batch size). Half-written last lines of the JSONL files that
    this process writes are cut on the way in. Shards of one run may share the folder, each with its own files and lock.

    Args:
        folder: The output folder.
        command: Name of the command, e.g. ``variance``.
        identity: JSON-ready description of what decides the results.
        shard: Which part of the run this process does.
        growing: Names of the identity that may differ where the run has more to do now than before, e.g. ``prompts``.
            Whoever gives some calls :func:`grow` once it has seen that what was there is a part of what is there now.

    Yields:
        The folder.

    Raises:
        UserError: The folder holds something else, belongs to a different run, or another process is writing to it.
    """
    identity = json.loads(json.dumps({"command": command, **identity}))
    growing = set(growing)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`output={str(folder)!r}` is a file. Name a folder.")
    _check_contents(folder, identity, growing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create {folder}: {error.strerror}. Check the path and its permissions.") from error
    with ExitStack() as locks:
        with _open_lock(folder, _SETUP_LOCK) as setup:
            _lock(setup, wait=True)  # two shards may set the folder up at the same moment
            _check_contents(folder, identity, growing)
            _take_locks(folder, shard, locks)
            if not (folder / RUN_FILE).exists():
                write_atomic(folder / RUN_FILE, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        for file in folder.glob(f"*{shard.suffix}.jsonl"):
            if file.is_file():
                repair_tail(file)
        yield folder


def grow(
    folder: Path, identity: dict[str, Any], growing: Iterable[str], contained: Callable[[dict[str, Any]], bool]
) -> bool:
    """Puts on record that a run has more to do now than before, where it has.

    Args:
        folder: Folder of the run, open.
        identity: What decides the results now.
        growing: As in :func:`open_run`.
        contained: From the identity on record: whether what was to do then is a part of what is to do now, unchanged.

    Returns:
        Whether it has.

    Raises:
        UserError: What was there has changed: it is another run.
    """
    path = folder / RUN_FILE
    stored = json.loads(path.read_text(encoding="utf-8"))
    now = stored | json.loads(json.dumps({name: identity[name] for name in growing}))
    if not differences(stored, now):
        return False
    if not contained(stored):
        raise _different_run(folder, differences(stored, now))
    write_atomic(path, json.dumps(now, indent=2, ensure_ascii=False) + "\n")
    return True


def _check_contents(folder: Path, identity: dict[str, Any], growing: set[str]) -> None:
    path = folder / RUN_FILE
    # Listed before run.json is looked for: a run writes run.json first, so if it is still missing after other files
    # were seen, they are no run's. The other way round, a shard that starts meanwhile would look like a stranger.
    strangers = folder.exists() and any(not _is_ours(file.name) for file in folder.iterdir())
    if path.exists():
        _check_same_run(folder, path, identity, growing)
    elif strangers:
        raise UserError(
            f"`output={str(folder)!r}` is not empty and holds no run of bvpo-stats. Nothing was overwritten; name "
            "a new folder."
        )


def _is_ours(name: str) -> bool:
    """Files that a run killed during its set-up leaves behind."""
    return name.startswith(_LOCK) or name == f"{RUN_FILE}.tmp"


def _different_run(folder: Path, differing: str) -> UserError:
    return UserError(
        f"`output={str(folder)!r}` belongs to a different run ({differing}). "
        "Nothing was overwritten; name a new folder, or repeat the settings of the old run to resume it."
    )


def _check_same_run(folder: Path, path: Path, identity: dict[str, Any], growing: set[str]) -> None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path} ({error}). Name a new `output` folder.") from error
    if isinstance(stored, dict) and growing <= set(stored):
        identity = identity | {name: stored[name] for name in growing}
    differing = differences(stored, identity)
    if differing:
        raise _different_run(folder, differing)


def differences(stored: Any, now: dict[str, Any], name: str = "") -> str:
    """What tells two identities apart, in words: ``seed: 0 there, 1 now``; empty where nothing does.

    >>> differences({"seed": 0, "lora": {"r": 8, "alpha": 16}}, {"seed": 0, "lora": {"r": 8, "alpha": 32}})
    'lora.alpha: 16 there, 32 now'
    """
    if not isinstance(stored, dict):
        stored = {}
    found = []
    for key in sorted(set(stored) | set(now)):
        there, here = stored.get(key), now.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            found.append(differences(there, here, f"{name}{key}."))
        elif content_of(there) != content_of(here) or (key in stored) != (key in now):
            found.append(
                f"{name}{key}: {repr(there) if key in stored else 'not recorded'} there, "
                f"{repr(here) if key in now else 'none'} now"
            )
    return "; ".join(filter(None, found))


SEAL = "checksums.json"
"""Checksums of the files of a finished folder, written last."""


def seal_folder(folder: Path) -> None:
    """Writes size and SHA-256 of every file of a folder into it: from now on, damage is noticed.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / SEAL
    }
    write_atomic(folder / SEAL, json.dumps(files, indent=1) + "\n")


def folder_damage(folder: Path) -> str | None:
    """What is wrong with a folder that was sealed; None where every file is as it was written.

    A folder without a seal was never finished.
    """
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{SEAL} is missing: it was never finished"
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return f"{SEAL} cannot be read"
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
            if sha256_of(path) != digest:
                return f"{name} is not as it was written (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def check_room(folder: Path, size: float) -> str:
    """What files will take on disk and what is free there, in words.

    Args:
        folder: The run's folder.
        size: Bytes that are going to be written.

    Raises:
        UserError: They do not fit.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"This run writes about {spoken_bytes(size)} to {folder}, where {spoken_bytes(free)} are free. Free some "
            "space, or name an `output` folder on a larger disk."
        )
    return f"about {spoken_bytes(size)} on disk ({spoken_bytes(free)} free)"


def _take_locks(folder: Path, shard: Shard, held: ExitStack) -> None:
    """The whole run excludes everybody; shards exclude the whole run, themselves, and shards of another count."""
    run = held.enter_context(_open_lock(folder, _LOCK))
    if not _lock(run, shared=not shard.whole):
        raise UserError(f"Another process is writing to {folder}. Wait for it, or name another folder.")
    if shard.whole:
        return
    for path in folder.glob(f"{_LOCK}-*-of-*"):
        if not path.name.endswith(f"-of-{shard.count:05d}"):
            with _open_lock(folder, path.name) as other:
                if not _lock(other):
                    raise UserError(
                        f"Another process is writing shard{path.name.removeprefix(_LOCK)} to {folder}. "
                        "Shards of one folder must agree on their number."
                    )
    own = held.enter_context(_open_lock(folder, _LOCK + shard.suffix))
    if not _lock(own):
        raise UserError(
            f"Another process is writing shard {shard.index}/{shard.count} to {folder}. Wait for it, or give another "
            "shard."
        )


def _open_lock(folder: Path, name: str) -> IO[str]:
    try:
        return (folder / name).open("a")
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}. Check its permissions.") from error


def _lock(handle: IO[str], *, shared: bool = False, wait: bool = False) -> bool:
    """Takes an advisory lock that ends with the process; False where somebody else holds it."""
    if fcntl is None:
        return True
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, mode if wait else mode | fcntl.LOCK_NB)
    except OSError:
        return False
    if not shared and not wait:
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")  # for whoever wonders which process it is
        handle.flush()
    return True
