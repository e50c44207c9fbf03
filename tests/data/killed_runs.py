"""Kills a sampling run again and again: ``python -m tests.data.killed_runs MODEL PROMPTS OUTPUT KILLS``.

Every run is a process of its own that is ended by SIGKILL. It is forked from this one after the imports, which saves the
seconds that importing torch takes; nothing else is shared. Prints one JSON line: how each process ended, and how many
bytes stood in the file then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from bvpo_stats.data.engines.base import SamplingOptions
from bvpo_stats.model.policy import PolicyOptions
from bvpo_stats.studies.sample import SampleConfig, run_sample

BATCH = 8


def config(model: str, prompts: str) -> SampleConfig:
    return SampleConfig(
        policy=PolicyOptions(model=model),
        sampling=SamplingOptions(samples=4, max_new_tokens=20, temperature=0.5),
        prompts=prompts,
        batch_size=BATCH,
    )


def start(model: str, prompts: str, output: Path) -> int:
    """Starts a run; returns the id of its process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run_sample(config(model, prompts), output)
            code = 0
        finally:
            os._exit(code)
    return child


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_at_random(child: int, samples: Path, chance: random.Random) -> int:
    """SIGKILL after up to three more batches and a moment longer; returns how the process ended."""
    goal, seen, before = chance.randrange(4), 0, size(samples)
    while seen < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
        if size(samples) != before:
            seen, before = seen + 1, size(samples)
    time.sleep(chance.uniform(0, 0.05 if goal else 0.6))
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    model, prompts, folder, kills = sys.argv[1:]
    output, chance = Path(folder), random.Random(0)
    ends = []
    for _ in range(int(kills)):
        child = start(model, prompts, output)
        code = kill_at_random(child, output / "samples.jsonl", chance)
        ends.append((code, size(output / "samples.jsonl")))
    last = os.waitstatus_to_exitcode(os.waitpid(start(model, prompts, output), 0)[1])
    print(json.dumps([*ends, (last, size(output / "samples.jsonl"))]))


if __name__ == "__main__":
    main()
