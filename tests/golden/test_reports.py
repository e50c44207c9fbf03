"""Golden reports: every command in small, its output compared number by number with what is committed in ``reports/``.

They hold still what a rearrangement of the code must not change: numbers, keys, texts, file names, commands, options.
Only the command line is used, no module behind it. After a change that is meant to change a number, renew them with

    python -m tests.golden.renew [NAME ...]

and look at the difference: a number may change only in a commit that says why.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.cases import COMMANDS, Runs, all_records
from tests.golden.comparison import differences, tolerance

REPORTS = Path(__file__).parent / "reports"
MADE_ON = REPORTS.parent / "made_on.json"


@pytest.mark.parametrize("name", ["help", *COMMANDS])
def test_nothing_has_changed(name: str, golden: Runs) -> None:
    kept = json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))
    found = json.loads(json.dumps(all_records(golden)[name]()))
    made_on = json.loads(MADE_ON.read_text(encoding="utf-8"))[name]
    changes = differences(kept, found, name, tolerance(name, made_on))
    if changes:
        heading = f"{len(changes)} differences from tests/golden/reports/{name}.json, kept -> found:"
        pytest.fail("\n".join([heading, *changes]), pytrace=False)


def test_every_report_has_a_case() -> None:
    assert {path.stem for path in REPORTS.glob("*.json")} == {"help", *COMMANDS}
