"""The theorems report: claims, what was measured, what is exact, and the verdicts; and how people see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from bvpo_stats.lab.theorems.config import TheoremConfig
from bvpo_stats.studies.base import REPORT_FILE, Finding, Presentation, Report, ResultTable

Verdict = Literal["holds", "holds with limits", "loose", "fails"]
Relation = Literal["=", "<=", ">="]

_HEAD = ("Claim", "Quantity", "Measured", "Should be", "Verdict", "Source")
_TEXT_COLUMNS = (1, 4, 5)
_DEFINITIONS = 2
"""Notes that say what the numbers are; the others are remarks, claim by claim."""

ROUNDING = 1e-10
"""Largest difference of two exact float64 computations of the same quantity."""
STANDARD_ERRORS = 4.0
"""Largest distance of a sampled value from the exact one: a correct one is further out once in 16,000 checks."""


@dataclass(frozen=True)
class Check:
    """One claim, put to the test.

    Attributes:
        claim: The claim, in a sentence.
        quantity: What ``measured`` and ``exact`` are.
        measured: From samples, by brute force over the written-out population, or along a training run.
        exact: From the exact moments, or the bound that the claim states.
        relation: How ``measured`` should stand to ``exact``.
        tolerance: What may be missing from the relation: rounding, or a multiple of the standard error.
        verdict: ``holds``; ``holds with limits`` (the note says which); ``loose`` (true, far from tight); ``fails``.
        should_hold: False for a sentence that is known to be too strong; its failure is a result, not a fault.
        source: Theorem, equation or section.
        note: What a careful reader should know besides.
    """

    claim: str
    quantity: str
    measured: float
    exact: float
    relation: Relation
    tolerance: float
    verdict: Verdict
    should_hold: bool
    source: str
    note: str = ""

    @property
    def alarming(self) -> bool:
        """Whether this should have held and does not."""
        return self.should_hold and self.verdict == "fails"

    @property
    def row(self) -> tuple[str, ...]:
        """The check as cells under claim, quantity, measured, should be, verdict and source."""
        wanted = _number(self.exact)
        if self.relation != "=":
            wanted = f"{self.relation} {wanted}"
        elif self.tolerance:
            wanted += f" ± {self.tolerance:.1g}"
        claim = self.claim + ("" if self.should_hold else " *")
        return claim, self.quantity, _number(self.measured), wanted, self.verdict, self.source


@dataclass(frozen=True)
class Numbers:
    """What is compared; see :class:`Check`."""

    quantity: str
    measured: float
    exact: float
    tolerance: float = ROUNDING
    relation: Relation = "="

    @property
    def agree(self) -> bool:
        """Whether the relation holds within the tolerance; never with NaN."""
        excess = self.measured - self.exact
        if not math.isfinite(excess):
            return False
        missing = {"=": abs(excess), "<=": excess, ">=": -excess}[self.relation]
        return bool(missing <= self.tolerance)


def judge(
    claim: str,
    numbers: Numbers,
    source: str,
    *,
    verdict: Verdict = "holds",
    should_hold: bool = True,
    note: str = "",
) -> Check:
    """A check with the given verdict if its numbers agree, else ``fails``.

    Args:
        claim: The claim.
        numbers: What is compared.
        source: Where the claim is made.
        verdict: What agreement means: ``holds``, or a qualified form of it.
        should_hold: False where failure is the expected result.
        note: What to know besides.

    >>> judge("2 + 2 = 4", Numbers("sum", 2 + 2, 4), "school").verdict
    'holds'
    >>> judge("2 + 2 = 5", Numbers("sum", 2 + 2, 5), "novel").alarming
    True
    """
    return Check(
        claim=claim,
        quantity=numbers.quantity,
        measured=float(numbers.measured),
        exact=float(numbers.exact),
        relation=numbers.relation,
        tolerance=float(numbers.tolerance),
        verdict=verdict if numbers.agree else "fails",
        should_hold=should_hold,
        source=source,
        note=note,
    )


@dataclass(frozen=True)
class TopicReport:
    """The checks of one theorem or question, with the curves that its figure shows.

    Attributes:
        name: Short name, such as ``theorem1``.
        title: What it is about.
        checks: The claims.
        data: JSON-ready numbers for the figure.
    """

    name: str
    title: str
    checks: tuple[Check, ...]
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def alarms(self) -> tuple[Check, ...]:
        """Claims that should have held and do not."""
        return tuple(check for check in self.checks if check.alarming)

    def present(self) -> Presentation:
        """The checks as one table, remarks in a column of their own."""
        rows = tuple((*check.row[:-1], check.note) for check in self.checks)
        table = ResultTable(self.title, (*_HEAD[:-1], "Remark"), rows, _TEXT_COLUMNS)
        return Presentation(title=self.title, tables=(table,))

    def plot(self, folder: Path) -> list[Path]:
        """Draws the topic's figures into a folder."""
        from bvpo_stats.lab.theorems.figures import theorem_figures

        return theorem_figures({self.name: self.data}, folder)

    def _repr_html_(self) -> str:
        return self.present().html()


