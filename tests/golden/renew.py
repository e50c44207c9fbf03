"""Writes the golden reports anew: ``python -m tests.golden.renew [NAME ...]``, all of them without a name.

A number may change only in a commit that says why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.golden.cases import Runs, all_records
from tests.golden.test_reports import REPORTS


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
        for name in names or records:
            text = json.dumps(records[name](), indent=1, ensure_ascii=False)
            (REPORTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            print(f"{name}: {len(text):,} characters", flush=True)


if __name__ == "__main__":
    renew(sys.argv[1:])
