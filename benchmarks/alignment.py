"""The paper's Tables 1 and 2 in small: the embedded model is aligned with a judge that cares for wording alone.

    python benchmarks/alignment.py                     # hours of one core; goes on where it stopped
    python benchmarks/alignment.py --workers 2         # with two cores

The preference is not correctness: an answer should come in the form that the question asks for (`embedded-judge`), as
the paper aligns with a reward model of helpfulness and then looks whether reasoning is kept. Fresh prompts that the
model was not trained on; on-policy pairs in both modes, five responses each, at the paper's temperature 0.8 and at 1.
Every method gets the same search: six settings of learning rate and beta, one seed each, on validation prompts; the
rule is written in `chosen`. Then five seeds at the chosen setting, and test prompts that nothing was chosen on.

A cell (one training run and its answers) depends on its name alone, so any can be made again by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bvpo_stats.cli.main import main as cli
from jaxtyping import Float
from measure import machine
from scipy import stats

from bvpo_stats.embedded.task import generate_prompts, parse_answer
from bvpo_stats.records import MODES, Completion, Mode, Prompt
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.studies.style import INK, PALETTE, panels

TRAIN, VALIDATION, TEST = 2000, 300, 400
DRAWS = 2
"""Answers to each validation and test prompt, in each mode."""

TEMPERATURES = (0.8, 1.0)
BATCH, EPOCHS = 8, 1
SEEDS = range(1, 6)
"""Of the final runs; the search has seed 0."""

LEARNING_RATES, DPO_BETAS, SIMPO_BETAS = (1e-4, 3e-4, 1e-3), (0.1, 1.0), (2.5, 10.0)
ALLOWED_LOSS = 0.02
"""Of accuracy, in either mode, that a setting may cost and still be chosen for its win rate."""

MODE_NAMES = {"thinking": "Thinking", "nothinking": "NoThinking"}
SHOWN = {"win": "win rate", "reward": "reward", "correct": "accuracy", "tokens": "tokens"}


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        name: What it is called there.
        options: Of ``bvpo-stats train``.
        betas: That are searched.
    """

    name: str
    options: tuple[str, ...]
    betas: tuple[float, ...] = DPO_BETAS


METHODS = (
    Method("SimPO", ("--method", "simpo"), SIMPO_BETAS),
    Method("DPO on D_t", ("--alpha", "1")),
    Method("DPO on D_e", ("--alpha", "0")),
    Method("BVPO, alpha = 0.5", ("--alpha", "0.5")),
    Method("BVPO, adaptive", ("--alpha", "adaptive")),
)


@dataclass(frozen=True)
class Cell:
    """One training run and its answers.

    Attributes:
        method: Of training; None for the untrained model.
        learning_rate: Peak.
        beta: Of the loss.
        seed: Of data order and adapter.
        asked: ``validation`` or ``test``.
    """

    method: Method | None
    learning_rate: float = 0.0
    beta: float = 0.0
    seed: int = 0
    asked: str = "test"

    @property
    def name(self) -> str:
        """Names its folder."""
        if self.method is None:
            return f"untrained-{self.asked}"
        kind = "".join(c if c.isalnum() else "-" for c in self.method.name.lower())
        return f"{kind}-{self.learning_rate:g}-{self.beta:g}-{self.seed}-{self.asked}"


