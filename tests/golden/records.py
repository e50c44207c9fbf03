"""What is kept of a run: its report, a digest of its record files, the words of its summary, the names of its files."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.golden.comparison import LEFT_OUT

LONGEST = 12
"""Lists of more numbers than this are kept as a digest."""

_OTHERS = ("model/", "checkpoints/")  # what transformers and PEFT write, under names of their own


def run_record(folder: Path) -> dict[str, Any]:
    """What is kept of a run.

    Args:
        folder: Of the finished run.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not name.startswith(_OTHERS) and "/.lock" not in f"/{name}"]
    summary = folder / "report.md"
    return {
        "files": names,
        "identity": _shortened(_read(folder / "run.json")),
        "report": _shortened(_read(folder / "report.json")),
        "records": {name: _digest(folder / name) for name in names if name.endswith(".jsonl")},
        "summary": _words(summary) if summary.exists() else None,
    }


def _words(summary: Path) -> list[str]:
    """The lines of a summary without those on the software and on how fast this call was."""
    lines = summary.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith(("Versions:", "- This call:"))]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _shortened(value: Any) -> Any:
    """Without what changes between equal runs, and with digests in the place of long lists of numbers."""
    if isinstance(value, dict):
        return {key: _shortened(entry) for key, entry in value.items() if key not in LEFT_OUT}
    if isinstance(value, list):
        if len(value) > LONGEST and all(isinstance(entry, int | float) for entry in value):
            return _column([float(entry) for entry in value])
        return [_shortened(entry) for entry in value]
    return value


def _digest(path: Path) -> dict[str, Any]:
    """Number of rows of a JSONL file, and a digest of each of its fields over all rows."""
    columns: dict[str, list[Any]] = {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        for place, leaf in _leaves(row):
            columns.setdefault(place, []).append(leaf)
    return {"rows": len(rows), **{place: _column(leaves) for place, leaves in sorted(columns.items())}}


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its place; the places of a list's entries are one."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key not in LEFT_OUT:
                yield from _leaves(entry, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        yield f"{place}.length", len(value)
        for entry in value:
            yield from _leaves(entry, f"{place}[]")
    else:
        yield place, value


def _column(leaves: list[Any]) -> dict[str, Any]:
    """Sums of real numbers, which may differ in their last digits; a hash of anything else, which may not."""
    numbers = [leaf for leaf in leaves if isinstance(leaf, float)]
    if numbers:
        numbers = [float(leaf) for leaf in leaves if isinstance(leaf, int | float)]
        return {
            "entries": len(leaves),
            "numbers": len(numbers),
            "sum": math.fsum(numbers),
            "sum of squares": math.fsum(number**2 for number in numbers),
            # Neighbours swapped, or rows in another order, change this one.
            "sum by place": math.fsum(number * (1 + place / len(numbers)) for place, number in enumerate(numbers)),
        }
    text = re.sub(r"model@[0-9a-f]{12}", "model@...", json.dumps(leaves, ensure_ascii=False))
    return {"entries": len(leaves), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
