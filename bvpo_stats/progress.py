"""Progress of long work: a bar with a rate on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY_SECONDS = 15.0


def say(line: str) -> None:
    """One line on stderr about what a run is going to do; of several processes, the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows progress on stderr.

    Args:
        description: What is being done.
        total: How many units there are.
        unit: Name of a unit, plural.
        done: Units finished before this run (a resumed run); they count as progress, not towards the rate.

    Yields:
        A function that is told how many more units are finished.
    """
    if sys.stderr.isatty():
        with _bar(description, total, unit, done) as advance:
            yield advance
    else:
        with _lines(description, total, unit, done) as advance:
            yield advance


@contextmanager
def _bar(description: str, total: int, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    started = time.monotonic()
    finished = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=done, rate="")

        def advance(count: int) -> None:
            nonlocal finished
            finished += count
            rate = finished / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=count, rate=f"{rate:.1f} {unit}/s")

        yield advance


@contextmanager
def _lines(description: str, total: int, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    started = shown = time.monotonic()
    finished = 0

    def advance(count: int) -> None:
        nonlocal shown, finished
        finished += count
        now = time.monotonic()
        if now - shown >= _LINE_EVERY_SECONDS:
            shown = now
            print(f"{description}: {done + finished}/{total} {unit}, {finished / (now - started):.1f} {unit}/s",
                  file=sys.stderr, flush=True)  # fmt: skip

    yield advance
    seconds = time.monotonic() - started
    if finished:
        print(f"{description}: {done + finished}/{total} {unit} in {seconds:.1f} s", file=sys.stderr, flush=True)