@dataclass(frozen=True)
class Workplace:
    """Where the cells of one temperature are.

    Attributes:
        folder: Holds them.
        temperature: At which the pairs were sampled.
    """

    folder: Path
    temperature: float

    def prompts(self, asked: str) -> list[Prompt]:
        """Fresh prompts: for training, validation or test, all of them different."""
        found = generate_prompts(TRAIN + VALIDATION + TEST, 2_024, "held-out")
        start, size = {"train": (0, TRAIN), "validation": (TRAIN, VALIDATION), "test": (TRAIN + VALIDATION, TEST)}[
            asked
        ]
        return found[start : start + size]

    def make_pairs(self) -> None:
        """On-policy pairs of the training prompts, ranked by the judge."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt_id": p.prompt_id, "prompt": p.prompt, "gold": p.gold} for p in self.prompts("train")]
        write_atomic(self.folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        source, samples = self.folder / "prompts.jsonl", self.folder / "samples"
        command("sample", "--prompts", source, "--samples", 5, "--temperature", self.temperature, "--output", samples)
        command("pairs", "--samples", samples, "--reward", "embedded-judge", "--ref-logps", "--output", self.pairs)

    @property
    def pairs(self) -> Path:
        """D_t and D_e."""
        return self.folder / "pairs"

    def run(self, cell: Cell) -> dict[str, Any]:
        """Trains and asks, unless that was done."""
        path = self.folder / "cells" / f"{cell.name}.json"
        if not path.exists():
            adapter = None if cell.method is None else self._train(cell)
            found = self._answers(cell, adapter)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(found) + "\n")
        return dict(json.loads(path.read_text()))

    def _train(self, cell: Cell) -> Path:
        assert cell.method is not None
        output = self.folder / "train" / cell.name.rpartition("-")[0]
        words: list[object] = [*cell.method.options, "--pairs", self.pairs, "--unmatched", "drop", "--seed", cell.seed]
        words += ["--learning-rate", cell.learning_rate, "--beta", cell.beta, "--batch-size", BATCH, "--epochs", EPOCHS]
        command("train", *words, "--output", output)
        return output / "model"

    def _answers(self, cell: Cell, adapter: Path | None) -> dict[str, Any]:
        """Every measure of every answer, ``[prompts, draws]`` by mode; adaptive alpha's course beside them."""
        from bvpo_stats.model.policy import PolicyOptions, load_policy
        from bvpo_stats.sampling.rewards import Answer, load_reward
        from bvpo_stats.sampling.sample import sample

        prompts = self.prompts(cell.asked)
        policy = load_policy(PolicyOptions(adapter=None if adapter is None else str(adapter), device="cpu"))
        samples = sample(policy, prompts, DRAWS, temperature=0.6, seed=7)
        drawn = {(c.prompt_id, c.mode, c.sample_index): c for c in samples}
        judge = load_reward("embedded-judge")

        def measured(prompt: Prompt, completion: Completion) -> tuple[float, float, float]:
            text = completion.answer or ""
            (reward,) = judge.score([Answer(prompt.prompt_id, completion.mode, 0, prompt.prompt, text)])
            return (
                float(reward or 0.0),
                float(parse_answer(text) == int(prompt.gold or 0)),
                len(completion.completion_ids),
            )

        found: dict[str, Any] = {}
        for mode in MODES:
            values = [[measured(p, drawn[p.prompt_id, mode, k]) for k in range(DRAWS)] for p in prompts]
            array = np.array(values)
            found[mode] = {name: array[..., n].tolist() for n, name in enumerate(("reward", "correct", "tokens"))}
        if adapter is not None:
            report = json.loads((adapter.parent / "report.json").read_text())
            found["alpha"] = report["alpha"]["trajectory"]
            found["history"] = [
                {key: entry[key] for key in ("step", *_STATISTICS) if key in entry} for entry in report["history"]
            ]
            found["steps"] = report["steps"]
        return found


_STATISTICS = ("alpha/h_sq", "alpha/P1", "alpha/Q1", "alpha/eta_l")


