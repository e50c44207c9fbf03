"""``bvpo-stats figures``: pictures from reports alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.running import failed_politely, run

COMMITTED = Path(__file__).parents[2] / "figures"


@pytest.fixture
def variance_run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "variance"
    folder.mkdir(parents=True)
    shutil.copy(COMMITTED / "variance/report.json", folder)
    return folder


def test_figures_of_a_run_stand_beside_its_report(variance_run: Path, tmp_path: Path) -> None:
    result = run("figures", variance_run.parent, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    drawn = sorted(path.name for path in (tmp_path / "out/variance").iterdir())
    assert drawn == [
        ".report.json.sha256",
        "lengths.png",
        "logps.png",
        "nll_by_position.png",
        "ratios.png",
        "report.json",
    ]
    report = json.loads((tmp_path / "out/variance/report.json").read_text())
    assert report == json.loads((variance_run / "report.json").read_text())


def test_without_runs_the_output_is_drawn_anew(variance_run: Path, tmp_path: Path) -> None:
    assert run("figures", variance_run, "--output", tmp_path / "out").returncode == 0
    picture = tmp_path / "out/variance/ratios.png"
    before = picture.read_bytes()
    picture.unlink()
    assert run("figures", "--output", tmp_path / "out").returncode == 0
    assert picture.read_bytes() == before


def test_what_cannot_be_drawn_says_why(variance_run: Path, tmp_path: Path) -> None:
    broken, unfinished, strange = (variance_run.parent / name for name in ("broken", "unfinished", "strange"))
    for folder in (broken, unfinished, strange):
        folder.mkdir()
    (broken / "report.json").write_text('{"study": "variance", "table3": {}}')
    (unfinished / "run.json").write_text('{"command": "variance"}')
    (strange / "report.json").write_text('{"study": "a study of tomorrow"}')
    result = run("figures", variance_run.parent, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert "another version" in lines["broken"]
    assert "No report.json yet" in lines["unfinished"]
    assert "a study of tomorrow" in lines["strange"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["variance"]


def test_bad_input(variance_run: Path, tmp_path: Path) -> None:
    failed_politely(run("figures", tmp_path / "nowhere"), "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    failed_politely(run("figures", tmp_path / "empty"), "no run in it")
    twin = tmp_path / "other/variance"
    shutil.copytree(variance_run, twin)
    failed_politely(run("figures", variance_run, twin), "Several runs are called variance")
    other = tmp_path / "out/variance"
    other.mkdir(parents=True)
    (other / "report.json").write_text('{"study": "alpha-star"}')
    failed_politely(run("figures", variance_run, "--output", tmp_path / "out"), "Nothing was overwritten")
