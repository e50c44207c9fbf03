"""Scores that were computed elsewhere, read from a file."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bvpo_stats.errors import UserError
from bvpo_stats.records import MODES
from bvpo_stats.sampling.rewards.base import Answer
from bvpo_stats.store.jsonl import read_jsonl


class FileReward:
    """Scores by (prompt_id, mode, sample_index), kept on disk so that memory does not grow with their number.

    Args:
        path: JSONL file of rows ``{"prompt_id", "mode", "sample_index", "reward"}``; ``pairs`` writes such a file
            itself. A reward of null, like a missing row, leaves the sample unscored.

    Raises:
        UserError: The file cannot be read, a row lacks a field, or a sample occurs twice; the line is named.
    """

    text_only = False

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise UserError(f"`reward='file:{path}'`: no such file. Give a JSONL file of scores.")
        self.identity = f"file:{path.name}@{_digest(path)}"
        self._folder = tempfile.TemporaryDirectory(prefix="bvpo-scores-")  # removed with this object
        self._database = sqlite3.connect(Path(self._folder.name) / "scores.sqlite", isolation_level=None)
        for pragma in ("journal_mode = off", "synchronous = off"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE scores (key TEXT PRIMARY KEY, reward REAL) WITHOUT ROWID")
        self._database.execute("BEGIN")
        for number, key, score in self._rows():
            try:
                self._database.execute("INSERT INTO scores VALUES (?, ?)", (key, score))
            except sqlite3.IntegrityError as error:
                raise UserError(f"{path}:{number}: a second score for the sample {key}. Remove one of them.") from error
        self._database.execute("COMMIT")

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The scores on file; None for a sample without one."""
        found = (
            self._database.execute("SELECT reward FROM scores WHERE key = ?", (answer.key,)).fetchone()
            for answer in answers
        )
        return [None if row is None else row[0] for row in found]

    def _rows(self) -> Iterator[tuple[int, str, float | None]]:
        for number, row in read_jsonl(self._path):
            where = f"{self._path}:{number}"
            missing = [name for name in ("prompt_id", "mode", "sample_index", "reward") if name not in row]
            if missing:
                raise UserError(
                    f"{where}: no field {', '.join(missing)}. A row needs prompt_id, mode, sample_index, reward."
                )
            reward = row["reward"]
            if row["mode"] not in MODES or isinstance(reward, (bool, str, list, dict)):
                raise UserError(f"{where}: mode must be thinking or nothinking, and reward a number or null.")
            if reward is not None and reward != reward:
                # SQLite would store NaN as NULL, i.e. as "no score"
                raise UserError(
                    f"{where}: the reward of {row['prompt_id']}/{row['mode']}/{row['sample_index']} is NaN."
                )
            yield number, f"{row['prompt_id']}/{row['mode']}/{row['sample_index']}", reward


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]
