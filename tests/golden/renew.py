"""Writes the golden reports anew: ``python -m tests.golden.renew [NAME ...]``, all of them without a name.

A number may change only in a commit that says why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.golden.cases import Runs, all_records
from tests.golden.comparison import machine
from tests.golden.test_reports import MADE_ON, REPORTS


def renew(names: list[str]) -> None:
    """Runs the cases and overwrites their reports.

    Args:
        names: The cases; all for none.
    """
    with tempfile.TemporaryDirectory() as folder:
        records = all_records(Runs(Path(folder)))
        unknown = sorted(set(names) - records.keys())
        if unknown:
            sys.exit(f"Unknown: {', '.join(unknown)}. Known: {', '.join(records)}.")
        made_on = json.loads(MADE_ON.read_text(encoding="utf-8")) if MADE_ON.exists() else {}
        for name in names or records:
            record = records[name]()
            made_on[name] = machine()
            _write(REPORTS / f"{name}.json", record)
            _write(MADE_ON, {known: made_on[known] for known in records if known in made_on})
            print(name, flush=True)


def _write(path: Path, record: object) -> None:
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    renew(sys.argv[1:])
