"""DPO, SimPO, BVPO (0.5) and adaptive BVPO on the embedded model: the paper's Tables 1 and 2 in small.

    python benchmarks/embedded_training.py           # about 15 minutes of one core; goes on where it stopped

Trains on the shipped pairs of the prompts that the embedded benchmark does *not* ask (pairs of the first 200 prompts
are left out), three seeds a method, then evaluates all adapters and the untrained model on those 200 problems in both
modes. A seed decides the order of the data and the adapter's start. Run it from the root of the repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bvpo_stats.embedded.assets import embedded_prompts
from bvpo_stats.statistics.proportions import Interval, jackknife_interval
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.studies.evaluate.run import EvaluateConfig, evaluate
from bvpo_stats.studies.style import INK, PALETTE, figure

METHODS = {
    "DPO": ["--method", "dpo"],
    "SimPO": ["--method", "simpo"],
    "BVPO, alpha = 0.5": ["--method", "bvpo", "--alpha", "0.5"],
    "BVPO, adaptive": ["--method", "bvpo", "--alpha", "adaptive", "--alpha-update-steps", "10", "--eta-l", "auto"],
}
STEPS, LEARNING_RATE, BATCH = 40, 1e-4, 32
PROBLEMS, SAMPLES = 200, 4
DATA = Path("bvpo_stats/embedded/data")
COLUMNS = {
    ("thinking", "embedded"): "Thinking, accuracy",
    ("nothinking", "embedded"): "NoThinking, accuracy",
    ("thinking", "embedded_reward"): "Thinking, reward",
    ("nothinking", "embedded_reward"): "NoThinking, reward",
}


def other_pairs(folder: Path) -> Path:
    """The shipped records of all prompts but those of the benchmark."""
    asked = {prompt.prompt for prompt in embedded_prompts(PROBLEMS)}
    asked_ids = {prompt.prompt_id for prompt in embedded_prompts(PROBLEMS)}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("thinking", "nothinking", "traces"):
        with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            kept = [line for line in lines if json.loads(line)["prompt_id"] not in asked_ids]
        if any(f"<｜User｜>{text}<" in line for line in kept for text in asked):
            raise RuntimeError("A problem of the benchmark is among the training prompts.")
        write_atomic(folder / f"{name}.jsonl", "".join(kept))
    return folder


def train(name: str, seed: int, pairs: Path, output: Path) -> Path:
    """One run of ``bvpo-stats train``; a finished one is left alone."""
    words = ["--pairs", pairs, "--empty-pairs", pairs, "--traces", pairs / "traces.jsonl", "--unmatched", "drop"]
    words += ["--max-steps", STEPS, "--learning-rate", LEARNING_RATE, "--batch-size", BATCH, "--seed", seed]
    command = [sys.executable, "-m", "bvpo_stats.cli.main", "train", *METHODS[name], *words, "--output", output]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return output / "model"


def key(name: str, seed: int) -> str:
    """A run's name as an adapter."""
    return f"{name.lower().replace(', ', '-').replace('alpha = ', '').replace(' ', '-')}-{seed}"


def over_seeds(values: list[float]) -> dict[str, float | None]:
    """Mean over seeds with its interval (t with seeds - 1 degrees of freedom)."""
    found: Interval = jackknife_interval(np.array(values)[:, None], lambda x: x[..., 0])
    return {"value": found.value, "low": found.low, "high": found.high}


