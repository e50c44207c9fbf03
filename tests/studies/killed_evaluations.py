"""An evaluation in processes of its own: killed at several moments, then left to finish.

``python -m tests.studies.killed_evaluations MODEL ADAPTER PROBLEMS OUTPUT`` ends the run by SIGKILL while the base is
sampled, while the adapter is, and while verdicts are put on record. Prints one JSON line: how each process ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from bvpo_stats.model.policy import PolicyOptions, load_policy
from bvpo_stats.studies.evaluate.run import EvaluateConfig, evaluate
from tests.sampling.killed_runs import size, wait


def config(model: str, adapter: str, problems: str) -> EvaluateConfig:
    return EvaluateConfig(
        policy=PolicyOptions(model=model),
        adapters=(f"tuned={adapter}",),
        data=(problems,),
        samples=4,
        max_new_tokens=12,
        instruction="",
        batch_size=8,
    )


def start(settings: EvaluateConfig, output: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            evaluate(settings, output)
            code = 0
        finally:
            os._exit(code)
    return child


def main() -> None:
    model, adapter, problems, folder = sys.argv[1:]
    output, settings = Path(folder), config(model, adapter, problems)
    load_policy(PolicyOptions(model=model))  # for the imports that transformers puts off until then
    name = Path(problems).stem
    ends = []
    for place in (f"samples/base/{name}/samples", f"samples/tuned/{name}/samples", f"verdicts-base-{name}"):
        child = start(settings, output)
        while not size(output / f"{place}.jsonl") and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        ends.append(wait(child))
    ends.append(wait(start(settings, output)))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
