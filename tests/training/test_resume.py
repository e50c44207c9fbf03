"""Runs that are killed go on as if they had not been; checkpoints of other runs are refused."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.pages.runs import find_runs
from bvpo_stats.store.run_folder import SEAL
from bvpo_stats.studies.train.run import run_train
from bvpo_stats.training import trainer as module
from bvpo_stats.training.state import STATE_FILE, last_checkpoint
from bvpo_stats.training.trainer import AlphaCallback, BVPOTrainer
from tests.processes import python
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
    traps = ["begin:1", "end:3", "saving:4", "half:6", "begin:7", "sealing:8", "model:9", "report:9"]
    words = (random_model, pairs, tmp_path / "run", *traps)
    done = python("-m", "tests.training.killed_training", *words, timeout=400)
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
    with pytest.raises(UserError, match=r"is whole \(checkpoint-2: alpha_state.json is missing\)"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


SHORT = {"alpha": 0.25, "max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def short(random_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("train") / "short"
    run_train(run_config(random_model, pairs, **SHORT), folder)
    return folder


def same(folder: Path, other: Path) -> bool:
    """Whether two runs have one report and one model."""
    names = ("report.json", f"model/{WEIGHTS}")
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def flip(path: Path) -> None:
    """Turns one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_killed_between_the_last_checkpoint_and_the_report(
    random_model: Path, pairs: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one step more, whether the model was written, half written, or not at all; again and again."""
    run = tmp_path / "run"
    shutil.copytree(short, run)
    steps: list[int] = []
    before = BVPOTrainer.training_step

    def counted(self: BVPOTrainer, *arguments: Any, **options: Any) -> Any:
        steps.append(self.state.global_step)
        return before(self, *arguments, **options)

    monkeypatch.setattr(BVPOTrainer, "training_step", counted)
    for left in ("whole", "half", "none"):
        (run / "report.json").unlink()
        if left == "half":
            cut(run / "model" / WEIGHTS)
        if left == "none":
            shutil.rmtree(run / "model")
        run_train(run_config(random_model, pairs, **SHORT), run)
        assert same(run, short)
    assert steps == []
    monkeypatch.setattr(module, "seal_folder", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # stopped while the first checkpoint was being written: it does not count
        run_train(run_config(random_model, pairs, **SHORT), tmp_path / "stopped")
    monkeypatch.undo()
    run_train(run_config(random_model, pairs, **SHORT), tmp_path / "stopped")
    assert same(tmp_path / "stopped", short)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("optimizer.pt", Path.unlink),
        ("scheduler.pt", Path.unlink),
        ("rng_state.pth", cut),
        ("optimizer.pt", flip),
        (WEIGHTS, flip),
        ("trainer_state.json", flip),
        (STATE_FILE, cut),
        (SEAL, cut),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    short: Path, tmp_path: Path, name: str, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(short / "checkpoints", folder)
    harm(folder / "checkpoint-4" / name)
    assert last_checkpoint(folder) == folder / "checkpoint-2"
    said = capsys.readouterr().err
    assert f"checkpoint-4 is passed over: {name} " in said
    assert "goes on from checkpoint-2" in said
    harm(folder / "checkpoint-2" / name)
    with pytest.raises(UserError, match=rf"No checkpoint in .* is whole \(checkpoint-4: {name} .*delete that folder"):
        last_checkpoint(folder)


def test_damaged_checkpoints_lead_to_the_same_model(
    random_model: Path, pairs: Path, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 3 and 4 again after damage to the newest; all four where none was ever finished; else nothing at all."""
    run = tmp_path / "run"
    shutil.copytree(short, run)
    checkpoints = run / "checkpoints"
    (run / "report.json").unlink()
    flip(checkpoints / "checkpoint-4" / WEIGHTS)
    run_train(run_config(random_model, pairs, **SHORT), run)
    assert same(run, short)
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    (run / "report.json").unlink()
    capsys.readouterr()
    for checkpoint in checkpoints.iterdir():
        (checkpoint / SEAL).unlink()
    run_train(run_config(random_model, pairs, **SHORT), run)
    assert same(run, short)
    assert "checkpoint-4 is passed over: checksums.json is missing" in capsys.readouterr().err


def test_a_damaged_model_of_a_finished_run_is_written_again(
    random_model: Path, pairs: Path, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short, run)
    flip(run / "model" / WEIGHTS)
    run_train(run_config(random_model, pairs, **SHORT), run)
    assert same(run, short)
    assert f"is damaged ({WEIGHTS} is not as it was written" in capsys.readouterr().err
    flip(run / "model" / WEIGHTS)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"is damaged .* no checkpoint to write it again"):
        run_train(run_config(random_model, pairs, **SHORT), run)


