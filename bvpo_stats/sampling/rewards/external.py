"""Rewards that come from the user: a Python function, or scores computed elsewhere and read from a file."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

from bvpo_stats.errors import UserError, shown
from bvpo_stats.progress import stages
from bvpo_stats.records import Completion, draw_key, record_fields
from bvpo_stats.sampling.rewards.base import Answer, in_words
from bvpo_stats.store.tables import fingerprint, read_rows

_FIELDS = record_fields(Completion)
_LARGEST = sys.float_info.max


class FunctionReward:
    """A Python function: ``function(question, answer) -> score``, or one in the convention of TRL's reward functions.

    The latter is known by its parameters and called once for many, as
    ``function(prompts=[...], completions=[...], gold=[...]) -> [score, ...]``. Answers are final answers, traces left
    out; a score of None leaves a response out. Scores must depend on nothing else.

    Args:
        function: The function, or ``module:function``, always in TRL's convention; the module is looked for in the
            working folder too.

    Raises:
        UserError: The module cannot be imported, or has no such function.
    """

    text_only = True

    def __init__(self, function: str | Callable[..., Any]) -> None:
        if isinstance(function, str):
            self._name, self._function, self._batched = function, _import(function), True
        else:
            self._name = getattr(function, "__qualname__", type(function).__name__)
            self._function, self._batched = function, _takes_lists(function)
        self.identity = f"{self._name}@{_fingerprint(self._function)}"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score per answer.

        Raises:
            UserError: The function fails, or returns something other than numbers.
        """
        try:
            if self._batched:
                scores = self._function(
                    prompts=[answer.prompt for answer in answers],
                    completions=[answer.text for answer in answers],
                    gold=[answer.gold for answer in answers],
                )
            else:
                scores = [self._function(answer.prompt, answer.text) for answer in stages(answers)]
            found = list(islice(scores, len(answers) + 1))  # a generator may never end; one too many is refused later
            return [None if score is None else _number(score) for score in found]
        except (
            Exception,
            SystemExit,
        ) as error:  # the function is the user's program; whatever it raises is about that program
            call = (
                "function(prompts=[...], completions=[...], gold=[...]) and must return a list of numbers or None"
                if self._batched
                else "function(question, answer) and must return a number or None"
            )
            raise UserError(f"`reward={self._name!r}` fails with {in_words(error)}. It is called as {call}.") from error


def _number(score: Any) -> float:
    """A score of any kind of number, arrays and tensors of one included."""
    if isinstance(score, (str, bytes, bytearray)):
        raise TypeError(f"a {type(score).__name__} where a number belongs")
    return float(score)


def _takes_lists(function: Callable[..., Any]) -> bool:
    try:
        return "completions" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return False


def _import(spec: str) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's program
        raise UserError(f"`reward={spec!r}`: cannot import {module_name} ({in_words(error)}).") from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"`reward={spec!r}`: the module {module_name} has no function {name!r}.")
    return function


def _fingerprint(function: Callable[..., Any]) -> str:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # built in, or defined where no source is kept
        source = repr(getattr(function, "__qualname__", ""))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


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
        self.identity = f"file:{path.name}@{fingerprint(path)[:12]}"
        self._folder = tempfile.TemporaryDirectory(prefix="bvpo-scores-")  # removed with this object
        self._database = sqlite3.connect(Path(self._folder.name) / "scores.sqlite", isolation_level=None)
        for pragma in ("journal_mode = off", "synchronous = off"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE scores (key TEXT PRIMARY KEY, reward REAL) WITHOUT ROWID")
        self._database.execute("BEGIN")
        where = ""
        for where, key, score in self._rows():
            try:
                self._database.execute("INSERT INTO scores VALUES (?, ?)", (key, score))
            except sqlite3.IntegrityError as error:
                raise UserError(f"{where}: a second score for the sample {key}. Remove one of them.") from error
        self._database.execute("COMMIT")
        if not where:
            raise UserError(f"`reward='file:{path}'` holds no scores.")

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The scores on file; None for a sample without one."""
        found = (
            self._database.execute("SELECT reward FROM scores WHERE key = ?", (answer.key,)).fetchone()
            for answer in answers
        )
        return [None if row is None else row[0] for row in found]

    def _rows(self) -> Iterator[tuple[str, str, float | None]]:
        for where, row in read_rows(self._path):
            missing = [name for name in ("prompt_id", "mode", "sample_index", "reward") if name not in row]
            if missing:
                raise UserError(
                    f"{where}: no field {', '.join(missing)}. A row needs prompt_id, mode, sample_index, reward."
                )
            prompt_id, mode = (_FIELDS[name].read(row[name], where) for name in ("prompt_id", "mode"))
            index, reward = row["sample_index"], row["reward"]
            if type(index) is not int or index != -1:  # the answer of a baseline, which no sampler drew
                index = _FIELDS["sample_index"].read(index, where)
            key = draw_key(prompt_id, mode, index)
            if isinstance(reward, bool) or not isinstance(reward, (int, float, NoneType)):
                raise UserError(f"{where}: field `reward` must be a number or null, not {shown(reward)}.")
            if reward is not None and not -_LARGEST <= reward <= _LARGEST:
                # SQLite would store NaN as NULL, i.e. as "no score"
                raise UserError(f"{where}: the reward of {key} is {shown(reward)}; it must be finite.")
            yield where, key, None if reward is None else float(reward)
