"""The report of a training run: what training changed, and what alpha did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bvpo_stats.statistics.intervals import FEWEST
from bvpo_stats.studies.base import Finding, Presentation, Report, ResultTable, counted, number

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


@dataclass(frozen=True)
class TrainReport(Report):
    """A training run: what was trained on, every log entry, and every decision about alpha.

    Attributes:
        method: ``dpo``, ``simpo`` or ``bvpo``.
        model: Identity of the policy.
        template: Its protocol.
        loss: Name and constants of the loss.
        trained: ``what`` was trained and how many ``parameters`` that is.
        prompts: Numbers of prompts: to ``train`` on, and set aside as ``too_long`` or ``unmatched``.
        batch_size: Prompts a step, over all processes.
        steps: Optimizer steps made.
        learning_rate: Its peak.
        scheduler: How it changes.
        alpha: ``setting``, ``rule``, ``prior``, ``level``, ``final``, ``mu``, ``update_steps``; the ``trajectory`` by
            logged step and the ``updates``, now and then in full.
        eta_l: Learning rate times smoothness ``at_peak``, the ``smoothness`` where it was measured, how often, and in
            which ``metric``.
        before: Losses and reward margins of both sets before the first step, on some of the prompts.
        after: The same after the last, on the same prompts.
        first: Means of the metrics over the first tenth of the log.
        last: The same over the last tenth.
        history: Log entries, without their times.
        settings: Everything that decides the run.
        seed: Seed of the run.
    """

    study: ClassVar[str] = "train"
    drawn_by: ClassVar[str | None] = "bvpo_stats.studies.train.figures"

    method: str
    model: str
    template: str
    loss: dict[str, Any]
    trained: dict[str, Any]
    prompts: dict[str, int]
    batch_size: int
    steps: int
    learning_rate: float
    scheduler: str
    alpha: dict[str, Any]
    eta_l: dict[str, Any]
    before: dict[str, float] | None
    after: dict[str, float]
    first: dict[str, float]
    last: dict[str, float]
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    seed: int

    def present(self) -> Presentation:
        """The same pairs before and after, first and last tenth of the metrics, and what alpha did."""
        tables = [self._same_pairs()] if self.before else []
        tables += [table for prefix, title in _SETS.items() if (table := self._metrics(prefix, title)).rows]
        if self.alpha["updates"]:
            tables.append(self._updates())
        return Presentation(
            title=f"What did {self.name} change?",
            findings=self._findings(),
            tables=tuple(tables),
            notes=tuple(self._notes()),
            cautions=tuple(self._cautions()),
        )

    def written(self, folder: Path) -> str:
        """The model and the report."""
        return f"{folder / 'model'}, report.json, report.md, figures/"

    @property
    def name(self) -> str:
        """The method in words."""
        name = _METHODS[self.method]
        return f"{name} with alpha {self.alpha['setting']}" if self.method == "bvpo" else name

    def _findings(self) -> tuple[Finding, ...]:
        changes = [
            f"that of {words} from {number(self.before[key])} to {number(self.after[key])}"
            for key, words in (("trace/loss", "D_t"), ("empty/loss", "D_e"))
            if self.before and key in self.before
        ]
        order = ""
        if "rewards/accuracies" in self.last:
            order = f"; {self.last['rewards/accuracies']:.0%} of the last pairs are in the right order"
        run = f"{self.name}: {counted(self.steps, 'step')} of {counted(self.batch_size, 'prompt')} took the loss"
        if changes:
            sentence = (
                f"{run}, {' and '.join(changes)}, on the same {counted(int(self.after['prompts']), 'prompt')}{order}."
            )
        else:
            sentence = f"{run} from {number(self.first.get('loss'))} to {number(self.last.get('loss'))}{order}."
        found = [Finding(sentence)]
        if self.alpha["setting"] == "adaptive":
            found.append(self._alpha_finding())
        return tuple(found)

    def _alpha_finding(self) -> Finding:
        """What alpha was where the steps are largest; at a learning rate of 0 it matters to nobody."""
        alpha, rule = self.alpha, self.alpha["rule"]
        points = [point for point in alpha["trajectory"] if point["eta_l"]]  # a step at rate 0 moves nothing
        known = [point for point in points if point["low"] is not None]
        if not points or (not known and rule != "hypergradient"):
            few = "too few steps had earlier ones in their epoch"
            return Finding(f"alpha ({rule}) had nothing to estimate from: {few}.", "open")
        peak = max(known or points, key=lambda point: (point["eta_l"], point["step"]))
        words = f"alpha ({rule}) was {number(peak['alpha'])} at the largest steps (step {peak['step']}, eta L = "
        words += f"{number(peak['eta_l'])})"
        if known:
            what = "estimated start" if rule == "rising" else "estimate"
            unbiased = (
                "" if peak["bias_prompts"] else " if the trace gradient's bias is 0, at which no trace bank looked"
            )
            words += f": {what} {number(peak['estimate'])}, {_interval(peak, alpha['level'])}{unbiased}, "
            words += f"from {int(peak['prompts'])} prompts"
        return Finding(f"{words}; it ended at {number(alpha['trajectory'][-1]['alpha'])}.")

    def _same_pairs(self) -> ResultTable:
        rows = []
        for prefix, words in (("trace/", "D_t"), ("empty/", "D_e")):
            for key, label in (("loss", "loss"), ("rewards/margins", "reward margin")):
                if self.before and prefix + key in self.before:
                    rows.append(
                        (f"{words}, {label}", number(self.before[prefix + key]), number(self.after[prefix + key]))
                    )
        return ResultTable(
            f"The same {int(self.after['prompts'])} prompts before and after", ("", "Before", "After"), tuple(rows)
        )

    def _metrics(self, prefix: str, title: str) -> ResultTable:
        rows = []
        for name, label in _ROWS.items():
            key = prefix + name
            if key in self.last:
                rows.append((label, number(self.first.get(key)), number(self.last[key])))
        return ResultTable(title, ("", "First tenth", "Last tenth"), tuple(rows))

    def _updates(self) -> ResultTable:
        alpha = self.alpha
        updates = alpha["updates"]
        shown = updates if len(updates) <= _MOST_UPDATES else [updates[0], *updates[1 - _MOST_UPDATES :]]
        rows = tuple(
            (
                "start" if update["step"] < 0 else str(update["step"] + 1),
                number(update["alpha"]),
                number(update["estimate"]),
                "-"
                if update["low"] is None or _few(update)
                else f"{number(update['low'])} to {number(update['high'])}",
                "-" if update.get("n_eff") is None else f"{update['n_eff']:.1f} ({update['largest']:.0%})",
                number(update["eta_l"]),
                update["why"],
            )
            for update in shown
        )
        interval = f"{alpha['level']:.0%} interval"
        head = ("After step", "alpha", "Estimate", interval, "Effective steps (largest)", "eta L", "Rule")
        return ResultTable("alpha along the way", head, rows, text_columns=(6,))

    def _notes(self) -> list[str]:
        loss = ", ".join(f"{name} {value}" for name, value in self.loss.items())
        prompts, trained = self.prompts, self.trained
        lines = [
            f"Model {self.model}, template {self.template}; {loss}; trained: {trained['what']}, "
            f"{trained['parameters']:,} parameters.",
            f"{counted(prompts['train'], 'prompt')} to train on, batches of {self.batch_size}, peak learning rate "
            f"{self.learning_rate:g} ({self.scheduler}), seed {self.seed}.",
            "Rewards are beta times the log-ratio to the reference (SimPO: beta times the average log-probability); "
            "the first table weighs pairs as the loss does, alpha on D_t and 1 - alpha on D_e.",
        ]
        if self.alpha["setting"] == "adaptive":
            every = self.alpha["update_steps"]
            looks = "" if every is None else f", a look every {every} steps"
            lines.append(
                f"alpha: {self.alpha['mu']}{looks}; metric {self.eta_l['metric']}; eta L "
                f"{self.eta_l['at_peak']:.3g} at the peak learning rate{self._measured()}. A decision holds from the "
                "step after it; no prompt is held out."
            )
        return lines

    def _measured(self) -> str:
        times = self.eta_l["measurements"]
        if times:
            often = "once" if times == 1 else f"{times} times"
            return f" (L measured {often} along the noise, the D_t loss's Gauss-Newton matrix)"
        return " (assumed: too few steps to measure it)" if self.settings.get("eta_l") == "auto" else ""

    def _cautions(self) -> list[str]:
        prompts, lines = self.prompts, []
        if prompts["too_long"]:
            lines.append(f"{prompts['too_long']} prompts were set aside: a response is longer than `max_length`.")
        if prompts["unmatched"]:
            lines.append(f"{prompts['unmatched']} prompts were set aside: only one of D_t and D_e has them.")
        return lines


def _few(point: Mapping[str, Any]) -> bool:
    """Whether too few steps rule the estimate for an interval."""
    n_eff = point.get("n_eff")
    return n_eff is not None and n_eff < FEWEST


def _ends(point: Mapping[str, Any]) -> str:
    if point["low"] is None or _few(point):
        return "-"
    return f"{number(point['low'])} to {number(point['high'])}"


def _interval(point: Mapping[str, Any], level: float) -> str:
    """Interval of the estimate, or why there is none."""
    if _few(point):
        return f"not identified ({math.floor(10 * point['n_eff']) / 10:g} effective steps)"
    return f"{level:.0%} interval {_ends(point)}"
