"""What a traces run reports: how many traces of which source, and how well the chains moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bvpo_stats.sampling.traces import BankOptions, BankTally
from bvpo_stats.studies.base import Presentation, Report, ResultTable

_MEANING = {
    "anchor": "the pair's own trace",
    "same-answer": "other samples with the same answer",
    "mh": "Metropolis-Hastings from the anchor",
    "prior": "whatever the answer",
}


@dataclass(frozen=True)
class TracesReport(Report):
    """A trace bank.

    Attributes:
        model: Identity of the sampling model.
        template: Name of the template protocol.
        n_pairs: Pairs of D_t.
        sampled_at: Temperature the pairs' responses were sampled at.
        bank: What went in.
        burn_in: Moves before the first trace of a chain was kept.
        seed: Seed of the draws.
        tally: Counts.
    """

    study: ClassVar[str] = "traces"

    model: str
    template: str
    n_pairs: int
    sampled_at: float
    bank: BankOptions
    burn_in: int
    seed: int
    tally: BankTally

    @property
    def acceptance(self) -> float | None:
        """Share of accepted Metropolis-Hastings moves; None without any."""
        return self.tally.accepted / self.tally.proposals if self.tally.proposals else None

    def to_dict(self) -> dict[str, Any]:
        """As every report, with the ``acceptance``."""
        return super().to_dict() | {"acceptance": self.acceptance}

    def present(self) -> Presentation:
        """Counts by source, and how well the chains moved."""
        sides = max(1, self.tally.sides)
        rows = tuple(
            (source, _MEANING[source], str(count), f"{count / sides:.2f}")
            for source, count in self.tally.by_source.items()
        )
        table = ResultTable("Traces by source", ("Source", "Meaning", "Traces", "Per answer"), rows, text_columns=(1,))
        return Presentation("Trace bank", tables=(table,), notes=tuple(self._notes()), cautions=tuple(self._cautions()))

    def written(self, folder: Path) -> str:
        """The bank and the report."""
        return f"traces.jsonl, report.json, report.md in {folder}"

    def _notes(self) -> list[str]:
        tally, bank = self.tally, self.bank
        lines = [
            f"{self.n_pairs} pairs, {tally.sides} answers, K = {bank.traces_per_answer}; model "
            f"{self.model}, template {self.template}, seed {self.seed}.",
        ]
        if self.acceptance is not None:
            lines.append(
                f"Metropolis-Hastings: {self.acceptance:.0%} of {tally.proposals} moves accepted, "
                f"{bank.mh_moves} moves between kept traces, burn-in {self.burn_in}; {tally.stuck} chains never "
                "moved."
            )
        if tally.unclosed:
            lines.append(f"{tally.unclosed} prior traces would not close within the cut-off and were given up.")
        return lines

    def _cautions(self) -> list[str]:
        lines = []
        if self.sampled_at != 1.0:
            lines.append(
                f"The responses were sampled at temperature {self.sampled_at:g}. Anchors and same-answer traces are "
                "posterior draws at that temperature, not at 1; chains start from them and forget it only gradually."
            )
        if self.bank.prior == "samples" and self.tally.by_source["prior"]:
            lines.append(
                "Prior traces come from the prompt's other samples, whose answers were beaten or not beaten by y."
            )
        return lines
