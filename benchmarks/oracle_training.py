"""The oracle training study at its committed settings: does an estimated alpha train better than a fixed one?

    python benchmarks/oracle_training.py       # about 12 minutes of one core; goes on where it stopped

Runs ``bvpo-stats oracle-training`` with its defaults and keeps its report as ``oracle_training.json`` and
``oracle_training.md`` beside this file, its figures under ``figures/oracle-training``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from bvpo_stats.cli.main import main as command


def main() -> None:
    """Runs the study and copies what is committed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/oracle-training"), help="the run; kept, to resume from")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--figures", type=Path, default=Path("figures/oracle-training"))
    arguments = parser.parse_args()
    try:
        command(["oracle-training", "--output", str(arguments.work)])
    except SystemExit as stop:
        if stop.code:
            raise
    arguments.figures.mkdir(parents=True, exist_ok=True)
    shutil.copy(arguments.work / "report.json", arguments.output / "oracle_training.json")
    shutil.copy(arguments.work / "report.json", arguments.figures / "report.json")
    text = (arguments.work / "report.md").read_text(encoding="utf-8")
    text = text.replace("](figures/", "](../figures/oracle-training/")
    (arguments.output / "oracle_training.md").write_text(text, encoding="utf-8")
    for picture in (arguments.work / "figures").glob("*.png"):
        shutil.copy(picture, arguments.figures / picture.name)


if __name__ == "__main__":
    main()
