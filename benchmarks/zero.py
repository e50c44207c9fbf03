"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes against one process: weights after AdamW steps, and what was saved.

    python benchmarks/zero.py          # minutes on two cores; says so and ends where DeepSpeed is not installed

The runs are those of `tests/training/sharded.py`, on CPUs, joined by gloo, in float32.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import machine
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
CASES = {
    "float32": "all weights",
    "tied32": "all weights, tied head",
    "checkpointed32": "all weights, layers computed again",
    "lora32": "LoRA, two batches a step",
    "scheduled32": "LoRA, alpha by a schedule",
    "resumed32": "all weights, stopped and resumed",
}
GOAL = 1e-5


def run(model: Path, folder: Path, runs: list[str], world: int) -> None:
    """Runs in so many processes, to their end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.training.sharded", str(model), str(folder), *runs]
    started = []
    for rank in range(world):
        several = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port}  # fmt: skip
        started.append(subprocess.Popen(command, cwd=ROOT, env=common | (several if world > 1 else {})))
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"A process of {' '.join(runs)} failed.")


def worst(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of any element."""
    assert set(one) == set(two)
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def saved(folder: Path, weights: dict[str, torch.Tensor]) -> float:
    """How far what was saved is from what was trained."""
    adapter = folder / "model" / "adapter_model.safetensors"
    if adapter.exists():
        found = {key.replace(".weight", ".default.weight"): value for key, value in load_file(adapter).items()}
    else:
        found = load_file(folder / "model" / "model.safetensors")
    tied = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]} if "lm_head.weight" in found else weights
    return worst(found, {key: (weights if key in weights else tied)[key] for key in found})


def rows(folder: Path) -> list[dict[str, Any]]:
    """What the runs in a folder differ by from those of one process."""
    found = []
    for name, words in CASES.items():
        one = torch.load(folder / f"plain-{name}.pt", weights_only=False)
        for kind in ("zero2", "zero3"):
            two = torch.load(folder / f"{kind}-{name}.pt", weights_only=False)
            assert (two["wrapper"], two["type"]) == ("DeepSpeedEngine", "DEEPSPEED")
            losses = [abs(a["loss"] - b["loss"]) for a, b in zip(one["log"], two["log"], strict=True)]
            found.append(
                {
                    "case": words,
                    "stage": kind[-1],
                    "weights": worst(one["weights"], two["weights"]),
                    "loss": max(losses),
                    "saved": saved(folder / f"{kind}-{name}", two["weights"]),
                    "steps": len(losses),
                }
            )
    return found


def page(found: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "# DeepSpeed's ZeRO against one process",
        "",
        "Two processes on CPUs, joined by gloo; float32 weights; AdamW. Largest differences from the same run in one",
        f"process: of any weight after the last step (goal: {GOAL:g}) and of the logged losses; and of what was saved",
        "from what was trained.",
        "",
        "| case | ZeRO | steps | weights | losses | saved | goal |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in found:
        met = "met" if row["weights"] <= GOAL else "**missed**"
        lines.append(
            f"| {row['case']} | {row['stage']} | {row['steps']} | {row['weights']:.1e} | {row['loss']:.1e} "
            f"| {row['saved']:.0e} | {met} |"
        )
    lines += ["", "## Machine", "", *(f"- {key}: {value}" for key, value in machine().items())]
    return "\n".join([*lines, f"- deepspeed: {importlib.metadata.version('deepspeed')}", ""])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "zero.md")
    parser.add_argument("--runs", type=Path, help="Where finished runs are, and where new ones are put.")
    given = parser.parse_args()
    if importlib.util.find_spec("deepspeed") is None:
        raise SystemExit("DeepSpeed is not installed (`pip install 'bvpo-stats[deepspeed]'`): nothing was run.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        both = [f"zero{stage}-{name}" for stage in (2, 3) for name in CASES]
        for world, runs in ((1, [f"plain-{name}" for name in CASES]), (2, both)):
            missing = [name for name in runs if not (folder / f"{name}.pt").exists()]
            if missing:
                run(small_model(folder / "random"), folder, missing, world)
        found = rows(folder)
    given.output.write_text(page(found))
    print(page(found))
    if any(row["weights"] > GOAL for row in found):
        raise SystemExit(1)


def small_model(folder: Path) -> Path:
    """A small model with random weights, the tests' own."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import save_random_model

    return save_random_model(folder)


if __name__ == "__main__":
    main()
