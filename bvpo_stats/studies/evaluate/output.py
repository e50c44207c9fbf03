"""An evaluation for people: tables like the paper's Tables 1 and 2, and what their numbers are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bvpo_stats.studies.base import Finding, Mark, Presentation, ResultTable
from bvpo_stats.studies.evaluate.benchmarks import PRESETS
from bvpo_stats.studies.evaluate.report import BASE, EvaluationReport

MODE_NAMES = {"thinking": "Thinking", "nothinking": "NoThinking"}
_COUNTS = {"responses": "Responses", "truncated": "Cut", "unclosed": "Unclosed", "empty": "Empty",
           "timeouts": "Timeouts", "missing": "Missing", "solved": "Solved"}  # fmt: skip
_ALWAYS = ("responses", "truncated")
_DASH = "-"
_MANY_CUT = 0.1


def present(report: dict[str, Any]) -> Presentation:
    """An evaluation as people see it.

    Args:
        report: ``report.json`` of ``bvpo-stats evaluate``.
    """
    return Presentation(
        title="How well does the model answer?" if report["task"] == "math" else "How good are the answers?",
        findings=tuple(_findings(report)),
        tables=(*_score_tables(report), _count_table(report)),
        notes=tuple(_notes(report)),
        cautions=tuple(_cautions(report)),
    )


def print_report(report: EvaluationReport, folder: Path) -> None:
    """Prints the tables on standard output."""
    answers = [str(folder / path) for modes in report.answer_files.values() for path in modes.values()]
    written = ", ".join([str(folder / "report.json"), "report.md", *answers])
    present(report.to_dict()).print(written)


def markdown(report: EvaluationReport, figures: list[Path]) -> str:
    """The report as Markdown, figures linked."""
    return present(report.to_dict()).markdown(figures, report.versions)


def _findings(report: dict[str, Any]) -> Iterator[Finding]:
    """What each compared model gained or lost, as far as the intervals tell."""
    columns = [column for column in report["columns"] if column["percent"]]
    chosen = [column for column in columns if column["name"] == "average"] or columns
    for label, modes in report["differences"].items():
        for mode, entries in modes.items():
            for column in chosen:
                yield _finding(f"{label}, {MODE_NAMES[mode]}, {column['title']}", entries[column["name"]])


def _finding(what: str, entry: dict[str, Any]) -> Finding:
    if entry["value"] is None or entry["low"] is None:
        return Finding(f"{what}: no difference from the base model was seen.", "open")
    said = f"{100 * entry['value']:+.1f} points ({100 * entry['low']:+.1f} to {100 * entry['high']:+.1f})"
    mark: Mark = "holds" if entry["low"] > 0 else "fails" if entry["high"] < 0 else "open"
    verdict = {"holds": "better than", "fails": "worse than", "open": "not told apart from"}[mark]
    return Finding(f"{what}: {said}, {verdict} the base model.", mark)


def _score_tables(report: dict[str, Any]) -> list[ResultTable]:
    """One table per mode: the models, their differences from the base, and the paper's rows."""
    if not report["columns"]:
        return []
    return [_score_table(report, mode) for mode in report["scores"][BASE]]


def _score_table(report: dict[str, Any], mode: str) -> ResultTable:
    columns = report["columns"]
    base = report["models"][BASE].partition("@")[0]
    rows = [
        (f"{label} ({base})" if label == BASE else label, *(_entry(modes[mode][c["name"]], c) for c in columns))
        for label, modes in report["scores"].items()
    ]
    rows += [
        (f"{label} - {BASE}", *(_entry(modes[mode][c["name"]], c, sign="+") for c in columns))
        for label, modes in report["differences"].items()
    ]
    head = ("", *(f"{c['title']}, {c['metric']}{' (%)' if c['percent'] else ''}" for c in columns))
    return ResultTable(MODE_NAMES[mode], head, (*rows, *_published_rows(report, mode)))


def _published_rows(report: dict[str, Any], mode: str) -> Iterator[tuple[str, ...]]:
    published = report["published"] or {"scores": {}}
    names = [column["name"] for column in report["columns"]]
    for method, modes in published["scores"].items():
        printed = modes.get(mode, {})
        if any(name in printed for name in names):
            row = published["model"] if method == BASE else f"{published['model']} {method}"
            yield (f"{row} (paper)", *(f"{printed[name]:.1f}" if name in printed else _DASH for name in names))


