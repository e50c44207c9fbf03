"""What a traces run reports: how many traces of which source, and how well the chains moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bvpo_stats.sampling.scoring import SamplerRatio
from bvpo_stats.sampling.traces import BankOptions, BankTally
from bvpo_stats.studies.base import Presentation, Report, ResultTable

_MEANING = {
    "anchor": "the pair's own trace",
    "same-answer": "other samples with the same answer",
    "mh": "Metropolis-Hastings from the anchor",
    "prior": "whatever the answer",
}


_STUCK = 0.5
"""Share of answers whose chain never moved beyond which the report warns."""


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
        sampler: Whether the policy is what drew the responses; None in a report of before it was asked.
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
    sampler: SamplerRatio | None = None

    @property
    def mobility(self) -> float | None:
        """Share of the Metropolis-Hastings moves that changed the trace; None without any."""
        return self.tally.moved / self.tally.proposals if self.tally.proposals else None

    def to_dict(self) -> dict[str, Any]:
        """As every report, with the ``mobility``."""
        return super().to_dict() | {"mobility": self.mobility}

    def present(self) -> Presentation:
        """Counts by source, and how well the chains moved."""
        sides = max(1, self.tally.sides)
        rows = tuple(
            (source, _MEANING[source], str(count), f"{count / sides:.2f}", f"{self.tally.distinct[source] / sides:.2f}")
            for source, count in self.tally.by_source.items()
        )
        head = ("Source", "Meaning", "Traces", "Per answer", "Distinct per answer")
        table = ResultTable("Traces by source", head, rows, text_columns=(1,))
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
        posterior = sum(count for source, count in tally.by_source.items() if source != "prior")
        if posterior:
            sides = max(1, tally.sides)
            lines.append(
                f"{posterior / sides:.2f} posterior traces stand behind an answer, {tally.posterior / sides:.2f} of "
                "them distinct."
            )
        if self.mobility is not None:
            lines.append(
                f"Metropolis-Hastings: {self.mobility:.0%} of {tally.proposals} moves changed the trace "
                f"({tally.accepted} were accepted, copies of the same trace included), {bank.mh_moves} moves between "
                f"kept traces, burn-in {self.burn_in}; {tally.stuck} chains never changed theirs."
            )
        if self.sampler is not None:
            lines.append(self.sampler.words)
        if tally.unclosed:
            lines.append(f"{tally.unclosed} prior traces would not close within the cut-off and were given up.")
        return lines

    def _cautions(self) -> list[str]:
        lines = [] if self.sampler is None else list(self.sampler.cautions)
        if self.mobility is not None and self.tally.stuck > _STUCK * max(1, self.tally.sides):
            lines.append(
                f"{self.tally.stuck} of {self.tally.sides} answers have a chain that never changed its trace: their "
                "traces are copies of the anchor. Raise `mh_moves`, or the posterior has one likely trace."
            )
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
