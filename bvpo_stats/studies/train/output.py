"""The train report for people: what training changed, and what alpha did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bvpo_stats.studies.base import Finding, Presentation, ResultTable, number

_METHODS = {"dpo": "DPO on D_t", "simpo": "SimPO on D_t", "bvpo": "BVPO"}
_ROWS = {
    "loss": "Loss",
    "rewards/margins": "Reward margin",
    "rewards/accuracies": "Reward accuracy",
    "rewards/chosen": "Reward of chosen",
    "rewards/rejected": "Reward of rejected",
    "grad_norm": "Gradient norm",
}
_SETS = {"": "The loss's pairs", "trace/": "D_t, with traces", "empty/": "D_e, empty trace"}
_MOST_UPDATES = 12  # rows of the table of updates


def present(report: dict[str, Any]) -> Presentation:
    """A train report as people see it.

    Args:
        report: ``report.json`` of ``bvpo-stats train``.
    """
    tables = [table for prefix, title in _SETS.items() if (table := _metrics(report, prefix, title)).rows]
    if report["alpha"]["updates"]:
        tables.append(_updates(report))
    return Presentation(
        title=f"What did {_name(report)} change?",
        findings=_findings(report),
        tables=tuple(tables),
        notes=tuple(_notes(report)),
        cautions=tuple(_cautions(report)),
    )


def print_report(report: dict[str, Any], folder: Path) -> None:
    """Prints tables and findings on standard output."""
    present(report).print(f"{folder / 'model'}, report.json, report.md, figures/")


def markdown(report: dict[str, Any], figures: list[Path]) -> str:
    """The report as Markdown, figures linked."""
    return present(report).markdown(figures, report["versions"])


def _name(report: dict[str, Any]) -> str:
    name = _METHODS[report["method"]]
    if report["method"] != "bvpo":
        return name
    return f"{name} with alpha {report['alpha']['setting']}"


def _findings(report: dict[str, Any]) -> tuple[Finding, ...]:
    first, last = report["first"], report["last"]
    margin = ""
    if "rewards/margins" in last:
        margin = (
            f", the reward margin from {number(first['rewards/margins'])} to {number(last['rewards/margins'])}, with "
            f"{last['rewards/accuracies']:.0%} of the pairs in the right order at the end"
        )
    found = [
        Finding(
            f"{_name(report)}: {report['steps']} steps of {report['batch_size']} prompts took the loss from "
            f"{number(first.get('loss'))} to {number(last.get('loss'))}{margin}."
        )
    ]
    if report["alpha"]["setting"] == "adaptive":
        found.append(_alpha_finding(report))
    return tuple(found)


def _alpha_finding(report: dict[str, Any]) -> Finding:
    alpha = report["alpha"]
    used = [point["alpha"] for point in alpha["trajectory"]]
    if not alpha["updates"]:
        return Finding(f"alpha was held at its prior {alpha['prior']:g}: {alpha['mu']}.", "open")
    if all(value == alpha["prior"] for value in used):
        return Finding(
            f"alpha stayed at its prior {alpha['prior']:g}: no estimate was sure enough to leave it ({_last(alpha)}).",
            "open",
        )
    moved = sum(value != alpha["prior"] for value in used) / len(used)
    return Finding(f"alpha left its prior {alpha['prior']:g} in {moved:.0%} of the steps; {_last(alpha)}.")


def _last(alpha: dict[str, Any]) -> str:
    update = alpha["updates"][-1]
    if update["estimate"] is None:
        return f"at the last look: {update['why']}"
    return (
        f"the last estimate is {number(update['estimate'])}, {alpha['level']:.0%} interval {number(update['low'])} to "
        f"{number(update['high'])}"
    )


def _metrics(report: dict[str, Any], prefix: str, title: str) -> ResultTable:
    rows = []
    for name, label in _ROWS.items():
        key = prefix + name
        if key in report["last"]:
            rows.append((label, number(report["first"].get(key)), number(report["last"][key])))
    return ResultTable(title, ("", "First tenth", "Last tenth"), tuple(rows))


def _updates(report: dict[str, Any]) -> ResultTable:
    alpha = report["alpha"]
    updates = alpha["updates"]
    shown = updates if len(updates) <= _MOST_UPDATES else [updates[0], *updates[1 - _MOST_UPDATES :]]
    rows = tuple(
        (
            "start" if update["step"] < 0 else str(update["step"] + 1),
            number(update["alpha"]),
            number(update["estimate"]),
            "-" if update["low"] is None else f"{number(update['low'])} to {number(update['high'])}",
            number(update["eta_l"]),
            update["why"],
        )
        for update in shown
    )
    head = ("After step", "alpha", "Estimate", f"{alpha['level']:.0%} interval", "eta L", "Why")
    return ResultTable("Looks at the probe set", head, rows, text_columns=(5,))


def _notes(report: dict[str, Any]) -> list[str]:
    loss = ", ".join(f"{name} {value}" for name, value in report["loss"].items())
    prompts, trained = report["prompts"], report["trained"]
    lines = [
        f"Model {report['model']}, template {report['template']}; {loss}; trained: {trained['what']}, "
        f"{trained['parameters']:,} parameters.",
        f"{prompts['train']} prompts to train on, batches of {report['batch_size']}, peak learning rate "
        f"{report['learning_rate']:g} ({report['scheduler']}), seed {report['seed']}.",
        "Rewards are beta times the log-ratio to the reference (SimPO: beta times the average log-probability); the "
        "first table weighs pairs as the loss does, alpha on D_t and 1 - alpha on D_e.",
    ]
    if report["alpha"]["updates"]:
        lines.append(
            f"alpha: {prompts['probe']} probe prompts held out of training, looked at every "
            f"{report['alpha']['update_steps']} steps; {report['alpha']['mu']}; eta L {report['eta_l']['at_peak']:.3g} "
            f"at the peak learning rate{_measured(report)}. A decision holds from the step after it."
        )
    return lines


def _measured(report: dict[str, Any]) -> str:
    smoothness = report["eta_l"]["smoothness"]
    return "" if smoothness is None else f" (L = {smoothness:.4g} measured before the first step)"


def _cautions(report: dict[str, Any]) -> list[str]:
    prompts, lines = report["prompts"], []
    if prompts["too_long"]:
        lines.append(f"{prompts['too_long']} prompts were set aside: a response is longer than `max_length`.")
    if prompts["unmatched"]:
        lines.append(f"{prompts['unmatched']} prompts were set aside: only one of D_t and D_e has them.")
    return lines