def test_a_changed_report_of_a_finished_run_is_noticed(
    random_model: Path, pairs: Path, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short, run)
    report = (run / "report.json").read_text()
    for kept in (True, False):
        (run / "report.json").write_text(report.replace('"steps": 4', '"steps": 5'))
        assert find_runs(run)[0].report is None
        if kept:
            run_train(run_config(random_model, pairs, **SHORT), run)
            assert same(run, short)
            assert "report.json is not as it was written (its checksum differs); it is made" in capsys.readouterr().err
            shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"report\.json is not as it was written .* no checkpoint to make it again"):
        run_train(run_config(random_model, pairs, **SHORT), run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": 7}, "adapter.lora_alpha: 4 there, 7 now"),
        ({"policy": {"dtype": "float64"}}, "dtype: 'torch.float32' there, 'torch.float64' now"),
        ({"logging_steps": 2}, "logging steps: 1 there, 2 now"),
        ({"bf16": True}, "arithmetic: not recorded there, 'bfloat16' now"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: False there, True now"),
    ],
)
def test_other_settings_never_get_the_old_numbers(
    random_model: Path, pairs: Path, short: Path, changes: dict[str, Any], words: str
) -> None:
    config = run_config(random_model, pairs, **(SHORT | {k: v for k, v in changes.items() if k != "policy"}))
    config = replace(config, policy=replace(config.policy, **changes.get("policy", {})))
    with pytest.raises(UserError, match=rf"different run \({re.escape(words)}\)"):
        run_train(config, short)


def test_other_records_never_get_the_old_numbers(random_model: Path, pairs: Path, tmp_path: Path) -> None:
    """Another bank, or pairs of the same ids with other prompts or other stored log-probabilities."""
    mine = tmp_path / "pairs"
    shutil.copytree(pairs, mine)
    config = run_config(random_model, mine, **(SHORT | {"alpha": "adaptive", "max_steps": 1}))
    run_train(config, tmp_path / "run")
    for name, old, new, words in (
        ("traces.jsonl", '"joint_logp": -', '"joint_logp": -1', "traces: "),
        ("thinking.jsonl", '"mode": ', '"ref_chosen_logps": -3.5, "mode": ', "pairs: "),
    ):
        before = (mine / name).read_text()
        assert old in before
        (mine / name).write_text(before.replace(old, new))
        with pytest.raises(UserError, match=rf"different run \({words}'\w+' there, '\w+' now\)"):
            run_train(config, tmp_path / "run")
        (mine / name).write_text(before)


def test_a_full_disk_is_one_line_and_loses_nothing(
    random_model: Path, pairs: Path, short: Path, tmp_path: Path
) -> None:
    """Whatever file it is that the kernel (EFBIG here) lets grow no further."""
    run, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = {path.stat().st_size for path in (short / "checkpoints" / "checkpoint-2").iterdir()}
    for size in sorted(sizes)[-2:]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, hard))
        try:
            with pytest.raises(UserError, match=rf"Disk full while writing {run}/checkpoints/checkpoint-2[^ ]*\. Free"):
                run_train(run_config(random_model, pairs, **SHORT), run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not (run / "checkpoints" / "checkpoint-2").exists()
    run_train(run_config(random_model, pairs, **SHORT), run)
    assert same(run, short)


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
