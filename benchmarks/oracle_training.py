"""The oracle training study at its committed settings: which alpha trains best, for SGD and for AdamW?

    python benchmarks/oracle_training.py       # hours of one core; goes on where it stopped

Runs ``bvpo-stats oracle-training`` with its defaults, one run an optimizer (start it three times with ``--optimizer``
to use three cores), and keeps the joint report as ``oracle_training.md`` beside this file, its figures and its
``report.json`` under ``figures/oracle-training``. Whatever is done when it is stopped is in the report of
``--report-only``.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bvpo_stats.lab.oracle_training.config import OPTIMIZERS, OracleTrainingConfig
from bvpo_stats.lab.oracle_training.report import OracleTrainingReport
from bvpo_stats.lab.oracle_training.run import METHODS, RUNS_FILE, run_oracle_training
from bvpo_stats.store.jsonl import read_jsonl, write_atomic


def _work_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["optimizer"], row["horizon"], row["model"], row["method"]


def joint_report(work: Path) -> OracleTrainingReport:
    """Of what is done: methods with all step sizes and seeds of a setting."""
    config = OracleTrainingConfig()
    paths = [path for name in OPTIMIZERS if (path := work / name / RUNS_FILE).exists()]
    found = [row for path in paths for _, row in read_jsonl(path)]
    runs = Counter(map(_work_of, found))
    rows = [row for row in found if runs[_work_of(row)] == 3 * config.seeds]
    planned = len(OPTIMIZERS) * len(config.horizons) * config.models
    settings = json.loads(json.dumps(config.to_dict()))
    return OracleTrainingReport.of(settings, [asdict(method) for method in METHODS], rows, planned)


def main() -> None:
    """Runs the study and keeps what is committed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/oracle-training"), help="the runs; kept, to resume from"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=None, help="only this one")
    parser.add_argument("--report-only", action="store_true", help="of what is done already")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--figures", type=Path, default=Path("figures/oracle-training"))
    arguments = parser.parse_args()
    if not arguments.report_only:
        for name in OPTIMIZERS if arguments.optimizer is None else (arguments.optimizer,):
            run_oracle_training(OracleTrainingConfig(optimizers=(name,)), arguments.work / name)
    report = joint_report(arguments.work)
    arguments.figures.mkdir(parents=True, exist_ok=True)
    pictures = report.figures(arguments.figures)
    write_atomic(arguments.figures / "report.json", report.to_json())
    markdown = report.present().markdown(pictures, report.versions)
    write_atomic(
        arguments.output / "oracle_training.md", markdown.replace("](figures/", "](../figures/oracle-training/")
    )


if __name__ == "__main__":
    main()