@dataclass(frozen=True)
class TheoremsReport(Report):
    """Every claim with its numbers and verdict.

    Attributes:
        config: The settings.
        topics: The checks by theorem or question.
    """

    study: ClassVar[str] = "theorems"

    config: TheoremConfig
    topics: tuple[TopicReport, ...]

    @property
    def checks(self) -> list[Check]:
        """The checks of all topics."""
        return [check for topic in self.topics for check in topic.checks]

    @property
    def alarms(self) -> tuple[Check, ...]:
        """Claims that should have held and do not."""
        return tuple(check for check in self.checks if check.alarming)

    def to_dict(self) -> dict[str, Any]:
        """The report as it stands in ``report.json``, with the number of checks and the claims that failed."""
        plain = super().to_dict()
        versions = plain.pop("versions")
        alarms = [check.claim for check in self.alarms]
        return plain | {"n_checks": len(self.checks), "alarms": alarms, "versions": versions}

    def present(self) -> Presentation:
        """One table a topic, and what the verdicts mean."""
        tables = (
            ResultTable(topic.title, _HEAD, tuple(check.row for check in topic.checks), _TEXT_COLUMNS)
            for topic in self.topics
        )
        config = self.config
        return Presentation(
            title="Do the theorems hold?",
            findings=tuple(_findings(self.checks)),
            tables=tuple(tables),
            notes=(
                "Verdicts: holds; holds with limits (true under conditions that the remark names); loose (true, but "
                "more than 1.5 times away from what it bounds or stands for); fails. A sentence marked * is known to "
                "be too strong: its failure is a result.",
                f"Exact values by enumeration of small language models in float64; samples of {config.draws} examples, "
                f"beta = {config.beta:g}, seed {config.seed}. Tolerance: rounding (1e-10) or 4 standard errors; "
                "wider where the claim is a limit.",
                *(f"{check.claim} {check.note}" for check in self.checks if check.note),
            ),
        )

    def figures(self, folder: Path) -> list[Path]:
        """One a theorem or question."""
        from bvpo_stats.lab.theorems.figures import theorem_figures

        return theorem_figures({topic.name: topic.data for topic in self.topics}, folder)

    def written(self, folder: Path) -> str:
        """What a run leaves in its folder."""
        return f"{folder / REPORT_FILE}, report.md (quantities, sources, remarks), figures/"

    def print(self, folder: Path | None = None) -> None:
        """Prints what fits a terminal; quantities, sources and remarks stand in ``report.md``."""
        shown = self.present()
        keep = [_HEAD.index(name) for name in ("Claim", "Measured", "Should be", "Verdict")]
        head = tuple(_HEAD[column] for column in keep)
        tables = tuple(
            ResultTable(table.title, head, tuple(tuple(row[column] for column in keep) for row in table.rows), (3,))
            for table in shown.tables
        )
        narrow = replace(shown, tables=tables, notes=shown.notes[:_DEFINITIONS])
        narrow.print(None if folder is None else self.written(folder))


def _findings(checks: Sequence[Check]) -> list[Finding]:
    firm = [check for check in checks if check.should_hold]
    alarms = [check for check in firm if check.verdict == "fails"]
    if alarms:
        words = " ".join(check.claim for check in alarms)
        found = [Finding(f"{len(alarms)} of {len(firm)} claims that should hold do not: {words}", "fails")]
    else:
        loose = sum(check.verdict == "loose" for check in firm)
        limited = sum(check.verdict == "holds with limits" for check in firm)
        found = [
            Finding(f"All {len(firm)} claims that should hold do, {limited} within limits, {loose} loosely.", "holds")
        ]
    strong = [check.claim for check in checks if not check.should_hold and check.verdict == "fails"]
    if strong:
        listed = " ".join(f'"{claim}"' for claim in strong)
        found.append(Finding(f"{len(strong)} sentences are too strong as worded: {listed}"))
    return found


def _number(value: float) -> str:
    """Four digits; rounding residue as such."""
    return "-" if math.isnan(value) else f"{value:.2g}" if 0 < abs(value) < 1e-6 else f"{value:.4g}"
