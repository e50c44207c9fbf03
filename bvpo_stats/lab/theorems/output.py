"""The theorems report for people: one table of claims, and what the verdicts mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bvpo_stats.studies.base import Finding, Presentation, ResultTable

_HEAD = ("Claim", "Quantity", "Measured", "Should be", "Verdict", "Source")
_TEXT_COLUMNS = (1, 4, 5)
_DEFINITIONS = 2
"""Notes that say what the numbers are; the others are remarks, claim by claim."""


def present(report: dict[str, Any]) -> Presentation:
    """A theorems report as people see it.

    Args:
        report: ``report.json`` of ``bvpo-stats theorems``.
    """
    config = report["config"]
    return Presentation(
        title="Do the theorems hold?",
        findings=tuple(_findings(report)),
        tables=tuple(
            ResultTable(topic["title"], _HEAD, tuple(_row(check) for check in topic["checks"]), _TEXT_COLUMNS)
            for topic in report["topics"]
        ),
        notes=(
            "Verdicts: holds; holds with limits (true under conditions that the remark names); loose (true, but more "
            "than 1.5 times away from what it bounds or stands for); fails. A sentence marked * is known to be too "
            "strong: its failure is a result.",
            f"Exact values by enumeration of small language models in float64; samples of {config['draws']} examples, "
            f"beta = {config['beta']:g}, seed {config['seed']}. Tolerance: rounding (1e-10) or 4 standard errors; "
            "wider where the claim is a limit.",
            *_remarks(report),
        ),
    )


def present_topic(topic: dict[str, Any]) -> Presentation:
    """One topic of it, remarks in a column of their own.

    Args:
        topic: An entry of ``topics`` in ``report.json``.
    """
    head = ("Claim", "Quantity", "Measured", "Should be", "Verdict", "Remark")
    rows = tuple((*_row(check)[:-1], check["note"]) for check in topic["checks"])
    return Presentation(title=topic["title"], tables=(ResultTable(topic["title"], head, rows, (1, 4, 5)),))


def _findings(report: dict[str, Any]) -> list[Finding]:
    checks = [check for topic in report["topics"] for check in topic["checks"]]
    firm = [check for check in checks if check["should_hold"]]
    alarms = [check for check in firm if check["verdict"] == "fails"]
    if alarms:
        words = " ".join(check["claim"] for check in alarms)
        found = [Finding(f"{len(alarms)} of {len(firm)} claims that should hold do not: {words}", "fails")]
    else:
        loose = sum(check["verdict"] == "loose" for check in firm)
        limited = sum(check["verdict"] == "holds with limits" for check in firm)
        found = [
            Finding(f"All {len(firm)} claims that should hold do, {limited} within limits, {loose} loosely.", "holds")
        ]
    strong = [check["claim"] for check in checks if not check["should_hold"] and check["verdict"] == "fails"]
    if strong:
        listed = " ".join(f'"{claim}"' for claim in strong)
        found.append(Finding(f"{len(strong)} sentences are too strong as worded: {listed}"))
    return found


def _remarks(report: dict[str, Any]) -> list[str]:
    return [
        f"{check['claim']} {check['note']}" for topic in report["topics"] for check in topic["checks"] if check["note"]
    ]


def _row(check: dict[str, Any]) -> tuple[str, ...]:
    wanted = _number(check["exact"])
    if check["relation"] != "=":
        wanted = f"{check['relation']} {wanted}"
    elif check["tolerance"]:
        wanted += f" ± {check['tolerance']:.1g}"
    return (
        check["claim"] + ("" if check["should_hold"] else " *"),
        check["quantity"],
        _number(check["measured"]),
        wanted,
        check["verdict"],
        check["source"],
    )


def _number(value: float | None) -> str:
    """Four digits; rounding residue as such."""
    return "-" if value is None else f"{value:.2g}" if 0 < abs(value) < 1e-6 else f"{value:.4g}"


def print_report(report: dict[str, Any], folder: Path) -> None:
    """Prints the table and what it means on standard output; quantities and remarks stand in ``report.md``."""
    shown = present(report)
    tables = tuple(_narrow(table) for table in shown.tables)
    written = f"{folder / 'report.json'}, report.md (quantities, sources, remarks), figures/"
    replace(shown, tables=tables, notes=shown.notes[:_DEFINITIONS]).print(written)


def _narrow(table: ResultTable) -> ResultTable:
    """The columns that fit a terminal."""
    keep = [_HEAD.index(name) for name in ("Claim", "Measured", "Should be", "Verdict")]
    rows = tuple(tuple(row[column] for column in keep) for row in table.rows)
    return ResultTable(table.title, tuple(_HEAD[column] for column in keep), rows, (3,))