def _entry(entry: dict[str, Any], column: dict[str, Any], sign: str = "") -> str:
    if entry["value"] is None:
        return _DASH
    scale, digits = (100, 1) if column["percent"] else (1, 3)
    value, low, high = (
        None if entry[key] is None else f"{scale * entry[key]:{sign}.{digits}f}" for key in ("value", "low", "high")
    )
    return f"{value}" if low is None else f"{value} ({low} to {high})"


def _count_table(report: dict[str, Any]) -> ResultTable:
    """What became of the responses; counts that are 0 throughout are left out, the truncated ones never."""
    every = list(_each_count(report))
    shown = [name for name in _COUNTS if name in _ALWAYS or any(counts[name] for _, counts in every)]
    rows = []
    for where, counts in every:
        mean = counts["mean_tokens"]
        numbers = (_DASH if counts[name] is None else str(counts[name]) for name in shown)
        rows.append((where, *numbers, _DASH if mean is None else f"{mean:.1f}"))
    head = ("", *(_COUNTS[name] for name in shown), "Tokens")
    return ResultTable("Responses; mean length in tokens", head, tuple(rows))


def _each_count(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for label, modes in report["counts"].items():
        for mode, benchmarks in modes.items():
            for name, counts in benchmarks.items():
                which = f", {name}" if len(benchmarks) > 1 else ""
                yield f"{label}, {MODE_NAMES[mode]}{which}", counts


def _notes(report: dict[str, Any]) -> Iterator[str]:
    yield f"Base model {report['models'][BASE]}, template {report['template']}, engine {report['engine']}."
    if report["sampling"] is not None:
        s = report["sampling"]
        yield (
            f"Temperature {s['temperature']:g}, top-p {s['top_p']:g}, at most {s['max_new_tokens']} new tokens, seed "
            f"{s['seed']}."
        )
    for facts in report["benchmarks"]:
        responses = "1 response" if facts["samples"] == 1 else f"{facts['samples']} responses"
        yield (
            f"{facts['name']}: {facts['problems']} prompts from {facts['source']}, {responses} to each in a mode, "
            f"decided by {facts['verifier']}."
        )
        if facts["duplicates"]:
            yield f"{facts['name']}: {facts['duplicates']} repeated problems were left out."
    if report["task"] == "math":
        yield from _math_notes(report)
    yield from report["notes"]


def _math_notes(report: dict[str, Any]) -> Iterator[str]:
    yield (
        "avg@k is the share of correct responses among a problem's k, averaged over problems: it estimates pass@1. A "
        "response that was cut or never closed its trace is wrong; only what follows the trace is checked."
    )
    yield (
        f"Intervals: {report['level']:.0%}, clustered by problem (Wilson's with the effective number of trials; "
        "Student's for means, averages and differences, the latter paired by problem)."
    )
    if not all(column["percent"] for column in report["columns"]):
        yield "Reward: the embedded task's grade in [0, 1]; a response without an answer counts 0."
    if report["published"]:
        yield "The paper does not say in which mode Table 2 was measured; its rows stand under Thinking."


def _cautions(report: dict[str, Any]) -> Iterator[str]:
    for facts in report["benchmarks"]:
        preset = PRESETS.get(facts["name"])
        unreadable = facts["unreadable_gold"]
        if unreadable:
            yield (
                f"math-verify cannot read the gold answer of {len(unreadable)} problems of {facts['name']} "
                f"({', '.join(unreadable[:5])}); they are left out."
            )
        if preset is not None and facts["problems"] + facts["duplicates"] < preset.size:
            yield f"{facts['name']} has {preset.size} problems, {facts['problems']} were evaluated."
    for where, counts in _each_count(report):
        cut = counts["truncated"] / counts["responses"] if counts["responses"] else 0.0
        if cut > _MANY_CUT:
            yield f"{cut:.0%} of the responses of {where} were cut. Raise `max_new_tokens`."
        if counts["missing"]:
            yield f"{counts['missing']} responses of {where} are missing; they count neither way."
        if counts["timeouts"]:
            yield f"{counts['timeouts']} comparisons of {where} ran into the time limit and count as wrong."
