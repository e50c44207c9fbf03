"""``bvpo-stats doctor``: what this machine and a model are good for."""

from __future__ import annotations

from pathlib import Path

import typer

from bvpo_stats.studies.doctor import DoctorConfig

EXAMPLES = """Examples:

bvpo-stats doctor

bvpo-stats doctor --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --gpus 8 --prompts 10000

bvpo-stats doctor --json

Exits with 2 where something stands in the way."""


def doctor(config: DoctorConfig, output: Path) -> None:
    """Say what is installed and free, how a model is prompted, what would be refused, and what a run takes.

    No weights are loaded: a model is judged by its configuration and its tokenizer.
    """
    import json
    from dataclasses import asdict

    from bvpo_stats.errors import one_line, wording
    from bvpo_stats.studies.doctor import diagnose

    found = diagnose(config, output)
    if config.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        for line in found.lines():
            print(one_line(wording.get()(line)))
    if not found.well:
        raise typer.Exit(2)
