"""Progress of long work: what it will take is said before it begins; then a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TypeVar

from bvpo_stats.errors import wording

Item = TypeVar("Item")

_LINE_EVERY_SECONDS = 30.0
_LINE_AT_SHARES = 10  # and at every tenth of the work, but no line sooner than this after another:
_LINES_APART_SECONDS = 5.0


def say(line: str) -> None:
    """One line on stderr about what a run is going to do; of several processes, the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(wording.get()(line), file=sys.stderr, flush=True)


def spoken_bytes(size: float) -> str:
    """A size in words.

    >>> spoken_bytes(900), spoken_bytes(1_130_000_000)
    ('900 bytes', '1.1 GB')
    """
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.1f} {unit}"
    return f"{size:.0f} bytes"


def spoken_seconds(seconds: float) -> str:
    """A time in words.

    >>> spoken_seconds(42), spoken_seconds(700), spoken_seconds(9_000), spoken_seconds(200_000)
    ('42 s', '12 min', '2.5 h', '2.3 days')
    """
    for unit, one, most in (("s", 1, 100), ("min", 60, 100 * 60), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return f"{seconds / one:.1f} {unit}" if unit == "h" else f"{seconds / one:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"


@dataclass
class _Course:
    """How far some work has got."""

    description: str
    total: int
    unit: str
    done: int
    show: Callable[[_Course], None]
    started: float = 0.0
    finished: int = 0
    in_hand: float = 0.0
    stages: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 1.0)])

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def advance(self, count: int) -> None:
        self.finished += count
        self.in_hand = 0.0
        self.show(self)

    @property
    def reached(self) -> float:
        """Units behind us, those of earlier runs included."""
        return min(self.done + self.finished + self.in_hand, float(self.total))

    @property
    def pace(self) -> str:
        """The rate, and from it the time left."""
        rate = (self.finished + self.in_hand) / max(time.monotonic() - self.started, 1e-9)
        if not rate:
            return ""
        shown = f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{spoken_seconds(1 / rate)} for one"
        return f", {shown}, {spoken_seconds((self.total - self.reached) / rate)} left"


_open: list[_Course] = []  # the innermost course is the last


def within(share: float) -> None:
    """Says how much of the stage in hand is done, 0 to 1: of the batch (`in_hand`), or of a part of it (`stages`).

    Nothing of it is on record yet, so what is shown says "about"; it never goes back.
    """
    if _open:
        course = _open[-1]
        start, width = course.stages[-1]
        course.in_hand = max(course.in_hand, start + width * share)
        course.show(course)


@contextmanager
def in_hand(units: float) -> Iterator[None]:
    """The batch that is worked on within is so many units long; without, one."""
    yield from _stage(0.0, units)


@contextmanager
def stage(start: float, end: float) -> Iterator[None]:
    """What is done within is a part of the stage in hand, from one share of it to another."""
    if not _open:
        yield
        return
    before, width = _open[-1].stages[-1]
    yield from _stage(before + width * start, width * (end - start))


def stages(items: Sequence[Item], weights: Sequence[float] | None = None) -> Iterator[Item]:
    """The items one by one, each a part of the stage in hand: progress moves with them, and inside them.

    Args:
        items: Batches, steps, ...
        weights: What each takes, in any unit; alike where not given.
    """
    sizes = [1.0] * len(items) if weights is None else [float(weight) for weight in weights]
    total, done = sum(sizes) or 1.0, 0.0
    for item, size in zip(items, sizes, strict=True):
        with stage(done / total, (done + size) / total):
            yield item
        done += size
        within(done / total)


def _stage(start: float, width: float) -> Iterator[None]:
    if not _open:
        yield
        return
    stack = _open[-1].stages
    depth = len(stack)
    stack.append((start, width))
    try:
        yield
    finally:
        del stack[depth:]  # those inside that an error left open, too


@contextmanager
def progress(description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows progress on stderr, with the time left.

    Args:
        description: What is being done.
        total: How many units there are.
        unit: Name of a unit, plural.
        done: Units finished before this run (a resumed run); they count as progress, not towards the rate.

    Yields:
        A function that is told how many more units are finished.
    """
    shown = _bar if sys.stderr.isatty() and find_spec("rich") else _lines
    with shown(description, total, unit, done) as course:
        _open.append(course)
        try:
            yield course.advance
        finally:
            _open.remove(course)


@contextmanager
def _bar(description: str, total: int, unit: str, done: int) -> Iterator[_Course]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=done, pace="")
        yield _Course(
            description, total, unit, done, lambda c: bar.update(task, completed=c.reached, pace=c.pace.lstrip(", "))
        )


@contextmanager
def _lines(description: str, total: int, unit: str, done: int) -> Iterator[_Course]:
    shown, tenth = time.monotonic(), int(_LINE_AT_SHARES * done / max(total, 1))

    def show(course: _Course) -> None:
        nonlocal shown, tenth
        now, reached = time.monotonic(), int(_LINE_AT_SHARES * course.reached / max(total, 1))
        if now - shown >= (_LINES_APART_SECONDS if reached > tenth else _LINE_EVERY_SECONDS):
            shown, tenth = now, reached
            about = "about " if course.in_hand else ""
            say(f"{description}: {about}{course.reached:.0f}/{total} {unit}{course.pace}")

    course = _Course(description, total, unit, done, show)
    yield course
    if course.finished:
        seconds = time.monotonic() - course.started
        say(f"{description}: {done + course.finished}/{total} {unit} in {seconds:.1f} s")
