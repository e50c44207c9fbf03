"""Entry point of ``bvpo-stats``: the list of commands, and how errors reach the user."""

from __future__ import annotations

import copy
import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer

from bvpo_stats import __version__
from bvpo_stats.errors import UserError, one_line

from . import (
    alpha_star,
    demo,
    doctor,
    evaluate,
    figures,
    missing_extra,
    oracle_training,
    pairs,
    report,
    sample,
    theorems,
    tiny,
    traces,
    train,
    variance,
)
from .build import Command, add_command

app = typer.Typer(
    name="bvpo-stats",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


def _show_version(value: bool) -> bool:
    if value:
        print(f"bvpo-stats {__version__}")
        raise typer.Exit
    return value


@app.callback(epilog="Any command takes --debug: on an error the full traceback is shown.")
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Gradient statistics for aligning large reasoning models (BVPO): how noisy are traces, and which alpha is best?"""


app.command("demo", cls=Command, epilog=demo.EXAMPLES)(demo.demo)
add_command(app, "variance", variance.variance, output="runs/variance", examples=variance.EXAMPLES)
add_command(app, "sample", sample.sample, output="runs/samples", examples=sample.EXAMPLES)
add_command(app, "pairs", pairs.pairs, output="runs/pairs", examples=pairs.EXAMPLES, find=pairs.find)
add_command(app, "traces", traces.traces, output="runs/traces", examples=traces.EXAMPLES, find=traces.find)
add_command(app, "alpha-star", alpha_star.alpha_star, output="runs/alpha-star", examples=alpha_star.EXAMPLES)
add_command(app, "train", train.train, output="runs/train", examples=train.EXAMPLES)
add_command(app, "evaluate", evaluate.evaluate, output="runs/evaluate", examples=evaluate.EXAMPLES, find=evaluate.find)
add_command(
    app,
    "oracle-training",
    oracle_training.oracle_training,
    output="runs/oracle-training",
    examples=oracle_training.EXAMPLES,
)
add_command(app, "theorems", theorems.theorems, output="runs/theorems", examples=theorems.EXAMPLES)
add_command(app, "doctor", doctor.doctor, output="runs", examples=doctor.EXAMPLES)
app.command("figures", cls=Command, epilog=figures.EXAMPLES)(figures.figures)
app.command("report", cls=Command, epilog=report.EXAMPLES)(report.report)
app.add_typer(tiny.app, name="tiny")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line.

    Exit codes: 0 done, 2 something in the input is wrong (one line on stderr), 130 interrupted, 1 a fault of ours or a
    theorem that should hold and does not.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        with nullcontext() if debug else _libraries_quiet():
            code = _command(words[0] if words else None)(words, prog_name="bvpo-stats", standalone_mode=False)
        if code == _INTERRUPTED:  # typer has taken the Ctrl-C for itself, and says nothing
            code = _report(KeyboardInterrupt())
    except (Exception, KeyboardInterrupt) as error:
        if debug and not isinstance(error, KeyboardInterrupt):
            raise
        code = _report(error)
    sys.exit(code if isinstance(code, int) else 0)


_INTERRUPTED = 130  # as shells have it


@functools.cache
def _command(word: str | None) -> Any:
    """The command line, or of it only the command that is asked for, since building them all takes time.

    Args:
        word: The first word that the user gave.
    """
    asked = [each for each in app.registered_commands if each.name == word]
    part = copy.copy(app)
    if asked:
        part.registered_commands, part.registered_groups = asked, []
    return typer.main.get_command(part)


_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """Keeps warnings, logs and bars of other packages off stderr: what a user should know, we say ourselves.

    Whoever has set one of these variables, or asked Python for warnings (``-W``), gets what they asked for.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    root, silence = logging.getLogger(), logging.NullHandler()  # without any handler, Python prints to stderr
    root.addHandler(silence)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(silence)


def _report(error: BaseException) -> int:
    """Says what is wrong in one line, and gives the exit code."""
    if type(error).__name__ == "Abort":  # typer's word for Ctrl-C of old, and for a file that ends too early
        error = error.__cause__ or KeyboardInterrupt()
    if isinstance(error, KeyboardInterrupt):
        _say("Interrupted. What was finished is kept; the same command goes on from there.")
        return _INTERRUPTED
    if isinstance(error, BrokenPipeError):  # whoever read our output has enough; Python would complain at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, UserError):
        _say(f"Error: {error}")
        return 2
    if hasattr(error, "format_message"):  # the command line itself is wrong (an unknown option, a bad number)
        message = str(error.format_message())
        if message:
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "bvpo-stats"
            _say(f"Error: {message.rstrip('.')}. See {command} --help.")
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, OSError) and error.strerror:  # files and disks are the user's
        place = "" if error.filename is None else f" {error.filename}"
        _say(f"Error: cannot use{place or ' a file'}: {error.strerror}. Check the path, its permissions and the disk.")
        return 2
    if isinstance(error, ModuleNotFoundError) and (missing := missing_extra(error)) is not None:
        _say(missing)
        return 2
    if isinstance(error, MemoryError):
        _say("Error: out of memory. Lower --max-tokens or --batch-size, or take a machine with more.")
        return 2
    _say(f"Internal error: {type(error).__name__}: {error}. Please report it; --debug shows the traceback.")
    return 1


def _say(message: str) -> None:
    print(one_line(message), file=sys.stderr)


if __name__ == "__main__":
    main()
