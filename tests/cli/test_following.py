"""The last line of a command: what to go on with; and the runs that a bare command finds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from bvpo_stats.cli.evaluate import find as evaluate_find
from bvpo_stats.cli.following import newest_run, next_command
from bvpo_stats.cli.pairs import find as pairs_find
from bvpo_stats.cli.traces import find as traces_find

from bvpo_stats.errors import UserError
from bvpo_stats.store.jsonl import write_sealed
from tests.cli.running import failed_politely, run
from tests.golden.cases import Runs

NEXT = {
    "sample": "bvpo-stats pairs --samples runs/it --reward embedded",
    "pairs": "bvpo-stats alpha-star --pairs runs/it",
    "traces": "bvpo-stats alpha-star --adapter ADAPTER --pairs PAIRS --traces runs/it",
    "variance": "bvpo-stats alpha-star",
    "alpha-star": "bvpo-stats train --alpha adaptive",
    "train": "bvpo-stats evaluate --adapter runs/it/model",
    "evaluate": "bvpo-stats report runs",
    "theorems": None,
}


@pytest.mark.parametrize("study", NEXT)
def test_the_command_that_goes_on(study: str) -> None:
    embedded, other = (SimpleNamespace(study=study, model=m, shard="1/1") for m in ("embedded@2168", "Qwen3-4B@0f3a"))
    assert next_command(embedded, Path("runs/it")) == NEXT[study]
    if study not in ("evaluate", "theorems"):
        assert str(next_command(other, Path("runs/it"))).endswith(" --model MODEL")


def test_a_shard_is_not_the_whole() -> None:
    assert next_command(SimpleNamespace(study="sample", model="embedded@1", shard="1/2"), Path("x")) is None


def test_it_is_the_last_line(golden: Runs) -> None:
    folder = golden.output("sample")
    last = golden.printed("sample").rstrip().splitlines()[-1]
    assert last == f"Next: bvpo-stats pairs --samples {folder} --reward embedded"


def write_run(folder: Path, study: str, age: int, **report: object) -> Path:
    """A run's folder with as much in it as is looked at; the higher the age, the older."""
    folder.mkdir(parents=True)
    write_sealed(folder / "report.json", json.dumps({"study": study, **report}))
    os.utime(folder / "report.json", (1e9 - age, 1e9 - age))
    return folder


def test_a_bare_command_takes_the_last_finished_run_beside_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "pairs"
    old = write_run(tmp_path / "old", "sample", 9, model="embedded@1")
    last = write_run(tmp_path / "last", "sample", 5, model="embedded@1")
    write_run(tmp_path / "elsewhere" / "deeper", "sample", 0, model="embedded@1")
    write_run(own, "sample", 0, model="embedded@1")  # a command's own folder is none of them
    (tmp_path / "going-on").mkdir()
    (tmp_path / "going-on" / "run.json").write_text('{"command": "sample"}', encoding="utf-8")
    assert pairs_find({}, own) == {"samples": last, "reward": "embedded"}
    assert f"Takes `samples={str(last)!r}`" in capsys.readouterr().err
    assert pairs_find({"samples": str(old)}, own) == {"reward": "embedded"}
    assert pairs_find({"samples": "x", "reward": "file:scores.jsonl"}, own) == {}
    damaged = write_run(tmp_path / "damaged", "sample", 1, model="embedded@1")
    content = (damaged / "report.json").read_text(encoding="utf-8")
    (damaged / "report.json").write_text(content.replace("@1", "@2"), encoding="utf-8")
    assert newest_run(own, "sample").folder == last  # type: ignore[union-attr]


def test_a_reward_is_assumed_for_the_embedded_model_alone(tmp_path: Path) -> None:
    other = write_run(tmp_path / "samples", "sample", 0, model="Qwen3-4B@0f3a")
    with pytest.raises(UserError, match=r"`reward` is not given.*reward='math-verify'"):
        pairs_find({}, tmp_path / "pairs")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="`reward` is not given"):  # unknown is unknown
        pairs_find({"samples": str(tmp_path / "nothing")}, tmp_path / "pairs")
    assert pairs_find({"reward": "math-verify"}, tmp_path / "pairs") == {"samples": other}


def test_traces_take_the_samples_that_the_pairs_were_made_from(golden: Runs, tmp_path: Path) -> None:
    pairs, samples = golden.output("pairs"), golden.output("sample")
    beside = samples.parent / "bare"
    found = traces_find({"pairs": pairs}, beside)
    assert found == {"samples": samples}
    write_run(tmp_path / "samples", "sample", 0)
    (tmp_path / "samples" / "samples.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="`samples` is not given"):  # there are some, but not these
        traces_find({"pairs": pairs}, tmp_path / "traces")


def test_evaluate_takes_what_was_trained_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "evaluate"
    assert evaluate_find({}, own) == {}
    for name, age, model in (("a", 3, "embedded@1"), ("b", 2, "embedded@1"), ("c", 1, "Qwen3-4B@0f3a")):
        folder = write_run(tmp_path / name, "train", age, model=model) / "model"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert evaluate_find({}, own) == {"adapter": (str(tmp_path / "b" / "model"),)}
    assert "trained by the last finished run" in capsys.readouterr().err
    assert evaluate_find({"model": "Qwen3-4B"}, own) == evaluate_find({"adapter": ["x"]}, own) == {}


def test_a_bare_command_that_finds_nothing_says_what_to_do(tmp_path: Path) -> None:
    for command, option, first in (("pairs", "--samples", "sample"), ("traces", "--pairs", "pairs")):
        failed_politely(run(command, "--output", tmp_path / "own"), f"{option} is not given", f"bvpo-stats {first}")
    failed_politely(run("report", tmp_path), "no run in it")


def test_pairs_of_an_embedded_sample_need_no_option_but_a_place(golden: Runs, tmp_path: Path) -> None:
    (tmp_path / "samples").symlink_to(golden.output("sample"))
    done = run("pairs", "--output", tmp_path / "pairs")
    assert done.returncode == 0, done.stderr
    assert f"Takes --samples {tmp_path / 'samples'}" in done.stderr
    assert f"Next: bvpo-stats alpha-star --pairs {tmp_path / 'pairs'}" in done.stdout
