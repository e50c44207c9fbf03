"""Slow results that outlive a kill: the same rows, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.store.jsonl import RowLog, repair_tail

PORTIONS = [[0, 1, 2], [3], [], [4, 5]]


def run(path: Path, stop_before: int | None = None) -> tuple[list[int], list[list[int]]]:
    """(values of all rows, portions that were computed)."""
    log, values, computed = RowLog(path), [], []
    for number, portion in enumerate(PORTIONS):
        if number == stop_before:
            break

        def compute(portion: list[int] = portion) -> list[dict[str, Any]]:
            computed.append(portion)
            return [{"square": n * n} for n in portion]

        rows = log.rows([{"n": n} for n in portion], compute)
        values += [row["square"] for row in rows]
    return values, computed


def test_every_place_of_a_kill(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    assert run(whole) == ([0, 1, 4, 9, 16, 25], [[0, 1, 2], [3], [4, 5]])
    assert run(whole) == ([0, 1, 4, 9, 16, 25], [])
    content = whole.read_bytes()
    for cut in range(len(content)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        repair_tail(path)
        lines = path.read_bytes().count(b"\n")
        values, computed = run(path)
        assert values == [0, 1, 4, 9, 16, 25]
        assert computed == [p for p in PORTIONS if p and p[-1] >= lines]
        assert path.read_bytes() == content


def test_damaged_rows_are_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    run(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for damaged in (whole.replace(b'"square":9', b'"square":8'), b"".join([*lines[:3], lines[0], *lines[3:]])):
        path.write_bytes(damaged)
        assert run(path) == ([0, 1, 4, 9, 16, 25], [[3], [4, 5]])
        assert path.read_bytes() == whole
        assert "log.jsonl: " in capsys.readouterr().err


def test_a_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run(path)
    path.write_text(path.read_text().replace('"n":1', '"n":7'))
    (tmp_path / ".log.jsonl.sums").unlink()  # of another run, then
    with pytest.raises(UserError, match=r"log\.jsonl:2: expected the row of 1"):
        run(path)
