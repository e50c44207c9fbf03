"""Two processes on one run, with the global batch of a single one."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bvpo_stats.errors import UserError
from bvpo_stats.studies.train.run import run_train
from tests.processes import python
from tests.training.records import run_config, write_run

WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
from bvpo_stats.studies.train.run import run_train
from tests.training.records import run_config

model, folder, pairs, alpha = sys.argv[1:]
config = run_config(Path(model), Path(pairs), alpha=alpha)
config = replace(config, policy=replace(config.policy, device="auto"))  # as users leave it
report = run_train(config, Path(folder) / "double")
print("led" if report is not None else "followed")
"""
EVALUATION = """
import json, sys
from pathlib import Path
from bvpo_stats.training import BVPOTrainer
from tests.training.records import adapted, both_sets, settings

model, output = map(Path, sys.argv[1:3])
policy = adapted(model, "float64")
pairs = both_sets(policy, 11)  # which neither batches nor processes divide
args = settings(output, per_device_train_batch_size=1, per_device_eval_batch_size=2, precompute_ref_log_probs=True)
trainer = BVPOTrainer(policy, args, pairs, eval_dataset=pairs[4:11])
found = trainer.evaluate() | {"predictions": trainer.predict(pairs).predictions["empty/loss"].tolist()}
(output / f"{args.world_size}-{args.process_index}.json").write_text(json.dumps(found))
"""
PATHS = {"PYTHONPATH": os.pathsep.join(sys.path)}  # for the processes that a launcher starts


@pytest.fixture(scope="module")
def launched(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of two processes of one start, which evaluate and then train with an adaptive alpha.

    accelerate's launcher calls torchrun's; on a machine without GPUs only --multi_gpu makes it start more than one
    process.
    """
    folder = tmp_path_factory.mktemp("launched")
    pairs = write_run(random_model, folder / "pairs", 40)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = folder / "worker.py"
    script.write_text(EVALUATION + WORKER)
    done = python(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no",
        "--num_processes=2", f"--main_process_port={port}", script, random_model, folder, pairs, "adaptive", env=PATHS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_two_processes_give_the_trajectory_of_one(random_model: Path, launched: tuple[Path, str]) -> None:
    folder, printed = launched
    run_train(run_config(random_model, folder / "pairs", alpha="adaptive"), folder / "single")
    assert sorted(line for line in printed.splitlines() if line in ("led", "followed")) == ["followed", "led"]
    expected, found = (json.loads((folder / name / "report.json").read_text()) for name in ("single", "double"))
    assert found["settings"] == expected["settings"]
    for name in ("loss", "grad_norm", "rewards/margins", "alpha", "logps/chosen"):
        ours, theirs = ([entry[name] for entry in report["history"]] for report in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=name)
    assert len(set(theirs_alpha := [entry["alpha"] for entry in expected["history"]])) > 1, theirs_alpha
    adapters = [load_file(folder / name / "model" / "adapter_model.safetensors") for name in ("double", "single")]
    for name, values in adapters[1].items():
        np.testing.assert_allclose(adapters[0][name], values, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_two_processes_evaluate_to_the_numbers_of_one(random_model: Path, launched: tuple[Path, str]) -> None:
    folder, _ = launched
    alone = python("-c", EVALUATION, random_model, folder)
    assert alone.returncode == 0, alone.stderr
    expected, *found = (json.loads((folder / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert len(expected["predictions"]) == 11
    assert len({round(value, 9) for value in expected["predictions"]}) == 11  # no two alike, or an order says nothing
    for numbers in found:
        for name, value in expected.items():
            if "per_second" not in name and "time" not in name:
                np.testing.assert_allclose(numbers[name], value, rtol=1e-9, err_msg=name)


def test_processes_that_transformers_does_not_join_are_refused(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train a model of its own on a part of every batch, and say nothing."""
    pairs = write_run(random_model, tmp_path / "pairs", 20)
    monkeypatch.setenv("WORLD_SIZE", "2")  # without a rank nobody joins
    monkeypatch.setattr("bvpo_stats.studies.train.run.pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(UserError, match="2 processes were started"):
        run_train(run_config(random_model, pairs), tmp_path / "run")
