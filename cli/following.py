"""How one command goes on from another: the last line of each, and the runs that a bare command finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvpo_stats.embedded.assets import EMBEDDED
from bvpo_stats.errors import UserError, one_line
from bvpo_stats.progress import say

if TYPE_CHECKING:
    from bvpo_stats.pages.runs import Run
    from bvpo_stats.studies.base import Report


def show(report: Report, output: Path) -> None:
    """Prints a run's report, and the command that goes on from it."""
    report.print(output)
    following = next_command(report, output)
    if following is not None:
        print(one_line(f"Next: {following}"))


def next_command(report: Any, output: Path) -> str | None:
    """The command that goes on from a run; words in capitals are the user's to fill in. None after the last.

    Args:
        report: Of a study.
        output: Folder of its run.
    """
    ours = is_embedded(getattr(report, "model", EMBEDDED))
    model = "" if ours else " --model MODEL"
    match report.study:
        case "sample" if report.shard == "1/1":
            return f"bvpo-stats pairs --samples {output} --reward {'embedded' if ours else 'model:REWARD-MODEL'}{model}"
        case "pairs":
            preferences = getattr(report, "preferences", None)
            bank = f" --traces {output}" if preferences is not None and preferences.drawn else ""
            return f"bvpo-stats alpha-star --pairs {output}{bank}{model}"
        case "traces":
            return f"bvpo-stats alpha-star --adapter ADAPTER --pairs PAIRS --traces {output}{model}"
        case "variance":
            return "bvpo-stats alpha-star" + ("" if ours else f" --pairs PAIRS{model}")
        case "alpha-star":
            return "bvpo-stats train --alpha adaptive" + ("" if ours else f" --pairs PAIRS{model}")
        case "train":
            return f"bvpo-stats evaluate --adapter {output / 'model'}{model}"
        case "evaluate":
            return f"bvpo-stats report {output.parent}"
    return None


def is_embedded(model: Any) -> bool:
    """Whether a model's identity, as a report has it, is that of the embedded model, whatever adapter is on it."""
    return str(model).partition("@")[0] == EMBEDDED


def newest_run(output: Path, study: str, fits: Callable[[Run], bool] = lambda run: True) -> Run | None:
    """The finished run of a study that was finished last, among the folders beside a command's own.

    Args:
        output: The command's own folder.
        study: Which study.
        fits: Whether a run will do.
    """
    from bvpo_stats.pages.runs import read_run
    from bvpo_stats.studies.base import REPORT_FILE

    found = [
        read_run(path.parent, path.parent.name)
        for path in output.parent.glob(f"*/{REPORT_FILE}")
        if path.parent.resolve() != output.resolve()
    ]
    runs = [run for run in found if run.report is not None and run.study == study and fits(run)]
    return max(runs, key=lambda run: (run.folder / REPORT_FILE).stat().st_mtime, default=None)


def found_run(output: Path, study: str, option: str, fits: Callable[[Run], bool] = lambda run: True) -> Run:
    """That of `newest_run`, and says so.

    Args:
        output: The command's own folder.
        study: Which study.
        option: Which option it stands for.
        fits: Whether a run will do.

    Raises:
        UserError: There is none.
    """
    run = newest_run(output, study, fits)
    if run is None:
        raise UserError(
            f"`{option}` is not given, and {output.parent} holds no finished run of `bvpo-stats {study}` that would "
            f"do. Give it, or run `bvpo-stats {study}` first."
        )
    say(f"Takes `{option}={str(run.folder)!r}`: the last finished run of `bvpo-stats {study}` there.")
    return run
