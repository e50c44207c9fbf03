"""``bvpo-stats traces``: the trace bank."""

from __future__ import annotations

from pathlib import Path

from bvpo_stats.studies.traces.config import TracesConfig

EXAMPLES = """Examples:

bvpo-stats traces --pairs runs/pairs --samples runs/sample --output runs/traces

bvpo-stats traces --pairs runs/pairs --samples runs/sample --traces-per-answer 16 --sources anchor,mh --mh-moves 5"""


def traces(config: TracesConfig, output: Path) -> None:
    """Collect K traces for each answer of D_t: its own, other samples', regenerated ones, and prior ones."""
    from bvpo_stats.studies.traces.run import run_traces

    from .following import show

    show(run_traces(config, output), output)