def results(report: Any, folder: Path, seeds: int) -> dict[str, Any]:
    """The table: the untrained model, then each method's mean over seeds and its differences from it."""
    rows: list[dict[str, Any]] = []
    base = {label: vars(report.scores["base"][mode][metric]) for (mode, metric), label in COLUMNS.items()}
    rows.append({"method": "untrained", "scores": base})
    for name in METHODS:
        scores, differences, against_half = {}, {}, {}
        for (mode, metric), label in COLUMNS.items():
            ours = [report.scores[key(name, seed)][mode][metric].value for seed in range(seeds)]
            half = [report.scores[key("BVPO, alpha = 0.5", seed)][mode][metric].value for seed in range(seeds)]
            start = report.scores["base"][mode][metric].value
            scores[label] = over_seeds(ours)
            differences[label] = over_seeds([value - start for value in ours])
            against_half[label] = over_seeds([a - b for a, b in zip(ours, half, strict=True)])
        paired = {
            label: [vars(report.differences[key(name, seed)][mode][metric]) for seed in range(seeds)]
            for (mode, metric), label in COLUMNS.items()
        }
        runs = [json.loads((folder / "train" / key(name, s) / "report.json").read_text()) for s in range(seeds)]
        finals = [run["alpha"]["final"] for run in runs]
        rows.append(
            {
                "method": name,
                "scores": scores,
                "differences": differences,
                "minus_half": against_half,
                "paired_by_problem": paired,
                "final_alpha": finals,
            }
        )
    settings = {
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH,
        "seeds": seeds,
        "training_prompts": len((folder / "pairs" / "thinking.jsonl").read_text(encoding="utf-8").splitlines()),
        "problems": PROBLEMS,
        "samples": SAMPLES,
        "temperature": 0.6,
    }
    return {"settings": settings, "rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """The committed table."""
    s, labels = found["settings"], list(COLUMNS.values())
    lines = [
        "# Training the embedded model",
        "",
        f"{s['seeds']} seeds a method, {s['steps']} steps of {s['batch_size']} prompts, AdamW, peak learning rate "
        f"{s['learning_rate']:g} (cosine, 10% warm-up), LoRA of rank 16; otherwise the methods' presets. "
        f"Trained on pairs of {s['training_prompts']} prompts that the benchmark does not ask; "
        f"{s['problems']} held-out problems, "
        f"{s['samples']} responses each at temperature {s['temperature']}. Accuracies in %. "
        "Intervals: by problem for the untrained model, over seeds (t, 2 degrees of freedom) for the means below it.",
        "",
        "| | " + " | ".join(labels) + " | final alpha |",
        "|---|" + "--:|" * (len(labels) + 1),
    ]
    for row in found["rows"]:
        cells = [_cell(row["scores"][label], label) for label in labels]
        alphas = row.get("final_alpha")
        alpha = "-" if not alphas or alphas[0] is None else ", ".join(f"{a:.2f}" for a in alphas)
        lines.append(f"| {row['method']} | " + " | ".join(cells) + f" | {alpha} |")
    for title, entry in (("Minus the untrained model", "differences"), ("Minus BVPO with alpha = 0.5", "minus_half")):
        lines += ["", f"## {title}", "", "| | " + " | ".join(labels) + " |", "|---|" + "--:|" * len(labels)]
        for row in found["rows"][1:]:
            if entry == "minus_half" and row["method"] == "BVPO, alpha = 0.5":
                continue
            lines.append(f"| {row['method']} | " + " | ".join(_cell(row[entry][x], x, "+") for x in labels) + " |")
    return "\n".join(lines) + "\n"


def _cell(entry: dict[str, float | None], label: str, sign: str = "") -> str:
    scale, form = (100, f"{sign}.1f") if "accuracy" in label else (1, f"{sign}.3f")
    value, low, high = (entry[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    text = format(scale * value, form)
    return text if low is None or high is None else f"{text} [{scale * low:{form}}, {scale * high:{form}}]"


def embedded_training_figure(found: dict[str, Any], folder: Path) -> Path:
    """Accuracy of every method less that of the untrained model, in both modes; means over seeds, 95% intervals.

    Args:
        found: ``embedded_training.json``.
        folder: Where the PNG file goes.
    """
    path, rows = folder / "accuracy_change.png", found["rows"][1:]
    places = np.arange(len(rows))
    modes = ("Thinking, accuracy", "NoThinking, accuracy")
    with figure(path, width=7.2, height=3.8) as (fig, axes):
        for label, offset, colour, marker in zip(modes, (-0.1, 0.1), PALETTE, "os", strict=False):
            entries = [row["differences"][label] for row in rows]
            value, low, high = (
                100 * np.array([e[name] for e in entries], dtype=float) for name in ("value", "low", "high")
            )
            axes.errorbar(places + offset, value, (value - low, high - value), fmt=marker, ms=5, lw=1.4, color=colour,
                          label=label.partition(",")[0])  # fmt: skip
        axes.axhline(0, color=INK, lw=1, ls=":")
        axes.set_xticks(places, [row["method"].replace(", ", "\n") for row in rows])
        axes.set_xlim(-0.5, len(rows) - 0.5)
        axes.set_ylabel("Change of accuracy (points)")
        axes.set_title("Embedded model: after training, less before (95% over seeds)")
        fig.legend(loc="outside lower center", ncols=2)
    return path


def main() -> None:
    """Trains, evaluates, writes table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/embedded-training"), help="runs; kept, to resume from")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--figures", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pairs = other_pairs(arguments.work / "pairs")
    adapters = []
    for seed in range(arguments.seeds):
        for name in METHODS:
            print(f"{name}, seed {seed}", flush=True)
            path = train(name, seed, pairs, arguments.work / "train" / key(name, seed))
            adapters.append(f"{key(name, seed)}={path}")
    config = EvaluateConfig(adapters=tuple(adapters), samples=SAMPLES, seed=0, limit=PROBLEMS)
    report = evaluate(config, arguments.work / "evaluate")
    found = results(report, arguments.work, arguments.seeds)
    write_atomic(arguments.output / "embedded_training.json", json.dumps(found, indent=1) + "\n")
    write_atomic(arguments.output / "embedded_training.md", markdown(found))
    embedded_training_figure(found, arguments.figures)


if __name__ == "__main__":
    main()
