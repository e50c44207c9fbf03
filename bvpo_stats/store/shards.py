"""Shards of a sampling run: which part of the prompts one process draws, and in which file it writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bvpo_stats.errors import UserError

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
