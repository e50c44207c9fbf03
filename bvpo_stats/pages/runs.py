"""The runs under a folder, finished or not, and the kinds of report: a new study adds one line to `KINDS`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.store.jsonl import altered_words, is_altered
from bvpo_stats.store.run_folder import RUN_FILE
from bvpo_stats.studies.base import REPORT_FILE, Report

KINDS = {  # in the order of the story that a page tells
    "variance": "bvpo_stats.studies.variance.report:VarianceReport",
    "sample": "bvpo_stats.studies.sample.report:SampleReport",
    "pairs": "bvpo_stats.studies.pairs.report:PairsReport",
    "traces": "bvpo_stats.studies.traces.report:TracesReport",
    "alpha-star": "bvpo_stats.studies.alpha_star.report:AlphaReport",
    "theorems": "bvpo_stats.lab.theorems.report:TheoremsReport",
    "train": "bvpo_stats.studies.train.report:TrainReport",
    "evaluate": "bvpo_stats.studies.evaluate.report:EvaluationReport",
    "oracle-training": "bvpo_stats.lab.oracle_training.report:OracleTrainingReport",
}
"""Class of each study's report, by what stands under ``study`` in its ``report.json``."""


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        folder: Where it is.
        name: Path below the folder that was searched, for people.
        study: Which study made it, None where nothing says so.
        configuration: What ``run.json`` says decides its numbers.
        report: ``report.json``, None where there is none to read.
        problem: Why there is no report.
    """

    folder: Path
    name: str
    study: str | None
    configuration: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    problem: str | None = None

    def read(self) -> Report:
        """The report as its study's own class, whose module is imported only now.

        Raises:
            UserError: There is none, it is of another version of the study, or the study is unknown here.
        """
        if self.report is None:
            raise UserError(self.problem or f"{self.name} has no report.")
        if self.study not in KINDS:
            raise UserError(f"No report of {self.study or 'an unnamed study'} is known here.")
        module, _, name = KINDS[self.study].partition(":")
        kind: type[Report] = getattr(import_module(module), name)
        return kind.from_dict(self.report)


def find_runs(root: Path) -> list[Run]:
    """All runs in a folder and below it, in the order of their paths; hidden folders are passed over.

    What lies inside a run's folder is part of that run.

    Raises:
        UserError: No such folder, or no run in it.
    """
    if root.is_file() and root.name == REPORT_FILE:
        root = root.parent
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Give the `output` folder of a run, or a folder that holds some.")
    runs = []
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if RUN_FILE in files or REPORT_FILE in files:
            folder = Path(place)
            if RUN_FILE in files:
                folders.clear()
            runs.append(read_run(folder, _name(folder, root)))
    if not runs:
        raise UserError(f"{root}: no run in it. Give the `output` folder of a run, or a folder that holds some.")
    return runs


def read_run(folder: Path, name: str) -> Run:
    """Reads what a run left; whatever is wrong with its files is told in ``problem``, never raised."""
    configuration, _ = _read_object(folder / RUN_FILE)
    configuration = configuration or {}
    command = configuration.pop("command", None)
    report, problem = _read_object(folder / REPORT_FILE)
    if report is None and problem is None:
        problem = (
            f"No {REPORT_FILE} yet: the run is going on, was interrupted, or is one of several shards. The same "
            "command with the same `output` goes on with it."
        )
    study = (report or {}).get("study", command)
    return Run(folder, name, str(study) if study is not None else None, configuration, report, problem)


def story_order(study: str | None) -> int:
    """Place of a study on a page; unknown ones come last."""
    return list(KINDS).index(study) if study in KINDS else len(KINDS)


def _name(folder: Path, root: Path) -> str:
    below = folder.relative_to(root)
    return below.as_posix() if below.parts else folder.resolve().name


def _read_object(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(content, problem): neither where there is no such file."""
    if not path.exists():
        return None, None
    if is_altered(path):
        return None, altered_words(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{path.name} cannot be read ({error}). Run the command again to have it rewritten."
    if not isinstance(content, dict):
        return None, f"{path.name} holds no JSON object. Run the command again to have it rewritten."
    return content, None