def command(*words: object) -> None:
    """``bvpo-stats`` with these words; the same folder again resumes."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            cli([str(word) for word in words])
        except SystemExit as done:  # what was wrong stands on stderr
            if done.code:
                raise


def searched(method: Method) -> list[Cell]:
    """The settings that a method is tried at."""
    pairs = itertools.product(LEARNING_RATES, method.betas)
    return [Cell(method, rate, beta, asked="validation") for rate, beta in pairs]


def measures(found: dict[str, Any], base: dict[str, Any], mode: Mode) -> dict[str, Float[np.ndarray, " prompts"]]:
    """Means over the draws of each prompt: win rate against the untrained model's answer of the same number, and so on.

    A tie is half a win.
    """
    ours, theirs = (np.array(each[mode]["reward"]) for each in (found, base))
    win = 0.5 + 0.5 * np.sign(ours - theirs)
    return {"win": win.mean(axis=1)} | {
        name: np.array(found[mode][name]).mean(axis=1) for name in ("reward", "correct", "tokens")
    }


def chosen(cells: list[Cell], found: dict[str, dict[str, Any]], base: dict[str, Any]) -> Cell:
    """The rule: of the settings that cost at most 2 points of validation accuracy in either mode, the one with the
    highest win rate, Thinking and NoThinking averaged; if all cost more, the one that costs least.
    """

    def score(cell: Cell) -> tuple[bool, float]:
        by_mode = [measures(found[cell.name], base, mode) for mode in MODES]
        starts = [measures(base, base, mode) for mode in MODES]
        worst = max(b["correct"].mean() - m["correct"].mean() for m, b in zip(by_mode, starts, strict=True))
        able = bool(worst <= ALLOWED_LOSS)
        return able, float(np.mean([m["win"].mean() for m in by_mode])) if able else -float(worst)

    return max(cells, key=score)


def over_both(values: Float[np.ndarray, "seeds prompts"], level: float = 0.95) -> dict[str, float]:
    """Mean with an interval over seeds and prompts: Var = s^2(seed means) / S + s^2(prompt means) / P.

    The second term holds a part of the noise that the first holds too, so the interval errs on the wide side;
    Satterthwaite's degrees of freedom. One row, the untrained model's, has no seeds to vary over.
    """
    n_seeds, n_prompts = values.shape
    parts = [(values.mean(axis=0).var(ddof=1) / n_prompts, n_prompts - 1)]
    if n_seeds > 1:
        parts.append((values.mean(axis=1).var(ddof=1) / n_seeds, n_seeds - 1))
    total = sum(part for part, _ in parts)
    freedom = total**2 / max(sum(part**2 / n for part, n in parts), 1e-300)
    reach = float(stats.t.ppf(0.5 + level / 2, max(freedom, 1.0))) * math.sqrt(total) if total > 0 else 0.0
    mean = float(values.mean())
    return {"value": mean, "low": mean - reach, "high": mean + reach}


def study(place: Workplace, workers: int) -> dict[str, Any]:
    """All cells of one temperature, and what they say."""
    place.make_pairs()
    untrained = {asked: place.run(Cell(None, asked=asked)) for asked in ("validation", "test")}

    def run_all(cells: list[Cell]) -> dict[str, dict[str, Any]]:
        with ThreadPoolExecutor(workers) as pool:  # a cell is a process of its own
            return dict(
                zip([c.name for c in cells], pool.map(lambda cell: in_a_process(place, cell), cells), strict=True)
            )

    search = run_all([cell for method in METHODS for cell in searched(method)])
    picked = {method.name: chosen(searched(method), search, untrained["validation"]) for method in METHODS}
    final = {name: [replace(cell, seed=seed, asked="test") for seed in SEEDS] for name, cell in picked.items()}
    done = run_all([cell for cells in final.values() for cell in cells])
    base = untrained["test"]
    runs = {"untrained": [base]} | {name: [done[cell.name] for cell in cells] for name, cells in final.items()}
    values = {
        name: {
            mode: {key: np.stack([measures(found, base, mode)[key] for found in each]) for key in SHOWN}
            for mode in MODES
        }
        for name, each in runs.items()
    }
    return {
        "temperature": place.temperature,
        "settings": {name: {"learning_rate": cell.learning_rate, "beta": cell.beta} for name, cell in picked.items()},
        "search": {
            name: {
                mode: {key: float(v.mean()) for key, v in measures(found, untrained["validation"], mode).items()}
                for mode in MODES
            }
            for name, found in search.items()
        },
        "rows": {
            name: {mode: {key: over_both(v) for key, v in keys.items()} for mode, keys in modes.items()}
            for name, modes in values.items()
        },
        "minus": {
            f"{name} minus {other}": {
                mode: {key: over_both(values[name][mode][key] - values[other][mode][key]) for key in SHOWN}
                for mode in MODES
            }
            for name, other in COMPARED
        },
        "steps": runs[METHODS[0].name][0]["steps"],
        "pairs": sum(1 for _ in (place.pairs / "thinking.jsonl").open()),
        "courses": [found["history"] for found in runs["BVPO, adaptive"]],
        "alphas": [[point["alpha"] for point in found["alpha"]] for found in runs["BVPO, adaptive"]],
    }


COMPARED = (
    *((method.name, "untrained") for method in METHODS),
    ("BVPO, alpha = 0.5", "DPO on D_t"),
    ("BVPO, adaptive", "DPO on D_t"),
    ("BVPO, alpha = 0.5", "DPO on D_e"),
    ("BVPO, adaptive", "DPO on D_e"),
    ("BVPO, adaptive", "BVPO, alpha = 0.5"),
)


def in_a_process(place: Workplace, cell: Cell) -> dict[str, Any]:
    """`Workplace.run` in a process of its own, so that several can go on side by side."""
    kind = -1 if cell.method is None else METHODS.index(cell.method)
    words = [str(place.folder.parent), place.temperature, kind, cell.learning_rate, cell.beta, cell.seed, cell.asked]
    line = [sys.executable, __file__, "--cell", *map(str, words)]
    subprocess.run(line, check=True)
    print(f"temperature {place.temperature:g}: {cell.name}", flush=True)
    return place.run(cell)


def one_cell(words: list[str]) -> None:
    """What `in_a_process` runs."""
    work, temperature, kind, rate, beta, seed, asked = words
    method = None if int(kind) < 0 else METHODS[int(kind)]
    place_of(Path(work), float(temperature)).run(Cell(method, float(rate), float(beta), int(seed), asked))


def place_of(work: Path, temperature: float) -> Workplace:
    """The folder of a temperature."""
    return Workplace(work / f"temperature-{temperature:g}", temperature)


def markdown(result: dict[str, Any]) -> str:
    """The committed tables."""
    lines = [
        "# Tables 1 and 2 of the paper in small: wording aligned, reasoning kept?",
        "",
        f"Embedded model; {TRAIN} fresh prompts, five responses each and mode, ranked by a judge of wordings that is "
        f"blind to correctness; one epoch in batches of {BATCH}, AdamW (cosine), LoRA of rank 16. Learning rate and "
        f"beta of each method: the best of {len(LEARNING_RATES) * 2} settings on {VALIDATION} validation prompts by "
        "one rule (highest win rate of both modes among those that cost at most 2 points of accuracy in either). "
        f"{len(SEEDS)} seeds; {TEST} test prompts, {DRAWS} answers each and mode, at temperature 0.6. Win rate: "
        "against the untrained model's answer, a tie is half. 95% intervals over seeds and prompts.",
    ]
    for part in result["temperatures"]:
        lines += ["", f"## Pairs sampled at temperature {part['temperature']:g} ({part['pairs']} in D_t)", ""]
        lines += [f"**{verdict(part)}**", ""]
        lines += _table("Table 1: win rate (%) and reward", part["rows"], ("win", "reward"), "")
        lines += _table("Table 2: accuracy (%) and tokens per answer", part["rows"], ("correct", "tokens"), "")
        lines += _table("Differences (points; reward in units)", part["minus"], ("win", "reward", "correct"), "+")
        lines += ["", "| method | learning rate | beta |", "|---|--:|--:|"]
        lines += [f"| {name} | {s['learning_rate']:g} | {s['beta']:g} |" for name, s in part["settings"].items()]
        lines += ["", "Adaptive alpha along the way (means over seeds, in the optimizer's metric):", ""]
        lines += _course(part)
    lines += ["", "## Machine", "", *(f"- {name}: {value}" for name, value in result["machine"].items())]
    return "\n".join(lines) + "\n"


def verdict(part: dict[str, Any]) -> str:
    """Does BVPO beat DPO here, and where?"""
    sentences = []
    for name in ("BVPO, alpha = 0.5", "BVPO, adaptive"):
        for other in ("DPO on D_t", "DPO on D_e"):
            found = part["minus"][f"{name} minus {other}"]
            words = []
            for mode in MODES:
                win = found[mode]["win"]
                told = "beats" if win["low"] > 0 else "loses to" if win["high"] < 0 else "is not told apart from"
                words.append(f"{told} {other} {MODE_NAMES[mode]} ({100 * win['value']:+.1f} points)")
            sentences.append(f"{name} {' and '.join(words)}")
    return "; ".join(sentences) + "."


def _table(title: str, rows: dict[str, Any], keys: tuple[str, ...], sign: str) -> list[str]:
    heads = [f"{MODE_NAMES[mode]}, {SHOWN[key]}" for key in keys for mode in MODES]
    lines = [f"| {title} | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name, modes in rows.items():
        cells = []
        for key, mode in itertools.product(keys, MODES):
            entry, scale = modes[mode][key], 100 if key in ("win", "correct") else 1
            form = f"{sign}.1f" if key != "reward" else f"{sign}.3f"
            value, low, high = (format(scale * entry[end], form) for end in ("value", "low", "high"))
            cells.append(value if name == "untrained" and key == "win" else f"{value} [{low}, {high}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _course(part: dict[str, Any]) -> list[str]:
    head = ["step", "alpha", "norm(h)^2", "P1", "Q1", "eta L"]
    lines = ["| " + " | ".join(head) + " |", "|--:" * len(head) + "|"]
    courses, alphas = part["courses"], np.array(part["alphas"])
    for place in sorted({0, *np.linspace(0, len(courses[0]) - 1, 6).astype(int).tolist()}):
        cells = [str(courses[0][place]["step"]), f"{alphas[:, place].mean():.2f}"]
        for key in _STATISTICS:
            known = [course[place][key] for course in courses if course[place].get(key) is not None]
            cells.append(f"{np.mean(known):.3g}" if known else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def alignment_figure(result: dict[str, Any], folder: Path) -> Path:
    """Win rate against accuracy, Thinking and NoThinking, of every method at the first temperature.

    Args:
        result: ``alignment.json``.
        folder: Where the PNG file goes.
    """
    path, part = folder / "alignment.png", result["temperatures"][0]
    with panels(path, 2, width=8.4, height=4.2) as (fig, axes):
        for panel, mode in zip(axes, MODES, strict=True):
            for (name, modes), colour in zip(part["rows"].items(), (INK, *PALETTE), strict=True):
                win, correct = ({k: 100 * v for k, v in modes[mode][key].items()} for key in ("win", "correct"))
                panel.errorbar(
                    win["value"],
                    correct["value"],
                    xerr=[[win["value"] - win["low"]], [win["high"] - win["value"]]],
                    yerr=[[correct["value"] - correct["low"]], [correct["high"] - correct["value"]]],
                    fmt="o",
                    color=colour,
                    label=name if mode == MODES[0] else None,
                )
            panel.set_title(MODE_NAMES[mode])
            panel.set_xlabel("Win rate against the untrained model (%)")
        axes[0].set_ylabel("Arithmetic accuracy (%)")
        fig.legend(loc="outside lower center", ncols=3)
    return path


def main() -> None:
    """Runs what is missing; writes tables and figure of the temperatures that are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/alignment"), help="the cells; kept, to resume from")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--temperature", type=float, nargs="*", default=list(TEMPERATURES))
    parser.add_argument("--workers", type=int, default=1, help="cells at once")
    parser.add_argument("--cell", nargs=7, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.cell is not None:
        one_cell(arguments.cell)
        return
    result: dict[str, Any] = {"machine": machine(), "temperatures": []}
    for temperature in arguments.temperature:
        result["temperatures"].append(study(place_of(arguments.work, temperature), arguments.workers))
        write_atomic(arguments.output / "alignment.json", json.dumps(result, indent=1) + "\n")
        write_atomic(arguments.output / "alignment.md", markdown(result))
        alignment_figure(result, arguments.output)


if __name__ == "__main__":
    main()
