"""Entry point of ``bvpo-stats``: the list of commands, and how errors reach the user."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from bvpo_stats import __version__
from bvpo_stats.errors import UserError

from . import (
    alpha_star,
    demo,
    evaluate,
    figures,
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
add_command(app, "pairs", pairs.pairs, output="runs/pairs", examples=pairs.EXAMPLES)
add_command(app, "traces", traces.traces, output="runs/traces", examples=traces.EXAMPLES)
add_command(app, "alpha-star", alpha_star.alpha_star, output="runs/alpha-star", examples=alpha_star.EXAMPLES)
add_command(app, "train", train.train, output="runs/train", examples=train.EXAMPLES)
add_command(app, "evaluate", evaluate.evaluate, output="runs/evaluate", examples=evaluate.EXAMPLES)
add_command(
    app,
    "oracle-training",
    oracle_training.oracle_training,
    output="runs/oracle-training",
    examples=oracle_training.EXAMPLES,
)
add_command(app, "theorems", theorems.theorems, output="runs/theorems", examples=theorems.EXAMPLES)
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
    # PEFT asks transformers for a setting by its old name; there is nothing that a user could do about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        code = app(words, prog_name="bvpo-stats", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        code = _report(error)
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    if isinstance(error, UserError):
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if hasattr(error, "format_message"):  # the command line itself is wrong (an unknown option, a bad number)
        message = str(error.format_message())
        if message:
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "bvpo-stats"
            print(f"Error: {message} See {command} --help.", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":
        return 130
    print(
        f"Internal error: {type(error).__name__}: {error}. Please report it; --debug shows the traceback.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    main()
