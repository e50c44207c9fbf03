"""DistributedDataParallel and FSDP2 in two processes against one: the same gradients, weights, log and alpha."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from bvpo_stats.training.config import check_distribution, is_sharded
from bvpo_stats.training.data import deal
from tests.processes import Python, start
from tests.training.records import settings

pytestmark = pytest.mark.slow
ALIKE = ("tied", "checkpointed", "accumulated", "resumed-lora", "adaptive-all", "odd")
NAMES = (*ALIKE, "float32", "killed")


def started(model: Path, folder: Path, runs: list[str], world: int) -> list[Python]:
    """The processes of some runs, as a launcher starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start("-m", "tests.training.sharded", model, folder, *runs,
              env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
        for rank in range(world)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ended(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """What all runs left, and what the first of two processes said last when the other was killed or differed."""
    folder = tmp_path_factory.mktemp("sharded")
    alone = started(random_model, folder, [f"plain-{name}" for name in NAMES], 1)
    both = [f"{kind}-{name}" for kind in ("ddp", "fsdp2") for name in ALIKE]
    killed = [process.wait(600) for process in started(random_model, folder, [*both, "fsdp2-killed"], 2)]
    assert not (folder / "fsdp2-killed.pt").exists()
    assert [result.returncode for result in killed] == [1, -9], killed[0].stderr[-3000:]
    goes_on = ["fsdp2-killed", "fsdp2-float32", "fsdp2-differs"]
    differed = [process.wait(600) for process in started(random_model, folder, goes_on, 2)]
    assert 0 not in [result.returncode for result in differed]
    (reference,) = [process.wait(600) for process in alone]
    assert reference.returncode == 0, reference.stderr[-3000:]
    return folder, killed[0].stderr.splitlines()[-1:], differed[0].stderr.splitlines()[-1:]


@pytest.fixture(scope="module")
def folder(ended: tuple[Path, list[str], list[str]]) -> Path:
    return ended[0]


def found(folder: Path, kind: str, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{kind}-{name}.pt", weights_only=False)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("ddp", "fsdp2") for name in (ALIKE if kind == "ddp" else NAMES)]
)
def test_two_processes_are_one(folder: Path, kind: str, name: str) -> None:
    one, two = found(folder, "plain", name), found(folder, kind, name)
    assert two["wrapper"].startswith("FSDP" if kind == "fsdp2" else "DistributedDataParallel")
    assert two["types"] == (["DTensor"] if kind == "fsdp2" else one["types"])
    assert two["type"] == ("FSDP" if kind == "fsdp2" else "MULTI_CPU")
    assert two["parts"] < 0.6 * one["parts"] if kind == "fsdp2" else two["parts"] == one["parts"]
    gradient, weights = (1e-12, 1e-10) if name != "float32" else (1e-5, 1e-5)
    assert set(one["gradient"]) == set(two["gradient"]) != set()
    for key, value in one["gradient"].items() if name != "killed" else ():  # whose first step is another now
        torch.testing.assert_close(two["gradient"][key], value, rtol=0, atol=gradient, msg=key)
    assert set(one["weights"]) == set(two["weights"])
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, rtol=0, atol=weights, msg=key)
    assert len(one["log"]) == len(two["log"]) >= 3
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        for key in theirs.keys() - {"alpha/time_share", "epoch", "step"}:
            if key.endswith("accuracies") and theirs["step"] == 1:
                continue  # of margins that are 0 up to rounding
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-6), key
    for when in ("before", "after"):
        assert two[when] == pytest.approx(one[when], rel=1e-6)
    assert set(one["lag"]) == set(two["lag"])
    for key, vector in one["lag"].items():
        torch.testing.assert_close(two["lag"][key], vector, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2"])
def test_alpha_moved_curvature_was_seen_and_the_bias_looked_at(folder: Path, kind: str) -> None:
    """Or the comparison above would say nothing of them."""
    for name in ("resumed-lora", "adaptive-all"):
        log = found(folder, kind, name)["log"]
        assert len({round(entry["alpha"], 9) for entry in log}) > 1
        assert log[-1]["alpha/eta_l"] != log[0]["alpha/eta_l"]
    assert found(folder, kind, "resumed-lora")["log"][-1]["alpha/bias_prompts"] > 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_model_saved_by_many_is_read_by_one(folder: Path, kind: str) -> None:
    from safetensors.torch import load_file

    from bvpo_stats.model.policy import load_policy

    weights = found(folder, kind, "checkpointed")["weights"]
    saved = load_file(folder / f"{kind}-checkpointed" / "model" / "model.safetensors")
    assert set(saved) == set(weights)
    for key, value in saved.items():
        assert torch.equal(value, weights[key]), key
    adapter = load_file(folder / f"{kind}-accumulated" / "model" / "adapter_model.safetensors")
    trained = found(folder, kind, "accumulated")["weights"]
    assert adapter
    for key, value in adapter.items():
        assert torch.equal(value, trained[key.replace(".weight", ".default.weight")]), key
    assert load_policy(str(folder / f"{kind}-checkpointed" / "model"), device="cpu").at_reference


def test_processes_that_die_or_differ(ended: tuple[Path, list[str], list[str]]) -> None:
    """The run that was killed is among those above: it went on to the weights of one that was not."""
    _, (killed,), (differed,) = ended
    assert "Another process of this run has ended or cannot be reached" in killed
    words = "not the same to train on: learning_rate: 0.001 there, 0.002 now (there: process 0, now: process 1"
    assert words in differed


def test_prompts_are_dealt_by_tokens() -> None:
    hands = deal([5, 1000, 7, 300, 400, 310, 9, 8], 3)
    assert sorted(number for hand in hands for number in hand) == list(range(8))
    assert hands[0] == [1]
    assert max(sum([5, 1000, 7, 300, 400, 310, 9, 8][n] for n in hand) for hand in hands[1:]) == 610
    assert deal([3, 2], 4) == [[0], [1], [], []]
    assert deal([3, 2, 1], 1) == [[0, 1, 2]]


@pytest.mark.parametrize(("name", "kind", "variables"), [
    ("ddp", "MULTI_GPU", {}),
    ("fsdp2", "FSDP", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}),
])  # fmt: skip
def test_examples_are_what_accelerate_takes_and_we_do(
    name: str, kind: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's own way from file to variables; then our judgement of these."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = str(Path(__file__).parents[2] / "examples" / f"{name}.yaml")
    assert load_config_from_file(path).distributed_type.value == kind
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "script.py"]))
    for variable, value in prepare_multi_gpu_env(parsed).items():
        if variable.startswith(("ACCELERATE_USE_", "FSDP_")):
            monkeypatch.setenv(variable, str(value))
    assert {variable: os.environ.get(variable) for variable in variables} == variables
    args = settings(Path("unused"))
    check_distribution(args)
    check_distribution(args, kind)
    assert is_sharded(args) == (name == "fsdp2")
