"""The variance report for people: Appendix B's tables, and what their numbers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bvpo_stats.studies.base import Finding, Presentation, ResultTable
from bvpo_stats.studies.variance.report import VarianceReport

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
_MANY_CUT = 0.05


def present(report: dict[str, Any]) -> Presentation:
    """A variance report as people see it.

    Args:
        report: ``report.json`` of ``bvpo-stats variance``.
    """
    return Presentation(
        title="How much variance do traces add?",
        findings=_findings(report),
        tables=tuple(_table(report, name) for name in _TITLES),
        notes=tuple(_notes(report)),
        cautions=tuple(_cautions(report)),
    )


def print_report(report: VarianceReport, folder: Path) -> None:
    """Prints Tables 3 to 5 on standard output."""
    written = f"{folder / 'report.json'}, report.md, figures/, samples"
    present(report.to_dict()).print(written)


def markdown(report: VarianceReport, figures: list[Path]) -> str:
    """The report as Markdown, figures linked."""
    return present(report.to_dict()).markdown(figures, report.versions)


def _findings(report: dict[str, Any]) -> tuple[Finding, ...]:
    """Whether log-probabilities vary more with a trace than without, as the interval says."""
    entry = report["table3"]["logp_variance_ratio"]
    if entry["value"] is None or entry["low"] is None:
        return (Finding("These responses do not say whether traces add variance.", "open"),)
    said = f"{_number(entry['value'])} ({_number(entry['low'])} to {_number(entry['high'])})"
    if entry["low"] > 1:
        return (Finding(f"Traces add variance: log p varies {said} times as much with a trace as without.", "holds"),)
    if entry["high"] < 1:
        return (Finding(f"Traces add no variance here: log p varies {said} times as much with a trace.", "fails"),)
    return (Finding(f"The variance ratio of log p, {said}, is not told apart from 1.", "open"),)


def _table(report: dict[str, Any], name: str) -> ResultTable:
    published = report.get("published")
    head = ["", "Measured", f"{report['definitions']['level']:.0%} interval"]
    if published:
        head.append(f"Paper, {published['model']}")
    rows = []
    for entry, cell in report[name].items():
        interval = "-" if cell["low"] is None else f"{_number(cell['low'])} to {_number(cell['high'])}"
        row = [_LABELS[entry], _number(cell["value"]), interval]
        if published:
            printed = published[name].get(entry)
            row.append("-" if printed is None else _number(printed))
        rows.append(tuple(row))
    return ResultTable(_TITLES[name], tuple(head), tuple(rows))


def _notes(report: dict[str, Any]) -> list[str]:
    """What the numbers mean: every choice that Appendix B leaves open, as made in this run."""
    definitions = report["definitions"]
    pooling = (
        "pooled over all tokens"
        if definitions["nll"] == "tokens"
        else "computed per question, then averaged over questions"
    )
    lines = [
        f"Model {report['model']}, template {report['template']}.",
        f"{report['n_samples']} complete responses to {report['n_prompts']} questions; {report['truncated']} truncated "
        f"or unclosed responses set aside, {report['dropped_prompts']} questions dropped for lack of complete "
        "responses.",
        f"Variances over the responses of a question divide by n{' - 1' if definitions['ddof'] else ''} (`ddof`) and "
        f"are averaged over questions; NLL is {pooling} (`nll`).",
        "Log-probabilities are the policy's own at temperature 1, whatever the sampling temperature; a trace includes "
        "its closing tag, an answer its end-of-sequence token.",
        f"Intervals: {definitions['level']:.0%}, delete-one-question jackknife, paired over questions.",
    ]
    if report["sampling"] is not None:
        s = report["sampling"]
        lines.insert(
            1,
            f"{s['samples']} samples per question and mode at temperature {s['temperature']:g}, top-p {s['top_p']:g}, "
            f"at most {s['max_new_tokens']} new tokens, seed {s['seed']}.",
        )
    return lines


def _cautions(report: dict[str, Any]) -> list[str]:
    share = report["truncated"] / max(1, report["truncated"] + report["n_samples"])
    if share <= _MANY_CUT:
        return []
    return [
        f"{share:.0%} of the responses were truncated; what is left is a selection of short ones. Raise "
        "`max_new_tokens`."
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
