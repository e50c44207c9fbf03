"""Every command and option with its type and default, as ``--help`` shows them."""

from __future__ import annotations

import os
import re
from unittest.mock import patch

from tests.cli.running import run

_WIDE = "1000"  # columns: every option stands on one line, so that cells can be told apart


def help_record() -> dict[str, object]:
    """Command -> option or argument -> what it takes and its default; texts that only explain are left out."""
    record: dict[str, object] = {}
    waiting = [""]
    while waiting:
        command = waiting.pop(0)
        text = _help(command)
        record[f"bvpo-stats {command}".strip()] = _parameters(text)
        waiting += [f"{command} {name}".strip() for name in _subcommands(text)]
    return record


def _help(command: str) -> str:
    with patch.dict(os.environ, COLUMNS=_WIDE, NO_COLOR="1"):
        result = run(*command.split(), "--help")
    assert result.returncode == 0, result.stderr
    return result.stdout


def _parameters(text: str) -> dict[str, dict[str, object]]:
    found = {}
    for cells in [*_rows(text, "Options"), *_rows(text, "Arguments")]:
        required = cells[0] == "*"
        name, takes, *words = cells[1:] if required else cells
        # A default may hold one pair of brackets; "(...)" marks one that is described, not given.
        default = re.search(r"\[default: (.*?)\](?!\])", " ".join(words))
        found[name] = {"takes": takes, "default": default[1] if default else None, "required": required}
    return dict(sorted(found.items()))


def _subcommands(text: str) -> list[str]:
    return [cells[0] for cells in _rows(text, "Commands")]


def _rows(text: str, title: str) -> list[list[str]]:
    """The rows of one titled box, as cells: columns stand at least two blanks apart."""
    rows: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if re.match(rf"\W*{title}\b", line):
            inside = True
        elif not re.search(r"\w", line):
            inside = False
        elif inside:
            rows.append(re.split(r"\s{2,}|(?<=\*)\s+", line.strip("│| ")))
    return rows
