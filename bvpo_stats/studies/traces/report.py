"""What a traces run reports: how many traces of which source, and how well the chains moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvpo_stats.studies.base import Presentation, ResultTable

if TYPE_CHECKING:
    from bvpo_stats.sampling.traces import BankOptions, BankTally

_MEANING = {
    "anchor": "the pair's own trace",
    "same-answer": "other samples with the same answer",
    "mh": "Metropolis-Hastings from the anchor",
    "prior": "whatever the answer",
}


@dataclass(frozen=True)
class TracesReport:
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
        versions: Software versions.
    """

    model: str
    template: str
    n_pairs: int
    sampled_at: float
    bank: BankOptions
    burn_in: int
    seed: int
    tally: BankTally
    versions: dict[str, str]

    @property
    def acceptance(self) -> float | None:
        """Share of accepted Metropolis-Hastings moves; None without any."""
        return self.tally.accepted / self.tally.proposals if self.tally.proposals else None

    def to_dict(self) -> dict[str, Any]:
        """The report as it stands in ``report.json``."""
        return {"study": "traces", **asdict(self), "acceptance": self.acceptance}


def present(report: dict[str, Any]) -> Presentation:
    """A traces report as people see it.

    Args:
        report: ``report.json`` of ``bvpo-stats traces``.
    """
    sides = max(1, report["tally"]["sides"])
    rows = tuple(
        (source, _MEANING[source], str(count), f"{count / sides:.2f}")
        for source, count in report["tally"]["by_source"].items()
    )
    table = ResultTable("Traces by source", ("Source", "Meaning", "Traces", "Per answer"), rows, text_columns=(1,))
    return Presentation("Trace bank", tables=(table,), notes=tuple(_notes(report)), cautions=tuple(_cautions(report)))


def _notes(report: dict[str, Any]) -> list[str]:
    tally, bank = report["tally"], report["bank"]
    lines = [
        f"{report['n_pairs']} pairs, {tally['sides']} answers, K = {bank['traces_per_answer']}; model "
        f"{report['model']}, template {report['template']}, seed {report['seed']}.",
    ]
    if report["acceptance"] is not None:
        lines.append(
            f"Metropolis-Hastings: {report['acceptance']:.0%} of {tally['proposals']} moves accepted, "
            f"{bank['mh_moves']} moves between kept traces, burn-in {report['burn_in']}; {tally['stuck']} chains never "
            "moved."
        )
    if tally["unclosed"]:
        lines.append(f"{tally['unclosed']} prior traces would not close within the cut-off and were given up.")
    return lines


def _cautions(report: dict[str, Any]) -> list[str]:
    lines = []
    if report["sampled_at"] != 1.0:
        lines.append(
            f"The responses were sampled at temperature {report['sampled_at']:g}. Anchors and same-answer traces are "
            "posterior draws at that temperature, not at 1; chains start from them and forget it only gradually."
        )
    if report["bank"]["prior"] == "samples" and report["tally"]["by_source"]["prior"]:
        lines.append("Prior traces come from the prompt's other samples, whose answers were beaten or not beaten by y.")
    return lines


def markdown(report: TracesReport) -> str:
    """The report as Markdown."""
    return present(report.to_dict()).markdown([], report.versions)


def print_report(report: TracesReport, folder: Path) -> None:
    """Prints the counts on standard output."""
    present(report.to_dict()).print(f"traces.jsonl, report.json, report.md in {folder}")
