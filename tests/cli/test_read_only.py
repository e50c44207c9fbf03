"""Folders and files that may not be written: one line that names them, and nothing of a finished run is lost.

The tests mostly run as root, whom no permission stops: they give their rights away for the length of a command.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from bvpo_stats.records import to_dict
from bvpo_stats.sampling.pairs import make_pairs
from tests.cli.running import failed_politely, run
from tests.sampling.samples import both_modes, template, write_samples

_NOBODY = 65_534
PAIRS = ("pairs", "--reward", "embedded", "--mode", "thinking")


@contextmanager
def without_rights() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that others may read but not write, with samples, pairs and a finished run."""
    folder = Path(tempfile.mkdtemp(prefix="read-only-"))
    try:
        samples = [row for p in range(4) for row in both_modes(f"p{p}", ["17", "18"])]
        write_samples(folder / "samples", samples)
        for mode in ("thinking", "nothinking"):
            pairs = [to_dict(pair) for pair in make_pairs(samples, "embedded", policy=template()) if pair.mode == mode]
            (folder / f"{mode}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        done = run(*PAIRS, "--samples", folder / "samples", "--output", folder / "run")
        assert done.returncode == 0, done.stderr
        for module in ("sample", "traces", "train"):  # who has no rights may not even read Python's own files
            import_module(f"bvpo_stats.studies.{module}.run")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield folder
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "line",
    [
        "sample --engine file --samples-from {0}/samples/samples.jsonl",
        "pairs --samples {0}/samples --reward embedded",
        "traces --pairs {0}/thinking.jsonl --samples {0}/samples",
        "train --max-steps 1 --lora-r 1 --limit 4 --batch-size 2",
    ],
)
def test_no_folder_can_be_made(line: str, place: Path) -> None:
    words = line.format(place).split()
    with without_rights():
        result = run(*words, "--output", place / "new")
    failed_politely(result, f"{place / 'new'}", "ermission")


def test_a_run_that_may_not_be_written_any_more(place: Path) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with without_rights():
        again = run(*PAIRS, "--samples", place / "samples", "--output", place / "run")
        failed_politely(again, f"Cannot write to {place / 'run'}", "permissions")
        failed_politely(run("report", place / "run"), f"{place / 'run' / 'report.html'}", "ermission")
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_what_is_only_read_may_lie_in_a_folder_that_cannot_be_written(place: Path, tmp_path: Path) -> None:
    done = run("pairs", "--samples", place / "samples", "--reward", "embedded", "--output", tmp_path / "pairs")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["scores.jsonl", "report.json", "thinking.jsonl", "thinking.parquet", "README.md", ".lock", "run.json"]
)
def test_a_folder_in_the_place_of_a_file(name: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).mkdir()
    result = run(*PAIRS, "--samples", place / "samples", "--output", tmp_path / "run")
    failed_politely(result, str(tmp_path / "run"), name if name != ".lock" else "Is a directory")
