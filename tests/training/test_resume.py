"""Runs that are killed go on as if they had not been; checkpoints of other runs are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.studies.train.run import run_train
from bvpo_stats.training.state import STATE_FILE, last_checkpoint
from bvpo_stats.training.trainer import AlphaCallback, BVPOTrainer
from tests.training.records import adapted, both_sets, run_config, settings, write_run

PROMPTS = 40


@pytest.fixture(scope="module")
def pairs(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(random_model, tmp_path_factory.mktemp("train") / "pairs", PROMPTS)


@pytest.fixture(scope="module")
def straight(random_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("train") / "straight"
    run_train(run_config(random_model, pairs), folder)
    return folder


@pytest.mark.slow
def test_killed_again_and_again(random_model: Path, pairs: Path, straight: Path, tmp_path: Path) -> None:
    traps = ["begin:1", "end:3", "saving:4", "half:6", "begin:7"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.killed_training", random_model, pairs, tmp_path / "run", *traps],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-9] * len(traps) + [0], done.stderr
    found, expected = ((folder / "report.json").read_text() for folder in (tmp_path / "run", straight))
    report = json.loads(expected)
    assert [point["step"] for point in report["alpha"]["trajectory"]] == list(range(1, 10))
    assert len({point["alpha"] for point in report["alpha"]["trajectory"]}) > 1  # an alpha that moves, or nothing shown
    assert found == expected
    ours, theirs = (folder / "model" / "adapter_model.safetensors" for folder in (tmp_path / "run", straight))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_finished_run_is_kept(
    random_model: Path, pairs: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (straight / "report.json").stat().st_mtime_ns
    monkeypatch.setattr("bvpo_stats.studies.train.run.BVPOTrainer", None)
    report = run_train(run_config(random_model, pairs), straight)
    assert report is not None
    assert report.steps == 9
    assert (straight / "report.json").stat().st_mtime_ns == before


def test_another_configuration_is_refused(random_model: Path, pairs: Path, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"different run \(learning_rate: 0.03 there, 0.001 now\)"):
        run_train(run_config(random_model, pairs, learning_rate=1e-3), straight)
    policy = adapted(random_model)
    args = settings(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    BVPOTrainer(policy, args, both_sets(policy, 16)).train()
    other = settings(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, alpha=0.25)
    trainer = BVPOTrainer(adapted(random_model), other, both_sets(policy, 16))
    with pytest.raises(UserError, match=r"of another configuration \(alpha: 0.5 there, 0.25 now; max_steps: 2 there"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / STATE_FILE).unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resume_insists_on_a_checkpoint(random_model: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`resume=True`: .* has no checkpoint"):
        run_train(run_config(random_model, pairs, resume=True), tmp_path / "run")


def test_nan_keeps_the_last_good_checkpoint(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights break after step 3: the run stops before step 4 and the checkpoint of step 2 leads on."""
    policy = adapted(random_model)
    pairs, args = both_sets(policy, 16), settings(tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    before = AlphaCallback.on_step_end

    def poison(self: AlphaCallback, arguments: object, state: object, control: object, **more: object) -> None:
        before(self, arguments, state, control, **more)
        if state.global_step == 3:
            next(w for n, w in policy.model.named_parameters() if "lora_A" in n).data.fill_(float("nan"))

    monkeypatch.setattr(AlphaCallback, "on_step_end", poison)
    with pytest.raises(UserError, match=r"NaN or infinite log-probability in pair q\d+"):
        BVPOTrainer(policy, args, pairs).train()
    monkeypatch.undo()
    kept = last_checkpoint(tmp_path)
    assert kept is not None
    assert kept.name == "checkpoint-2"
    again = BVPOTrainer(adapted(random_model), args, pairs)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert all(bool(torch.isfinite(w).all()) for w in again.policy.model.parameters())
