"""The oracle training report: which alpha ends with the least loss, by optimizer, and where mixing helps or hurts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int
from scipy import stats

from bvpo_stats.statistics.moments import Array
from bvpo_stats.studies.base import REPORT_FILE, Finding, Presentation, Report, ResultTable
from bvpo_stats.training.alpha import DEFAULT_RULE

DPO, PAPER = "alpha = 1", "alpha = 0.5"
HALVES = ("choose", "judge")
GOALS = {"adamw": (-0.02, 0.025), "adamw-decay": (-0.02, 0.025), "sgd": (0.01, math.inf)}
"""By optimizer: how far the default's final L_m may be above the best fixed alpha's, on average and at worst."""

_WORDS = {"adamw": "AdamW", "adamw-decay": "AdamW with weight decay", "sgd": "SGD"}
_SIZES = ("small", "middle", "large")


@dataclass(frozen=True)
class OracleTrainingReport(Report):
    """Every method in every setting.

    Attributes:
        settings: Options of the run, its models among them.
        methods: Where each alpha comes from.
        cells: One a setting (optimizer, horizon, model, step size): by method, the means over seeds of L_m (``losses``)
            and norm(grad L_m)^2 (``grad_sq``) at a quarter, half and the end, of ``alpha`` and of ``eta_l``; None where
            a method was not run.
        summaries: One for each optimizer and half of the models, see `summarise`.
        planned: Settings of the whole study, all step sizes of one counted once.
    """

    study: ClassVar[str] = "oracle-training"
    drawn_by: ClassVar[str | None] = "bvpo_stats.lab.oracle_training.figures"

    settings: dict[str, Any]
    methods: list[dict[str, Any]]
    cells: list[dict[str, Any]]
    summaries: list[dict[str, Any]]
    planned: int

    @classmethod
    def of(
        cls, settings: dict[str, Any], methods: list[dict[str, Any]], rows: Sequence[dict[str, Any]], planned: int
    ) -> OracleTrainingReport:
        """From the trajectories.

        Args:
            settings: Options of the run.
            methods: Its methods.
            rows: Trajectories, of whole settings.
            planned: Settings that were to be trained.
        """
        names = [method["name"] for method in methods]
        found: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
        for row in rows:
            key = (row["optimizer"], row["horizon"], row["model"], row["size"])
            found.setdefault(key, {}).setdefault(row["method"], []).append(row)
        cells = [_cell(key, by_method, names, settings["models"]) for key, by_method in found.items()]
        summaries = [
            summary
            for optimizer in settings["optimizers"]
            for half in (*HALVES, "all")
            if (summary := summarise(cells, names, optimizer, half, settings["level"])) is not None
        ]
        return cls(settings, methods, cells, summaries, planned)

    def present(self) -> Presentation:
        """A table for each optimizer and half of the models, the map, and whether the default keeps its promise."""
        return Presentation(
            title="Which alpha trains best?",
            findings=tuple(self._findings()),
            tables=(*(_table(summary) for summary in self.summaries if summary["half"] != "all"), *self._maps()),
            notes=tuple(self._notes()),
            cautions=tuple(self._cautions()),
        )

    def written(self, folder: Path) -> str:
        """What a run leaves in its folder."""
        return f"{folder / REPORT_FILE}, report.md, figures/, trajectories.jsonl"

    def summary(self, optimizer: str, half: str) -> dict[str, Any] | None:
        """The summary of an optimizer and a half."""
        return next((s for s in self.summaries if (s["optimizer"], s["half"]) == (optimizer, half)), None)

    def _findings(self) -> list[Finding]:
        found = []
        for optimizer in self.settings["optimizers"]:
            chosen, judged = (self.summary(optimizer, half) for half in HALVES)
            if judged is None:
                continue
            if chosen is not None:
                name = chosen["least"]
                first, then = chosen["methods"][name]["over_best"], judged["methods"][name]
                found.append(
                    Finding(
                        f"{_WORDS[optimizer]}: the models that choose prefer {name} ({_share(first)} against the best "
                        "fixed alpha of each setting, picked after the fact); on those that judge it is "
                        f"{_share(then['over_best'])}, {_share(then['over_dpo'])} against DPO and "
                        f"{_share(then['over_paper'])} against alpha = 0.5."
                    )
                )
            if DEFAULT_RULE in judged["methods"]:
                found.append(_goal(optimizer, judged["methods"][DEFAULT_RULE]))
        return found

    def _maps(self) -> list[ResultTable]:
        """By optimizer: what mixing gains over DPO, by beta, length and step size."""
        names = [method["name"] for method in self.methods]
        fixed = [k for k, method in enumerate(self.methods) if method["source"] == "fixed"]
        shown = [name for name in (PAPER, "line 0.5 to 1", DEFAULT_RULE) if name in names]
        head = ("Setting", "best fixed alpha, mean", "it over DPO", *(f"{name} over DPO" for name in shown))
        tables = []
        for optimizer in self.settings["optimizers"]:
            cells = [cell for cell in self.cells if cell["optimizer"] == optimizer]
            rows = []
            for key in sorted({(cell["beta"], cell["horizon"], cell["size"]) for cell in cells}):
                some = [cell for cell in cells if (cell["beta"], cell["horizon"], cell["size"]) == key]
                ends = np.array(
                    [[np.nan if one is None else one[-1] for one in cell["losses"]] for cell in some]
                )  # [cells, methods]
                over = ends / ends[:, [names.index(DPO)]] - 1
                best = np.mean([self.methods[fixed[k]]["line"][0] for k in over[:, fixed].argmin(axis=1)])
                gains = [over[:, fixed].min(axis=1).mean(), *(over[:, names.index(name)].mean() for name in shown)]
                label = f"beta {key[0]:g}, {key[1]} steps, {_SIZES[key[2]]}"
                rows.append((label, f"{best:.2f}", *(f"{gain:+.1%}" if np.isfinite(gain) else "-" for gain in gains)))
            if rows:
                tables.append(ResultTable(f"Where mixing helps, {_WORDS[optimizer]}: final L_m", head, tuple(rows)))
        return tables

    def _notes(self) -> list[str]:
        settings = self.settings
        models = "; ".join(
            f"{m['number']}: {m['prompts']} prompts, beta {m['beta']:g}, seed {m['oracle_seed']}"
            for m in settings["models"]
        )
        lengths = ", ".join(map(str, settings["horizons"]))
        return [
            "L_m, summed over all traces, as a share above (+) or below (-) that of the best of alpha = 0, 0.25, 0.5, "
            "0.75, 1 in the same setting (optimizer, model, length, step size), which is picked after the fact and so "
            f"favoured; of DPO (alpha = 1); of the paper's 0.5. Means over settings, {settings['level']:.0%} intervals "
            "over models. A seed fixes the data of every method.",
            f"Models, drawn before anything was trained: {models}. The first half choose, the others judge. Two "
            "symbols, traces of up to two, three answers, LoRA.",
            f"{settings['seeds']} seeds, batches of {settings['batch_size']} fresh pairs, {lengths} steps; cosine "
            "schedule with 10% warm-up; AdamW at 3e-4, 1e-3 and 3e-3 (beta 1) or 1e-3, 3e-3 and 1e-2 (beta 0.1), "
            "weight decay 0 or 0.1; SGD at 0.2, 0.6 and 1.4 over the spectral norm of L_m's Hessian at theta_ref; "
            "float32.",
            "line a to 1: alpha rises linearly from a over the run. Rules are those of train, fed by the same stream; "
            "without traces, so the trace gradient's bias is taken as 0. exact: the same rules on exact moments, bias "
            "included, renewed every 15 steps.",
        ]

    def _cautions(self) -> list[str]:
        done = {(cell["optimizer"], cell["horizon"], cell["model"]) for cell in self.cells}
        if len(done) == self.planned:
            return []
        parts = [
            f"{_WORDS[optimizer]}, {horizon} steps: {sum(one[:2] == (optimizer, horizon) for one in done)} models"
            for optimizer in self.settings["optimizers"]
            for horizon in self.settings["horizons"]
        ]
        return [f"{len(done)} of {self.planned} settings are done ({'; '.join(parts)}); the others are not in here."]


def _goal(optimizer: str, ours: dict[str, Any]) -> Finding:
    """Whether the default keeps what was asked of it."""
    mean, worst = GOALS[optimizer]
    best, dpo, paper = ours["over_best"], ours["over_dpo"], ours["over_paper"]
    holds = best["mean"] <= mean and ours["worst"] <= worst
    if optimizer != "sgd":
        holds = holds and dpo["high"] < 0 and paper["high"] < 0
    return Finding(
        f"{_WORDS[optimizer]}: the default, {DEFAULT_RULE}, ends {_share(best)} against the best fixed alpha on the "
        f"models that judge (goal {mean:+.1%} or less), {ours['worst']:+.1%} at worst; {_share(dpo)} against DPO "
        f"(alpha = 1), {_share(paper)} against alpha = 0.5.",
        "holds" if holds else "fails",
    )


def _cell(
    key: tuple[Any, ...], by_method: dict[str, list[dict[str, Any]]], names: Sequence[str], models: list[dict[str, Any]]
) -> dict[str, Any]:
    optimizer, horizon, number, size = key
    model = next(model for model in models if model["number"] == number)

    def means(of: str) -> list[list[float] | None]:
        runs = [[row[of] for row in by_method.get(name, ())] for name in names]
        return [[_rounded(x) for x in np.mean(one, axis=0)] if one else None for one in runs]

    alphas = [[row["alpha_curve"] for row in by_method.get(name, ())] for name in names]
    eta_ls = [[row["eta_l"] for row in by_method.get(name, ()) if row["eta_l"] is not None] for name in names]
    return {
        "optimizer": optimizer,
        "horizon": horizon,
        "model": number,
        "size": size,
        "beta": model["beta"],
        "half": HALVES[model["judges"]],
        "eta": _rounded(by_method[names[0]][0]["eta"]),
        "losses": means("losses"),
        "grad_sq": means("grad_sq"),
        "alpha": [_rounded(np.mean(curves)) if curves else None for curves in alphas],
        "eta_l": [_rounded(np.mean(values)) if values else None for values in eta_ls],
    }


def _rounded(x: Any) -> float:
    return float(f"{float(x):.6g}")


def summarise(
    cells: Sequence[dict[str, Any]], names: Sequence[str], optimizer: str, half: str, level: float
) -> dict[str, Any] | None:
    """Final losses of every method relative to the best fixed alpha, to DPO and to alpha = 0.5.

    Args:
        cells: Settings.
        names: Methods, in the order of the cells' entries; those that were run in all of them are summed up.
        optimizer: Which.
        half: ``choose``, ``judge`` or ``all``.
        level: Of the intervals, over models: settings of one model are no independent data.

    Returns:
        ``settings`` and ``models`` (numbers of), ``least`` (the method that `train` offers with the least mean), and by
        method ``over_best``, ``over_dpo``, ``over_paper`` (``mean``, ``low``, ``high``), ``worst``, ``at_or_below``
        (share of settings), ``early`` and ``grad_sq`` (L_m at a quarter and norm(grad L_m)^2 at the end, over the least
        of the fixed ones'); None where there is no such cell.
    """
    some = [cell for cell in cells if cell["optimizer"] == optimizer and half in ("all", cell["half"])]
    if not some or DPO not in names or PAPER not in names:
        return None
    there = [k for k in range(len(names)) if all(cell["losses"][k] is not None for cell in some)]
    names = [names[k] for k in there]
    fixed = [k for k, name in enumerate(names) if name.startswith("alpha = ")]
    models = np.array([cell["model"] for cell in some])
    # [cells, methods, 3]
    losses, grads = (np.array([[cell[of][k] for k in there] for cell in some]) for of in ("losses", "grad_sq"))
    over = {
        "over_best": losses[:, :, -1] / losses[:, fixed, -1].min(axis=1, keepdims=True) - 1,
        "over_dpo": losses[:, :, -1] / losses[:, [names.index(DPO)], -1] - 1,
        "over_paper": losses[:, :, -1] / losses[:, [names.index(PAPER)], -1] - 1,
        "early": losses[:, :, 0] / losses[:, fixed, 0].min(axis=1, keepdims=True) - 1,
        "grad_sq": grads[:, :, -1] / grads[:, fixed, -1].min(axis=1, keepdims=True) - 1,
    }
    methods: dict[str, dict[str, Any]] = {
        name: {key: _interval(values[:, k], models, level) for key, values in over.items()}
        | {
            "worst": _rounded(over["over_best"][:, k].max()),
            "at_or_below": _rounded((over["over_best"][:, k] <= 0).mean()),
        }
        for k, name in enumerate(names)
    }
    offered = [name for name in names if "exact" not in name]
    return {
        "optimizer": optimizer,
        "half": half,
        "settings": len(some),
        "models": len(set(models.tolist())),
        "least": min(offered, key=lambda name: float(methods[name]["over_best"]["mean"])),
        "methods": methods,
    }


_UNBOUNDED = 1e9


def _interval(values: Array, models: Int[np.ndarray, " settings"], level: float) -> dict[str, float]:
    """Mean of the models' means with Student's interval; unbounded for a single model."""
    means = np.array([values[models == model].mean() for model in sorted(set(models.tolist()))])
    mean, half = float(means.mean()), _UNBOUNDED
    if len(means) > 1:
        half = float(stats.t.ppf(0.5 + level / 2, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means)))
    return {"mean": _rounded(mean), "low": _rounded(mean - half), "high": _rounded(mean + half)}


def _share(entry: dict[str, float]) -> str:
    if entry["high"] > _UNBOUNDED / 2:
        return f"{entry['mean']:+.1%}"
    return f"{entry['mean']:+.1%} [{entry['low']:+.1%}, {entry['high']:+.1%}]"


_HEAD = (
    "alpha from",
    "L_m over best fixed",
    "worst",
    "at or below",
    "over DPO",
    "over 0.5",
    "at a quarter",
    "norm(grad)^2 over best fixed",
)


def _table(summary: dict[str, Any]) -> ResultTable:
    rows = tuple(
        (
            name,
            _share(values["over_best"]),
            f"{values['worst']:+.1%}",
            f"{values['at_or_below']:.0%}",
            _share(values["over_dpo"]),
            _share(values["over_paper"]),
            f"{values['early']['mean']:+.1%}",
            f"{values['grad_sq']['mean']:+.0%}",
        )
        for name, values in summary["methods"].items()
    )
    counted = f"{summary['settings']} settings of {summary['models']}"
    title = f"{_WORDS[summary['optimizer']]}, models that {summary['half']}: {counted}"
    return ResultTable(title, _HEAD, rows)
