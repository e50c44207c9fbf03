"""The output folder of one run: its identity, its lock, its append-only files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bvpo_stats.data.jsonl import repair_tail, write_atomic
from bvpo_stats.errors import UserError

RUN_FILE = "run.json"


@contextmanager
def open_run(folder: Path, command: str, identity: dict[str, Any]) -> Iterator[Path]:
    """Creates or re-opens the folder of a run and holds its lock.

    A run is resumed only by the same command with the same ``identity``: everything that decides its numbers (model,
    prompts, seed, ...), and nothing that does not (device, batch size). Half-written last lines of its JSONL files are
    cut on the way in.

    Args:
        folder: The output folder.
        command: Name of the command, e.g. ``variance``.
        identity: JSON-ready description of what decides the results.

    Yields:
        The folder.

    Raises:
        UserError: The folder holds something else, belongs to a different run, or another process is writing to it.
    """
    identity = json.loads(json.dumps({"command": command, **identity}))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file. Name a folder.")
    path = folder / RUN_FILE
    if path.exists():
        _check_same_run(folder, path, identity)
    elif folder.exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise UserError(
            f"--output {folder} is not empty and holds no run of bvpo-stats. Nothing was overwritten; name a new folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"Cannot create {folder}: {error.strerror}. Check the path and its permissions.") from error
    with lock:
        _take_lock(lock, folder)
        if not path.exists():
            write_atomic(path, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        for file in folder.glob("*.jsonl"):
            if file.is_file():
                repair_tail(file)
        yield folder


def _check_same_run(folder: Path, path: Path, identity: dict[str, Any]) -> None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path} ({error}). Name a new --output folder.") from error
    differing = [
        f"{key}: {stored.get(key)!r} there, {identity.get(key)!r} now"
        for key in sorted(set(stored) | set(identity))
        if stored.get(key) != identity.get(key)
    ]
    if differing:
        raise UserError(
            f"--output {folder} belongs to a different run ({'; '.join(differing)}). "
            "Nothing was overwritten; name a new folder, or repeat the settings of the old run to resume it."
        )


def _take_lock(handle: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform; two writers remain the user's business
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"Another process is writing to {folder}. Wait for it, or name another folder.") from error
    handle.write(f"{os.getpid()}\n")
    handle.flush()
