"""Sampling runs in processes of their own, killed or side by side.

``python -m tests.sampling.killed_runs kills N MODEL PROMPTS OUTPUT`` ends a run by SIGKILL again and again, then lets
it finish; ``... shards N ...`` runs all shards of it at once. The processes are forked from this one after the imports,
which saves the seconds that importing torch takes; nothing else is shared. Prints one JSON line: how each process ended
and how many bytes stood in ``samples.jsonl`` then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from bvpo_stats.model.policy import PolicyOptions, load_policy
from bvpo_stats.store.run_folder import Shard
from bvpo_stats.studies.sample.config import SampleConfig
from bvpo_stats.studies.sample.run import run_sample

BATCH = 8


def config(model: str, prompts: str) -> SampleConfig:
    return SampleConfig(
        policy=PolicyOptions(model=model),
        samples=4,
        max_new_tokens=12,
        temperature=0.5,
        prompts=prompts,
        batch_size=BATCH,
    )


def start(settings: SampleConfig, output: Path) -> int:
    """Starts a run; returns the id of its process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run_sample(settings, output)
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
    return wait(child)


def wait(child: int) -> int:
    """Waits for a process; how it ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    what, count, model, prompts, folder = sys.argv[1:]
    output, settings = Path(folder), config(model, prompts)
    load_policy(PolicyOptions(model=model))  # for the imports that transformers puts off until then
    ends = []
    if what == "kills":
        chance = random.Random(0)
        for _ in range(int(count)):
            code = kill_at_random(start(settings, output), output / "samples.jsonl", chance)
            ends.append((code, size(output / "samples.jsonl")))
        ends.append((wait(start(settings, output)), size(output / "samples.jsonl")))
    else:
        shards = [Shard(index + 1, int(count)) for index in range(int(count))]
        children = [start(replace(settings, shard=shard, parquet=True), output) for shard in shards]
        ends.extend((wait(child), 0) for child in children)
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
