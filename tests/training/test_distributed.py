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
from safetensors.numpy import load_file

from bvpo_stats.studies.train import run_train
from tests.training.records import run_config, write_run

WORKER = """
import sys
from pathlib import Path
from bvpo_stats.studies.train import run_train
from tests.training.records import run_config

model, pairs, output, alpha = sys.argv[1:]
report = run_train(run_config(Path(model), Path(pairs), alpha=alpha), Path(output))
print("led" if report is not None else "followed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("alpha", ["adaptive", "0.5"])
def test_two_gloo_processes_give_the_trajectory_of_one(random_model: Path, tmp_path: Path, alpha: str) -> None:
    pairs = write_run(random_model, tmp_path / "pairs", 40)
    run_train(run_config(random_model, pairs, alpha=alpha), tmp_path / "single")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(random_model), str(pairs), str(tmp_path / "double"), alpha],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert [out.strip().splitlines()[-1] for out, _ in said] == ["led", "followed"]
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
