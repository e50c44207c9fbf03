"""The pairs report for people: counts by mode, and the card of the data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvpo_stats.studies.base import Presentation, ResultTable, number

if TYPE_CHECKING:
    from bvpo_stats.studies.pairs.report import PairsReport

_NAMES = {"thinking": "D_t (thinking)", "nothinking": "D_e (nothinking)"}
_ROWS = (
    ("prompts", "prompts with responses"),
    ("responses", "responses"),
    ("truncated", "responses set aside: truncated"),
    ("unclosed", "responses set aside: trace never closed"),
    ("unscored", "responses set aside: no reward"),
    ("too_few", "prompts set aside: fewer than two responses left"),
    ("identical", "prompts set aside: identical answers"),
    ("ties", "prompts set aside: best and worst tie"),
    ("pairs", "pairs"),
    ("shared_best", "pairs whose best reward several responses share"),
    ("shared_worst", "pairs whose worst reward several responses share"),
    ("other_tokens", "pairs whose text reads back as other tokens"),
)
_GAPS = (("mean_gap", "reward gap, mean"), ("min_gap", "reward gap, least"), ("max_gap", "reward gap, largest"))


def present(report: dict[str, Any]) -> Presentation:
    """A pairs report as people see it.

    Args:
        report: ``report.json`` of ``bvpo-stats pairs``.
    """
    modes = report["modes"]
    rows = [(label, *(str(counts[name]) for counts in modes.values())) for name, label in _ROWS]
    rows += [(label, *(number(counts[name]) for counts in modes.values())) for name, label in _GAPS]
    table = ResultTable("Responses and pairs by mode", ("", *(_NAMES[mode] for mode in modes)), tuple(rows))
    return Presentation(
        "Preference pairs", tables=(table,), notes=tuple(_notes(report)), cautions=tuple(_cautions(report))
    )


def _notes(report: dict[str, Any]) -> list[str]:
    lines = [
        f"Samples of {report['model']}, template {report['template']}; final answers scored by {report['reward']}.",
        "Chosen and rejected: best and worst complete response by reward, the lowest sample index among equals.",
    ]
    if report["in_both_modes"] is not None:
        lines.append(f"{report['in_both_modes']} prompts have a pair in both modes.")
    if report["half_written"]:
        lines.append(
            f"{report['half_written']} half-written last line of the samples was passed over; resume the sampling run."
        )
    return lines


def _cautions(report: dict[str, Any]) -> list[str]:
    lines = []
    if report["set_aside"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report["set_aside"].items()))
        lines.append(
            f"The sampling run set {sum(report['set_aside'].values())} requests aside ({reasons}; see its "
            "set_aside*.jsonl). They are not among the responses counted here."
        )
    for mode, counts in report["modes"].items():
        if not counts["pairs"]:
            lines.append(f"No pairs in {_NAMES[mode]}; the counts above say why.")
        if counts["other_tokens"]:
            lines.append(
                f"In {counts['other_tokens']} of {counts['pairs']} pairs of {_NAMES[mode]} the sampler wrote other "
                "tokens than the tokenizer makes of the text: the *_ids columns are exact, a trainer that tokenises "
                "the text columns is not."
            )
    return lines


def markdown(report: PairsReport) -> str:
    """The report as Markdown."""
    return present(report.to_dict()).markdown([], report.versions)


def dataset_card(report: PairsReport) -> str:
    """README.md of the folder: tells ``datasets.load_dataset(FOLDER, "thinking")`` which file is which."""
    lines = ["---", "configs:"]
    for mode in report.modes:
        lines += [f"- config_name: {mode}", f"  data_files: {mode}.parquet"]
    return "\n".join([*lines, "---", "", markdown(report)])


def print_report(report: PairsReport, folder: Path) -> None:
    """Prints the counts on standard output."""
    names = ", ".join(f"{mode}.jsonl and .parquet" for mode in report.modes)
    present(report.to_dict()).print(f"{names}, report.json in {folder}")
