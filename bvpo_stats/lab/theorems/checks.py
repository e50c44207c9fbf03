"""A claim, what was measured, what is exact, and the verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["holds", "holds with limits", "loose", "fails"]
Relation = Literal["=", "<=", ">="]

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
        return missing <= self.tolerance


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

    def plot(self, folder: Path) -> list[Path]:
        """Draws the topic's figures into a folder."""
        from bvpo_stats.lab.theorems.figures import theorem_figures

        return theorem_figures({"topics": [asdict(self)]}, folder)

    def _repr_html_(self) -> str:
        from bvpo_stats.lab.theorems.output import present_topic

        return present_topic(asdict(self)).html()
