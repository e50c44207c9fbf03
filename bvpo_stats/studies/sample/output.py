"""The summary of a sampling run for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvpo_stats.studies.base import Presentation, ResultTable

if TYPE_CHECKING:
    from bvpo_stats.studies.sample.run import SampleReport

_MANY_CUT = 0.1
_HEAD = ("Mode", "Responses", "Length", "Trace", "Answer", "Cut", "Unclosed", "Empty")


def present(report: dict[str, Any]) -> Presentation:
    """A sampling report as people see it.

    Args:
        report: ``report.json`` of ``bvpo-stats sample``.
    """
    shard = "" if report["shard"] == "1/1" else f", shard {report['shard']}"
    table = ResultTable(
        f"Responses on record{shard}; mean lengths in tokens",
        _HEAD,
        tuple(_row(name, mode) for name, mode in report["modes"].items()),
    )
    return Presentation(
        "Sampled responses", tables=(table,), notes=tuple(_notes(report)), cautions=tuple(_cautions(report))
    )


def print_summary(report: SampleReport, folder: Path) -> None:
    """Prints the table of modes, the notes, and what was written."""
    present(report.to_dict()).print(f"{folder}/")


def _row(name: str, mode: dict[str, Any]) -> tuple[str, ...]:
    means = (mode[key] for key in ("mean_tokens", "mean_trace_tokens", "mean_answer_tokens"))
    flaws = (mode[key] for key in ("truncated", "unclosed", "empty_answers"))
    shown = ["-" if mean is None else f"{mean:.1f}" for mean in means]
    return (name, str(mode["responses"]), *shown, *map(str, flaws))


def _notes(report: dict[str, Any]) -> list[str]:
    lines = [f"Model {report['model']}, template {report['template']}, engine {report['engine']}."]
    if report["sampling"] is not None:
        s = report["sampling"]
        lines.append(
            f"{s['samples']} responses per prompt and mode at temperature {s['temperature']:g}, top-p {s['top_p']:g}, "
            f"at most {s['max_new_tokens']} new tokens, seed {s['seed']}."
        )
    if report["set_aside"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report["set_aside"].items()))
        total = sum(report["set_aside"].values())
        lines.append(f"Set aside: {total} requests ({reasons}); see set_aside*.jsonl.")
    if report["tokens_per_second"] is None:
        lines.append("Nothing was left to draw.")
    else:
        tally = report["tally"]
        lines.append(
            f"This call: {tally['responses']} responses, {tally['tokens']} tokens in {tally['seconds']:.1f} s "
            f"({report['tokens_per_second']:.0f} tokens per second)."
        )
    return lines


def _cautions(report: dict[str, Any]) -> list[str]:
    """What a reader should worry about."""
    lines = []
    for name, mode in report["modes"].items():
        cut = mode["truncated"] / mode["responses"]
        if cut > _MANY_CUT:
            lines.append(
                f"{cut:.0%} of the {name} responses were cut; what is left for pairs is a selection of short ones. "
                "Raise `max_new_tokens`."
            )
    if sum(report["set_aside"].values()) > sum(mode["responses"] for mode in report["modes"].values()):
        lines.append("More was set aside than kept. Is `model` the model that the server serves?")
    if report["dialect"] is not None and report["dialect"].endswith("plain"):
        lines.append("This server takes OpenAI's own fields only; top-k and other defaults of its own may be in force.")
    return lines
