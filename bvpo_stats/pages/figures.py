"""Figures of any run, drawn anew from its report alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bvpo_stats.errors import UserError
from bvpo_stats.pages.runs import KINDS, Run, find_runs
from bvpo_stats.progress import progress
from bvpo_stats.store.jsonl import write_sealed
from bvpo_stats.studies.base import REPORT_FILE, to_json


@dataclass(frozen=True)
class Drawn:
    """What became of a run.

    Attributes:
        run: The run.
        figures: Files drawn.
        reason: Why there are none.
    """

    run: Run
    figures: list[Path]
    reason: str | None = None


def draw_figures(run: Run, folder: Path) -> Drawn:
    """Draws a run's figures into a folder; a run that cannot be drawn says why."""
    if run.report is None:
        return Drawn(run, [], run.problem)
    if run.study not in KINDS:
        return Drawn(run, [], f"no figures are known for a report of {run.study or 'an unnamed study'}")
    try:
        figures = run.read().figures(folder)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return Drawn(run, [], f"its report is of another version ({type(error).__name__}: {error})")
    return Drawn(run, figures, None if figures else f"a report of {run.study} has no figures")


def draw_all(sources: Sequence[Path], output: Path) -> list[Drawn]:
    """Draws the figures of all runs under ``sources`` into ``output/RUN/``, each beside the report it shows.

    Without sources, the reports that an earlier call left in ``output`` are drawn anew.

    Args:
        sources: Folders of runs, folders that hold some, or ``report.json`` files.
        output: Where the folders go.

    Raises:
        UserError: No run found, two runs of one name, or a folder in ``output`` that holds another study's figures.
    """
    runs = [run for source in sources or [output] for run in find_runs(source)]
    names = [run.folder.resolve().name for run in runs] if sources else [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"Several runs are called {', '.join(twice)}. Draw them with separate calls and `output`.")
    drawn = []
    with progress("Drawing", len(runs), "runs") as advance:
        for run, name in zip(runs, names, strict=True):
            folder = output / name if sources else run.folder
            _check_same_study(run, folder)
            made = draw_figures(run, folder)
            if made.figures and run.report is not None and sources:
                write_sealed(folder / REPORT_FILE, to_json({"study": run.study, **run.report}))
            drawn.append(made)
            advance(1)
    return drawn


def _check_same_study(run: Run, folder: Path) -> None:
    if not (folder / REPORT_FILE).exists():
        return
    there = find_runs(folder)[0].study
    if there != run.study:
        raise UserError(
            f"{folder} holds figures of {there}, and {run.name} is a run of {run.study}. Nothing was overwritten; name "
            "another `output`."
        )
