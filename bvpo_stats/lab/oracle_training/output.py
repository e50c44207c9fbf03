"""The oracle training report for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bvpo_stats.lab.oracle_training.report import ESTIMATED, PAPER
from bvpo_stats.studies.base import Finding, Presentation, ResultTable

_HEAD = (
    "alpha from",
    "mean norm(grad L_m)^2",
    "minus best fixed",
    "over alpha = 0.5",
    "L_m at the end",
    "bias^2",
    "variance",
    "bound (Theorem 3)",
    "mean alpha",
)


def present(report: dict[str, Any]) -> Presentation:
    """A report as people see it.

    Args:
        report: ``report.json`` of ``bvpo-stats oracle-training``.
    """
    return Presentation(
        title="Does an estimated alpha train better than a fixed one?",
        findings=tuple(_findings(report)),
        tables=(*(_table(entry) for entry in report["results"]), _step_sizes(report)),
        notes=tuple(_notes(report)),
        cautions=tuple(_cautions(report)),
    )


def print_report(report: dict[str, Any], folder: Path) -> None:
    """Prints the tables on standard output."""
    written = f"{folder / 'report.json'}, report.md, figures/, trajectories.jsonl"
    present(report).print(written)


def markdown(report: dict[str, Any], figures: list[Path]) -> str:
    """The report as Markdown, figures linked."""
    return present(report).markdown(figures, report["versions"])


def _findings(report: dict[str, Any]) -> list[Finding]:
    compared = [entry for entry in report["results"] if "comparisons" in entry]
    found = []
    for entry in compared:
        ours = entry["comparisons"][ESTIMATED]
        difference, ratio = ours["minus_best_fixed"], ours["over_paper"]
        holds = entry["at_or_below_best_fixed"]
        verb = "is at or below" if holds else "is above"
        found.append(
            Finding(
                f"eta L = {entry['eta_l']:g}: the estimated alpha {verb} the best fixed one ({entry['best_fixed']}), "
                f"difference {_interval(difference, '+.4f')}; "
                f"its ratio to the paper's 0.5 is {_interval(ratio, '.3f')}.",
                "holds" if holds else "fails",
            )
        )
    if compared:
        below = sum(entry["ten_percent_below_paper"] for entry in compared)
        wanted = 2 * len(compared) / 3
        found.append(
            Finding(
                f"At least 10% below alpha = 0.5 at {below} of {len(compared)} step sizes (goal: two of three).",
                "holds" if below >= wanted else "fails",
            )
        )
    return found


def _table(entry: dict[str, Any]) -> ResultTable:
    methods, compared = entry["methods"], entry.get("comparisons", {})
    rows = []
    for name, values in methods.items():
        against = compared.get(name)
        rows.append(
            (
                name,
                _interval(values["grad_sq"], ".4f"),
                "-" if against is None else _interval(against["minus_best_fixed"], "+.4f"),
                "-" if against is None else _interval(against["over_paper"], ".3f"),
                _interval(values["loss_end"], ".4f"),
                f"{values['bias_sq']:.4f}",
                f"{values['variance']:.4f}",
                f"{values['bound']['value']:.3f}",
                f"{values['alpha']:.2f}",
            )
        )
    return ResultTable(f"eta L = {entry['eta_l']:g}", _HEAD, tuple(rows))


def _step_sizes(report: dict[str, Any]) -> ResultTable:
    """What eta L is along the way, for two ideas of L."""
    rows = []
    for entry in report["results"]:
        half = entry["methods"].get(PAPER, next(iter(entry["methods"].values())))
        values = (half["smoothness_mean"], half["noise_curvature"])
        products = [f"{entry['eta'] * value:.3f}" for value in values]
        rows.append((f"{entry['eta_l']:g}", f"{entry['eta']:.4g}", *(f"{v:.2f}" for v in values), *products))
    head = ("eta L at theta_ref", "eta", "spectral norm", "curvature along the noise", "eta x norm", "eta x curvature")
    return ResultTable("Step sizes: means over the trajectories of alpha = 0.5", head, tuple(rows))


def _notes(report: dict[str, Any]) -> list[str]:
    settings = report["settings"]
    return [
        f"SGD on the enumerable model ({settings['parameters']} LoRA parameters, {settings['oracle']['n_symbols']} "
        f"symbols, traces up to {settings['oracle']['max_trace']}, {settings['oracle']['n_prompts']} prompts, DPO with "
        f"beta = {settings['beta']:g}), {settings['steps']} steps of {settings['batch_size']} pairs, "
        f"{settings['seeds']} seeds. A seed fixes the data of every method, so differences are paired.",
        "norm(grad L_m)^2, L_m, bias and variance (of a batch) are exact at every step; intervals are over seeds "
        f"({settings['level']:.0%}). The best fixed alpha is picked after the fact, which favours it.",
        "eta L names a step size by the spectral norm L of L_m's Hessian at theta_ref "
        f"({settings['smoothness_at_reference']:.1f}).",
        f"adaptive: alpha from samples only, used from the next step on. mu from {settings['probe_prompts']} held-out "
        f"pairs with {settings['traces']} traces an answer for the score and as many for the margin, every "
        f"{settings['probe_every']} steps; variances from the training pairs. It minimises the descent bound (alpha_J) "
        "with L = tr(H Sigma) / tr Sigma, the curvature that the noise meets: H is the Gauss-Newton Hessian of L_m, "
        "estimated on the same probe, Sigma = Cov(g_t - g_e). exact: the same from exact moments at every step.",
        "error: Theorem 4's alpha(tau), tau = eta L / B, in place of the descent bound, with that L or with the "
        "spectral norm, the L of Theorem 3, or with eta L taken for 1 whatever the step (the trainer's default).",
        "adaptive, error: the criterion of the trainer. With eta_l auto that measures L once, at its start, and with "
        "the full Hessian of the D_t loss in place of the Gauss-Newton one of L_m, which gives another, often larger, "
        "L.",
        "Theorem 3's bound with L the largest spectral norm met; it supposes eta L <= 1.",
    ]


def _cautions(report: dict[str, Any]) -> list[str]:
    beyond = [
        f"{entry['eta_l']:g}"
        for entry in report["results"]
        if any(entry["eta"] * values["smoothness"] > 1 for values in entry["methods"].values())
    ]
    if not beyond:
        return []
    return [f"at eta L = {', '.join(beyond)} some runs meet a spectral norm above 1 / eta: Theorem 3 is silent there."]


def _interval(entry: dict[str, float | None], form: str) -> str:
    value, low, high = entry["value"], entry["low"], entry["high"]
    if value is None:
        return "-"
    if low is None or high is None:
        return format(value, form)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
