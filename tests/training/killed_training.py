"""Training runs that end by SIGKILL, again and again, at given moments of given steps; the last one finishes.

``python -m tests.training.killed_training MODEL PAIRS OUTPUT MOMENT:STEP ...``. The processes are forked from this one
after the imports, which saves the seconds that importing torch takes; nothing else is shared. Prints how each ended.

Moments: ``begin`` (before a step), ``end`` (after it, before its checkpoint), ``saving`` (a checkpoint has its adapter
but no optimizer yet), ``half`` (its state is cut off in the middle), ``sealing`` (all of it is there but the
checksums); after the last step ``model`` (the model is written, without its checksums) and ``report`` (all but that).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerState

from bvpo_stats.model.policy import PolicyOptions, load_policy
from bvpo_stats.studies.train import run as run_module
from bvpo_stats.studies.train.run import run_train
from bvpo_stats.training import trainer as module
from tests.training.records import run_config


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, step: int) -> None:
    """Sets the trap in this process."""
    if moment in ("begin", "end"):
        name = f"on_step_{moment}"
        before = getattr(module.AlphaCallback, name)

        def spring(self: Any, args: Any, state: Any, control: Any, **more: Any) -> Any:
            found = before(self, args, state, control, **more)
            return die() if state.global_step == step else found

        setattr(module.AlphaCallback, name, spring)
    elif moment == "saving":
        write = module.save_state

        def saved(folder: Path, *rest: Any) -> None:
            write(folder, *rest)
            if folder.name == f"checkpoint-{step}":
                die()

        module.save_state = saved
    elif moment == "sealing":
        seal = module.seal_folder
        module.seal_folder = lambda folder: die() if folder.name == f"checkpoint-{step}" else seal(folder)
    elif moment == "model":
        run_module.seal_folder = lambda folder: die()
    elif moment == "report":
        run_module.train_report = lambda trainer, method: die()
    else:
        whole = TrainerState.save_to_json

        def cut(self: TrainerState, path: str) -> None:
            whole(self, path)
            if self.global_step == step:
                text = Path(path).read_text(encoding="utf-8")
                Path(path).write_text(text[: len(text) // 2], encoding="utf-8")
                die()

        TrainerState.save_to_json = cut  # type: ignore[method-assign]


def run(model: str, pairs: str, output: str, trap: str | None) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if trap is not None:
                moment, _, step = trap.partition(":")
                arm(moment, int(step))
            run_train(run_config(Path(model), Path(pairs)), Path(output))
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    model, pairs, output, *traps = sys.argv[1:]
    load_policy(PolicyOptions(model=model))  # for the imports that transformers puts off until then
    ends = [run(model, pairs, output, trap) for trap in (*traps, None)]
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
