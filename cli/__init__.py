"""The ``bvpo-stats`` command: thin wrappers over studies; nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys

EXTRAS = {
    "typer": "cli", "rich": "cli", "yaml": "cli", "jinja2": "cli", "matplotlib": "plots", "seaborn": "plots",
    "math_verify": "math",
}  # fmt: skip
"""Extra that brings a module which the plain installation does without."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install for a module that is not there; None for one that no extra brings.

    Args:
        error: The failed import.

    >>> missing_extra(ModuleNotFoundError("No module named 'jinja2'", name="jinja2"))
    "Error: this needs jinja2, which the extra [cli] brings: pip install 'bvpo-stats[cli]'"
    """
    module = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(module)
    if extra is None:
        return None
    return f"Error: this needs {module}, which the extra [{extra}] brings: pip install 'bvpo-stats[{extra}]'"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; without its packages, says which extra brings them.

    Args:
        arguments: Words behind ``bvpo-stats``; None for those of the process.
    """
    try:
        from .main import main as run
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        sys.exit(2)
    run(arguments)
