"""The last line of a command: what to go on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bvpo_stats.embedded.assets import EMBEDDED
from bvpo_stats.errors import one_line
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
    ours = str(getattr(report, "model", EMBEDDED)).partition("@")[0] == EMBEDDED
    model = "" if ours else " --model MODEL"
    match report.study:
        case "sample" if report.shard == "1/1":
            return f"bvpo-stats pairs --samples {output} --reward {'embedded' if ours else 'model:REWARD-MODEL'}{model}"
        case "pairs":
            return f"bvpo-stats alpha-star --pairs {output}{model}"
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
