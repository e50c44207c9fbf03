"""The variance report for people: a terminal table and Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo_stats.statistics.clusters import Interval
from bvpo_stats.studies.variance_report import VarianceReport

_TITLES = {
    "table3": "Table 3. Variance ratios, Thinking / NoThinking",
    "table4": "Table 4. Mean length ratio and NLL (nats per token)",
    "table5": "Table 5. Trace and answer within Thinking (nats per token)",
}
_LABELS = {
    "logp_variance_ratio": "Variance ratio (log p)",
    "length_variance_ratio": "Variance ratio (length)",
    "mean_length_ratio": "Mean length ratio",
    "nll_think": "NLL Think",
    "nll_no": "NLL No",
    "delta_nll": "Delta NLL",
    "percent_increase": "% increase",
    "trace_token_share": "Trace token share",
    "nll_trace": "NLL trace",
    "nll_answer": "NLL answer",
    "nll_ratio": "NLL ratio (trace / answer)",
}


@dataclass(frozen=True)
class _Row:
    label: str
    value: str
    interval: str
    published: str


def _number(value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _rows(report: VarianceReport, table: str) -> list[_Row]:
    entries: dict[str, Interval] = getattr(report.tables, table)
    printed: dict[str, Any] = (report.published or {}).get(table, {})
    return [
        _Row(
            _LABELS[name],
            _number(entry.value),
            "-" if entry.low is None else f"{_number(entry.low)} to {_number(entry.high)}",
            _number(printed[name]) if name in printed else "-",
        )
        for name, entry in entries.items()
    ]


def definitions_lines(report: VarianceReport) -> list[str]:
    """What the numbers mean: every choice that Appendix B leaves open, as made in this run."""
    definitions, tables = report.definitions, report.tables
    pooling = (
        "pooled over all tokens"
        if definitions.nll == "tokens"
        else "computed per question, then averaged over questions"
    )
    lines = [
        f"Model {report.model}, template {report.template}.",
        f"{tables.n_samples} complete responses to {tables.n_prompts} questions; {tables.truncated} truncated or "
        f"unclosed responses set aside, {tables.dropped_prompts} questions dropped for lack of complete responses.",
        f"Variances over the responses of a question divide by n{' - 1' if definitions.ddof else ''} (--ddof) and are "
        f"averaged over questions; NLL is {pooling} (--nll).",
        "Log-probabilities are the policy's own at temperature 1, whatever the sampling temperature; a trace includes "
        "its closing tag, an answer its end-of-sequence token.",
        f"Intervals: {definitions.level:.0%}, delete-one-question jackknife, paired over questions.",
    ]
    if report.sampling is not None:
        s = report.sampling
        lines.insert(
            1,
            f"{s.samples} samples per question and mode at temperature {s.temperature:g}, top-p {s.top_p:g}, at most "
            f"{s.max_new_tokens} new tokens, seed {s.seed}.",
        )
    share = tables.truncated / max(1, tables.truncated + tables.n_samples)
    if share > 0.05:
        lines.append(
            f"Careful: {share:.0%} of the responses were truncated; what is left is a selection of short ones. "
            "Raise --max-new-tokens."
        )
    return lines


def print_report(report: VarianceReport, folder: Path) -> None:
    """Prints Tables 3 to 5 on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, title in _TITLES.items():
        table = Table(title=title, title_justify="left", title_style="bold", min_width=64)
        table.add_column("")
        table.add_column("Measured", justify="right")
        table.add_column(f"{report.definitions.level:.0%} interval", justify="right")
        if report.published:
            table.add_column(f"Paper, {report.published['model']}", justify="right")
        for row in _rows(report, name):
            cells = [row.label, row.value, row.interval, row.published]
            table.add_row(*cells[: len(table.columns)])
        console.print(table)
    for line in definitions_lines(report):
        console.print(line, highlight=False, style="dim", soft_wrap=True)
    console.print(f"Written: {folder / 'report.json'}, report.md, figures/, samples.", highlight=False, soft_wrap=True)


def markdown(report: VarianceReport, figures: list[Path]) -> str:
    """The report as Markdown, figures linked."""
    lines = ["# How much variance do traces add?", ""]
    for name, title in _TITLES.items():
        lines += [f"## {title}", ""]
        published = f"Paper, {report.published['model']} |" if report.published else ""
        lines += [f"| | Measured | {report.definitions.level:.0%} interval | {published}"]
        lines += ["|---|--:|--:|" + ("--:|" if published else "")]
        for row in _rows(report, name):
            lines.append(
                f"| {row.label} | {row.value} | {row.interval} |" + (f" {row.published} |" if published else "")
            )
        lines.append("")
    lines += ["## What the numbers are", ""]
    lines += [f"- {line}" for line in definitions_lines(report)]
    lines += ["", "## Figures", ""]
    lines += [f"![{path.stem.replace('_', ' ')}](figures/{path.name})" for path in figures]
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in report.versions.items()) + ".", ""]
    return "\n".join(lines)
