"""What a traces run reports: how many traces of which source, and how well the chains moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bvpo_stats.data.traces import BankOptions, BankTally

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
        return {**asdict(self), "acceptance": self.acceptance}


def report_lines(report: TracesReport) -> list[str]:
    """What the numbers mean, and what deserves attention."""
    tally, bank = report.tally, report.bank
    lines = [
        f"{report.n_pairs} pairs, {tally.sides} answers, K = {bank.traces_per_answer}; model {report.model}, template "
        f"{report.template}, seed {report.seed}.",
    ]
    if report.acceptance is not None:
        lines.append(
            f"Metropolis-Hastings: {report.acceptance:.0%} of {tally.proposals} moves accepted, {bank.mh_moves} moves "
            f"between kept traces, burn-in {report.burn_in}; {tally.stuck} chains never moved."
        )
    if report.sampled_at != 1.0:
        lines.append(
            f"Careful: the responses were sampled at temperature {report.sampled_at:g}. Anchors and same-answer traces "
            "are posterior draws at that temperature, not at 1; chains start from them and forget it only gradually."
        )
    if bank.prior == "samples" and tally.by_source["prior"]:
        lines.append(
            "Careful: prior traces come from the prompt's other samples, whose answers were beaten or not beaten by y."
        )
    if tally.unclosed:
        lines.append(f"{tally.unclosed} prior traces would not close within the cut-off and were given up.")
    return lines


def markdown(report: TracesReport) -> str:
    """The report as Markdown."""
    lines = ["# Trace bank", "", "| source | meaning | traces | per answer |", "|---|---|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(report)]
    lines += ["", *(f"- {line}" for line in report_lines(report))]
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in report.versions.items()) + ".", ""]
    return "\n".join(lines)


def table_rows(report: TracesReport) -> list[list[str]]:
    """Counts by source."""
    sides = max(1, report.tally.sides)
    return [
        [source, _MEANING[source], str(count), f"{count / sides:.2f}"]
        for source, count in report.tally.by_source.items()
    ]


def print_report(report: TracesReport, folder: Path) -> None:
    """Prints the counts on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Trace bank", title_justify="left", title_style="bold")
    for number, name in enumerate(("Source", "Meaning", "Traces", "Per answer")):
        table.add_column(name, justify="right" if number > 1 else "left")
    for row in table_rows(report):
        table.add_row(*row)
    console.print(table)
    for line in report_lines(report):
        console.print(line, highlight=False, style="dim", soft_wrap=True)
    console.print(f"Written: traces.jsonl, report.json, report.md in {folder}.", highlight=False, soft_wrap=True)
