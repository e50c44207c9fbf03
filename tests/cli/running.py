"""Runs the command line as a user does, and says what a polite failure is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from bvpo_stats.cli.main import main

from tests.processes import Result

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_process(*arguments: object, cwd: Path | None = None, timeout: float = 300) -> Result:
    """``bvpo-stats ARGUMENTS`` in a process of its own, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "bvpo_stats.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run(*arguments: object) -> Result:
    """``bvpo-stats ARGUMENTS`` in this process, which saves the seconds that importing torch takes."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        except Exception:  # only --debug lets one through
            traceback.print_exc()
            code = 1
    return Result(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def failed_politely(result: Result, *words: str) -> None:
    """One clear line on stderr, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0], errors[0]
