"""Python processes that start warm: forked from one that has torch and transformers loaded, which takes seconds.

The process they are forked from does nothing but import, so they are as good as new ones: no type checks of the tests,
no state of theirs, an exit code and output of their own. What is said of start-up itself needs a real one.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]

_WARM = get_context("forkserver")
_WARM.set_forkserver_preload(["tests.preloaded"])


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Python:
    """A Python that is running."""

    process: BaseProcess
    output: tempfile.TemporaryDirectory[str]

    def kill(self) -> None:
        """SIGKILL, and the end of it."""
        self.process.kill()
        self.process.join()

    def wait(self, timeout: float = 300) -> Result:
        """How it ended.

        Args:
            timeout: Seconds after which it is killed.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
        said = [(Path(self.output.name) / name).read_text(encoding="utf-8") for name in ("out", "err")]
        return Result(self.process.exitcode or 0, *said)


def start(*words: object, env: dict[str, str] | None = None) -> Python:
    """``python WORDS`` from the root of the project.

    Args:
        words: ``-m MODULE`` or ``-c CODE``, then its arguments.
        env: What it finds in its environment beside what the tests have.
    """
    output = tempfile.TemporaryDirectory()
    found = {**os.environ, **(env or {}), "OMP_NUM_THREADS": "1"}
    process = _WARM.Process(target=_become, args=([str(word) for word in words], found, output.name))
    process.start()
    return Python(process, output)


def python(*words: object, env: dict[str, str] | None = None, timeout: float = 300) -> Result:
    """:func:`start`, to its end."""
    return start(*words, env=env).wait(timeout)


def _become(words: list[str], env: dict[str, str], output: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(output) / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    kind, what, *arguments = words
    sys.argv = [what if kind == "-m" else kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, kind, "exec"), {"__name__": "__main__"})
