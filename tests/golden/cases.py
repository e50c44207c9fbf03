"""What the golden reports cover: one command line a case, in small, on the embedded model.

A case names the runs it builds on as ``{sample}``, ``{train}`` and so on. :class:`Runs` makes each run once for a whole
test session, however many cases (and pytest-xdist workers) need it.
"""

from __future__ import annotations

import fcntl
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.running import run
from tests.processes import python

COMMANDS = {
    # By far the longest case (half of all time; no option makes it shorter), hence first: beside it, a second worker of
    # pytest-xdist does all others.
    "theorems": "theorems --draws 2048 --embedded-prompts 10",
    "variance": "variance --limit 8",
    # The chain: each case builds on those before it. Temperature 1, so that the trace gradient is unbiased.
    "sample": "sample --limit 24 --samples 4 --temperature 1",
    "pairs": "pairs --samples {sample} --reward embedded --ref-logps",
    "traces": "traces --pairs {pairs} --samples {sample} --traces-per-answer 3 --mh-moves 1",
    "alpha-star": "alpha-star --limit 40",
    "train": "train --pairs {pairs} --unmatched drop --alpha 0.3 --batch-size 8 --max-steps 10",
    "train-adaptive": (
        "train --pairs {pairs} --traces {traces} --unmatched drop --alpha adaptive "
        "--alpha-update-steps 3 --batch-size 4 --max-steps 12"
    ),
    "alpha-star-off-reference": "alpha-star --adapter {train}/model --pairs {pairs} --traces {traces}",
    "evaluate": "evaluate --adapter trained={train}/model --limit 8 --samples 2",
    "oracle-training": "oracle-training --optimizers adamw --models 2 --horizons 8 --seeds 2",
}
"""Name of a case -> its command line without ``--output``."""


class Runs:
    """The runs of a test session, each in a folder named after its case and made when first asked for."""

    def __init__(self, folder: Path) -> None:
        """Names the place; nothing is run yet.

        Args:
            folder: Holds the runs; several processes may share it.
        """
        self.folder = folder

    def output(self, name: str) -> Path:
        """The finished run of a case, after those that it builds on.

        Args:
            name: The case.
        """
        command = COMMANDS[name]
        needed = {field: self.output(field) for _, field, _, _ in string.Formatter().parse(command) if field}
        output = self.folder / name
        with _locked(self.folder / f"{name}.lock"):
            done = self.folder / f"{name}.done"
            if not done.exists():
                words = [word.format(**needed) for word in command.split()]
                # the theorems take twice the time under the tests' type checks, which tests/lab puts each topic under
                unchecked = name == "theorems"
                command_line = (*words, "--output", output)
                result = python("-m", "bvpo_stats.cli.main", *command_line) if unchecked else run(*command_line)
                assert result.returncode == 0, f"bvpo-stats {' '.join(words)}: {result.stderr}"
                done.write_text(result.stdout, encoding="utf-8")
        return output

    def printed(self, name: str) -> str:
        """What the run of a case printed.

        Args:
            name: The case.
        """
        self.output(name)
        return (self.folder / f"{name}.done").read_text(encoding="utf-8")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other workers out, so that none makes a run that another is making."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def all_records(runs: Runs) -> dict[str, Callable[[], object]]:
    """What is kept of every case, as functions that take it from the runs (which can take a minute)."""
    from tests.golden.help import help_record
    from tests.golden.records import run_record

    records: dict[str, Callable[[], object]] = {"help": help_record}
    for name in COMMANDS:
        records[name] = lambda name=name: run_record(runs.output(name))
    return records
