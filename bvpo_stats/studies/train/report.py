"""The report of a training run: what training changed, and what alpha did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bvpo_stats.studies.base import Finding, Presentation, Report, ResultTable, number

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
        prompts: Numbers of prompts: ``train``, ``probe``, and set aside as ``too_long`` or ``unmatched``.
        batch_size: Prompts a step, over all processes.
        steps: Optimizer steps made.
        learning_rate: Its peak.
        scheduler: How it changes.
        alpha: ``setting``, ``prior``, ``level``, ``final``, ``mu``, ``update_steps``; the ``trajectory`` by logged step
            and the ``updates``, one a look at the probe set.
        eta_l: Learning rate times smoothness ``at_peak``, and the ``smoothness`` where it was measured.
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
    first: dict[str, float]
    last: dict[str, float]
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    seed: int

    def present(self) -> Presentation:
        """First and last tenth of the metrics, looks at the probe set, and what alpha did."""
        tables = [table for prefix, title in _SETS.items() if (table := self._metrics(prefix, title)).rows]
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
        first, last = self.first, self.last
        margin = ""
        if "rewards/margins" in last:
            margin = (
                f", the reward margin from {number(first['rewards/margins'])} to {number(last['rewards/margins'])}, "
                f"with {last['rewards/accuracies']:.0%} of the pairs in the right order at the end"
            )
        found = [
            Finding(
                f"{self.name}: {self.steps} steps of {self.batch_size} prompts took the loss from "
                f"{number(first.get('loss'))} to {number(last.get('loss'))}{margin}."
            )
        ]
        if self.alpha["setting"] == "adaptive":
            found.append(self._alpha_finding())
        return tuple(found)

    def _alpha_finding(self) -> Finding:
        alpha = self.alpha
        used = [point["alpha"] for point in alpha["trajectory"]]
        if not alpha["updates"]:
            return Finding(f"alpha was held at its prior {alpha['prior']:g}: {alpha['mu']}.", "open")
        if all(value == alpha["prior"] for value in used):
            return Finding(
                f"alpha stayed at its prior {alpha['prior']:g}: no estimate was sure enough to leave it "
                f"({_last(alpha)}).",
                "open",
            )
        moved = sum(value != alpha["prior"] for value in used) / len(used)
        return Finding(f"alpha left its prior {alpha['prior']:g} in {moved:.0%} of the steps; {_last(alpha)}.")

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
                "-" if update["low"] is None else f"{number(update['low'])} to {number(update['high'])}",
                number(update["eta_l"]),
                update["why"],
            )
            for update in shown
        )
        head = ("After step", "alpha", "Estimate", f"{alpha['level']:.0%} interval", "eta L", "Why")
        return ResultTable("Looks at the probe set", head, rows, text_columns=(5,))

    def _notes(self) -> list[str]:
        loss = ", ".join(f"{name} {value}" for name, value in self.loss.items())
        prompts, trained = self.prompts, self.trained
        lines = [
            f"Model {self.model}, template {self.template}; {loss}; trained: {trained['what']}, "
            f"{trained['parameters']:,} parameters.",
            f"{prompts['train']} prompts to train on, batches of {self.batch_size}, peak learning rate "
            f"{self.learning_rate:g} ({self.scheduler}), seed {self.seed}.",
            "Rewards are beta times the log-ratio to the reference (SimPO: beta times the average log-probability); "
            "the first table weighs pairs as the loss does, alpha on D_t and 1 - alpha on D_e.",
        ]
        if self.alpha["updates"]:
            lines.append(
                f"alpha: {prompts['probe']} probe prompts held out of training, looked at every "
                f"{self.alpha['update_steps']} steps; {self.alpha['mu']}; eta L {self.eta_l['at_peak']:.3g} "
                f"at the peak learning rate{self._measured()}. A decision holds from the step after it."
            )
        return lines

    def _measured(self) -> str:
        smoothness = self.eta_l["smoothness"]
        return "" if smoothness is None else f" (L = {smoothness:.4g} measured before the first step)"

    def _cautions(self) -> list[str]:
        prompts, lines = self.prompts, []
        if prompts["too_long"]:
            lines.append(f"{prompts['too_long']} prompts were set aside: a response is longer than `max_length`.")
        if prompts["unmatched"]:
            lines.append(f"{prompts['unmatched']} prompts were set aside: only one of D_t and D_e has them.")
        return lines


def _last(alpha: dict[str, Any]) -> str:
    update = alpha["updates"][-1]
    if update["estimate"] is None:
        return f"at the last look: {update['why']}"
    return (
        f"the last estimate is {number(update['estimate'])}, {alpha['level']:.0%} interval {number(update['low'])} to "
        f"{number(update['high'])}"
    )
