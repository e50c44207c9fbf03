"""``bvpo-stats traces``: the trace bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bvpo_stats.studies.traces.config import TracesConfig

EXAMPLES = """Examples:

bvpo-stats traces

bvpo-stats traces --pairs runs/pairs --samples runs/samples --output runs/traces

bvpo-stats traces --pairs runs/pairs --samples runs/samples --traces-per-answer 16 --sources anchor,mh --mh-moves 5"""


def find(given: dict[str, Any], output: Path) -> dict[str, Any]:
    """Pairs, and the samples that they were made from, where the user gave none.

    Args:
        given: Values by option.
        output: The command's folder.

    Raises:
        UserError: There is no run of the kind.
    """
    from bvpo_stats.errors import UserError
    from bvpo_stats.pages.runs import Run, read_run
    from bvpo_stats.store.sample_index import samples_fingerprint

    from .following import found_run

    found: dict[str, Any] = {}
    if "pairs" not in given:
        found["pairs"] = found_run(output, "pairs", "pairs").folder
    if "samples" not in given:
        pairs = Path({**found, **given}["pairs"])
        folder = pairs if pairs.is_dir() else pairs.parent
        known = read_run(folder, folder.name).configuration.get("samples")

        def fits(run: Run) -> bool:
            try:
                return known is None or samples_fingerprint(run.folder) == known
            except UserError:
                return False

        found["samples"] = found_run(output, "sample", "samples", fits).folder
    return found


def traces(config: TracesConfig, output: Path) -> None:
    """Collect K traces for each answer of D_t: its own, other samples', regenerated ones, and prior ones."""
    from bvpo_stats.studies.traces.run import run_traces

    from .following import show

    show(run_traces(config, output), output)
