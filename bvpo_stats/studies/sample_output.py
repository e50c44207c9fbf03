"""The summary of a sampling run for people."""

from __future__ import annotations

from pathlib import Path

from bvpo_stats.studies.sample import SampleReport

_DASH = "-"
_MANY_CUT = 0.1


def summary_lines(report: SampleReport) -> list[str]:
    """What was drawn, and what a reader should worry about."""
    lines = [f"Model {report.model}, template {report.template}, engine {report.engine}."]
    responses = sum(mode.responses for mode in report.modes.values())
    for name, mode in report.modes.items():
        cut = mode.truncated / mode.responses
        if cut > _MANY_CUT:
            lines.append(
                f"Careful: {cut:.0%} of the {name} responses were cut; what is left for pairs is a selection of short "
                "ones. Raise --max-new-tokens."
            )
    if report.set_aside:
        total = sum(report.set_aside.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.set_aside.items()))
        lines.append(f"Set aside: {total} requests ({reasons}); see set_aside*.jsonl.")
        if total > responses:
            lines.append("Careful: more was set aside than kept. Is --model the model that the server serves?")
    if report.dialect is not None and report.dialect.endswith("plain"):
        lines.append(
            "Careful: this server takes OpenAI's own fields only; top-k and other defaults of its own may be in force."
        )
    if report.tokens_per_second is None:
        lines.append("Nothing was left to draw.")
    else:
        tally = report.tally
        lines.append(
            f"This call: {tally.responses} responses, {tally.tokens} tokens in {tally.seconds:.1f} s "
            f"({report.tokens_per_second:.0f} tokens per second)."
        )
    return lines


def print_summary(report: SampleReport, folder: Path) -> None:
    """Prints the table of modes, the notes, and what was written."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    shard = "" if report.shard == "1/1" else f", shard {report.shard}"
    title = f"Responses on record{shard}; mean lengths in tokens"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("Mode", no_wrap=True)
    for heading in ("Responses", "Length", "Trace", "Answer", "Cut", "Unclosed", "Empty"):
        table.add_column(heading, justify="right")
    for name, mode in report.modes.items():
        table.add_row(
            name,
            str(mode.responses),
            _mean(mode.mean_tokens),
            _mean(mode.mean_trace_tokens),
            _mean(mode.mean_answer_tokens),
            str(mode.truncated),
            str(mode.unclosed),
            str(mode.empty_answers),
        )
    console.print(table)
    for line in summary_lines(report):
        console.print(line, markup=False)
    console.print(f"Written: {folder}/", markup=False)


def _mean(value: float | None) -> str:
    return _DASH if value is None else f"{value:.1f}"
