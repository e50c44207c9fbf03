"""Two processes on one run, with the global batch of a single one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bvpo_stats.errors import UserError
from bvpo_stats.studies.train.run import run_train
from tests.training.records import run_config, write_run

WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
from bvpo_stats.studies.train.run import run_train
from tests.training.records import run_config

model, pairs, output, alpha = sys.argv[1:]
config = run_config(Path(model), Path(pairs), alpha=alpha)
config = replace(config, policy=replace(config.policy, device="auto"))  # as users leave it
report = run_train(config, Path(output))
print("led" if report is not None else "followed")
"""
EVALUATION = """
import json, sys
from pathlib import Path
from bvpo_stats.training import BVPOTrainer
from tests.training.records import adapted, both_sets, settings

model, output = map(Path, sys.argv[1:])
policy = adapted(model, "float64")
pairs = both_sets(policy, 11)  # which neither batches nor processes divide
args = settings(output, per_device_train_batch_size=1, per_device_eval_batch_size=2, precompute_ref_log_probs=True)
trainer = BVPOTrainer(policy, args, pairs, eval_dataset=pairs[4:11])
found = trainer.evaluate() | {"predictions": trainer.predict(pairs).predictions["empty/loss"].tolist()}
(output / f"{args.world_size}-{args.process_index}.json").write_text(json.dumps(found))
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run"],
    # On a machine without GPUs only --multi_gpu makes accelerate start more than one process.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no"],
}


def started(*words: object) -> str:
    """What a Python that ended well has printed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "alpha"), [("torchrun", "adaptive"), ("accelerate", "0.5")])
def test_two_processes_give_the_trajectory_of_one(
    random_model: Path, tmp_path: Path, launcher: str, alpha: str
) -> None:
    pairs = write_run(random_model, tmp_path / "pairs", 40)
    run_train(run_config(random_model, pairs, alpha=alpha), tmp_path / "single")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    count = "--nproc_per_node=2" if launcher == "torchrun" else "--num_processes=2"
    port_option = "--master_port" if launcher == "torchrun" else "--main_process_port"
    arguments = [str(path) for path in (script, random_model, pairs, tmp_path / "double", alpha)]
    printed = started("-m", *LAUNCHERS[launcher], count, f"{port_option}={port}", *arguments)
    assert sorted(line for line in printed.splitlines() if line in ("led", "followed")) == ["followed", "led"]
    expected, found = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("single", "double"))
    assert found["settings"] == expected["settings"]
    for name in ("loss", "grad_norm", "rewards/margins", "alpha", "logps/chosen"):
        ours, theirs = ([entry[name] for entry in report["history"]] for report in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=name)
    if alpha == "adaptive":
        assert len(set(theirs_alpha := [entry["alpha"] for entry in expected["history"]])) > 1, theirs_alpha
    adapters = [load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("double", "single")]
    for name, values in adapters[1].items():
        np.testing.assert_allclose(adapters[0][name], values, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_two_processes_evaluate_to_the_numbers_of_one(random_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(EVALUATION)
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]):
        started(*launcher, script, random_model, tmp_path)
    expected, *found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
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
