"""``bvpo-stats demo``: every stage in its folder, one page of all, and nothing done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bvpo_stats.pages import demo
from bvpo_stats.pages.runs import read_run
from tests.cli.running import failed_politely, run

# The quick story, shorter still: what is tested is that every stage is told, not its numbers.
SHORT = replace(demo.QUICK, questions=6, prompts=24, steps=3, problems=3)

# All stages but the checks of the theorems: they take longest, and their own tests make every one of them.
TOLD = tuple(stage for stage in demo.STAGES if stage.name != "theorems")


@pytest.fixture(scope="module", autouse=True)
def without_theorems() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STAGES", TOLD)
        patch.setattr(demo, "QUICK", SHORT)
        yield


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "story"
    result = run("demo", "--quick", "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.mark.slow
def test_every_stage_reports_and_the_page_holds_them_all(told: tuple[Path, str]) -> None:
    folder, printed = told
    assert printed.strip().splitlines()[-1] == f"Open: {folder / 'report.html'}"
    page = (folder / "report.html").read_text()
    assert page.count("<section") == len(TOLD)
    for place, stage in enumerate(TOLD, start=1):
        report = json.loads((folder / stage.name / "report.json").read_text())
        assert report["study"] == stage.name
        (finding, *_) = read_run(folder / stage.name, stage.name).read().present().findings
        assert f"{place}/{len(TOLD)} {stage.name}: {stage.question}" in printed
        assert finding.sentence in printed


@pytest.mark.slow
def test_told_again_nothing_is_drawn_or_trained_anew(told: tuple[Path, str]) -> None:
    folder, printed = told
    page = (folder / "report.html").read_bytes()
    work = ("samples.jsonl", "logprobs.jsonl", "adapter_model.safetensors")
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name in work}
    assert {path.name for path in kept} == set(work)
    again = run("demo", "--quick", "--output", folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout == printed
    assert (folder / "report.html").read_bytes() == page
    assert [path for path, time in kept.items() if path.stat().st_mtime_ns != time] == []


@pytest.mark.slow
def test_another_seed_does_not_overwrite(told: tuple[Path, str]) -> None:
    failed_politely(
        run("demo", "--quick", "--seed", "1", "--output", told[0]), "different run", "Nothing was overwritten"
    )
