"""Everything in README.md, one command after the other; a killed run goes on, and what is done is not done again.

python run.py            # `make real`
python run.py --short    # a look at every step with few questions; nothing is to be concluded from its numbers
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bvpo_stats.errors import UserError
from bvpo_stats.store.jsonl import write_atomic

METHODS = {
    "dpo": "--method dpo",
    "simpo": "--method simpo",
    "half": "--alpha 0.5",
    "adaptive": "--alpha adaptive --traces {work}/traces",
}
"""Name of a run and what `train` is told for it."""


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        work: Folder of everything, below this one.
        steps: Optimizer steps of the fine-tune.
        questions: That pairs are made of.
        described: Questions of the study of variance.
        banked: Pairs with further traces, for alpha off the reference.
        updates: Optimizer steps of each training.
        problems: That the models are compared on.
        draws: Answers to each of them in each mode.
    """

    work: str = "runs/real"
    steps: int = 160
    questions: int = 64
    described: int = 40
    banked: int = 12
    updates: int = 16
    problems: int = 24
    draws: int = 2


SHORT = Sizes("runs/short", steps=56, questions=16, described=8, banked=4, updates=2, problems=6, draws=1)


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        words: As in a shell.
        output: What it leaves when it is done.
    """

    words: str
    output: str


def steps(sizes: Sizes) -> list[Step]:
    """The commands in order."""
    work = sizes.work
    model = f"--model {work}/model"
    data = f"{model} --pairs {work}/pairs"
    training = f"{data} --lora-r 8 --learning-rate 1e-3 --batch-size 4 --max-steps {sizes.updates} --unmatched drop"
    adapters = " ".join(f"--adapter {name}={work}/{name}/model" for name in METHODS)
    return [
        Step(f"python convert.py {work}/base", f"{work}/base"),
        Step(f"python finetune.py {work}/base {work}/model --steps {sizes.steps}", f"{work}/model"),
        Step(
            f"python problems.py {work}/questions.jsonl --number {sizes.questions} --seed 1", f"{work}/questions.jsonl"
        ),
        Step(f"python problems.py {work}/test.jsonl --number {sizes.problems} --seed 2", f"{work}/test.jsonl"),
        _study(
            "sample",
            f"{model} --prompts {work}/questions.jsonl --samples 4 --temperature 1 --max-new-tokens 64",
            f"{work}/sample",
        ),
        _study(
            "variance",
            f"{model} --prompts {work}/questions.jsonl --samples-from {work}/sample/samples.jsonl "
            f"--limit {sizes.described}",
            f"{work}/variance",
        ),
        _study("pairs", f"{model} --samples {work}/sample --reward problems:grade --ref-logps", f"{work}/pairs"),
        _study(
            "alpha-star",
            f"{data} --lora-r 8 --batch-size 4 --optimizer adamw --learning-rate 1e-3 --max-tokens 2048",
            f"{work}/alpha-star",
        ),
        _study(
            "traces",
            f"{data} --samples {work}/sample --traces-per-answer 3 --mh-moves 1 --limit {sizes.banked}",
            f"{work}/traces",
        ),
        *(_study("train", f"{training} {told.format(work=work)}", f"{work}/{name}") for name, told in METHODS.items()),
        _study(
            "alpha-star",
            f"{data} --adapter {work}/dpo/model --traces {work}/traces --traces-per-answer 3 --limit {sizes.banked} "
            "--batch-size 4 --max-tokens 2048",
            f"{work}/alpha-star-dpo",
        ),
        _study(
            "evaluate",
            f"{model} {adapters} --data {work}/test.jsonl --instruction '' --samples {sizes.draws} --temperature 0.6 "
            "--max-new-tokens 64",
            f"{work}/evaluate",
        ),
        Step(
            f"bvpo-stats report {work} --title 'SmolLM2-135M on word problems' --output {work}/report.html",
            f"{work}/report.html",
        ),
    ]


def _study(name: str, options: str, output: str) -> Step:
    return Step(f"bvpo-stats {name} {options} --output {output}", f"{output}/report.json")


def run(sizes: Sizes) -> None:
    """Runs what is not done.

    A step is done when its output is there and neither it nor a step before it has changed since.

    Raises:
        UserError: A step fails; what it said stands above.
    """
    if importlib.util.find_spec("math_verify") is None:  # known before the first of many minutes
        raise UserError("The package math-verify, which checks answers, is not installed. Run: pip install math-verify")
    record = Path(sizes.work, "steps.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    chain = ""
    for step in steps(sizes):
        chain = hashlib.sha256(f"{chain}\n{step.words}\n{_script(step)}".encode()).hexdigest()
        entry = done.get(step.words, {"seconds": 0.0, "cpu_seconds": 0.0})
        finished = entry.get("chain") == chain and Path(step.output).exists()
        print(f"{'done: ' if finished else '$ '}{step.words}", flush=True)
        if finished:
            continue
        start, cpu = time.monotonic(), _cpu()
        code = subprocess.run(_command(step.words), check=False).returncode
        entry["seconds"] += time.monotonic() - start
        entry["cpu_seconds"] += _cpu() - cpu
        if code == 0:
            entry["chain"] = chain
        done[step.words] = entry
        write_atomic(record, json.dumps(done, indent=1))
        if code:
            raise UserError(f"This step failed with exit code {code}: {step.words}")
    print(times(done, steps(sizes)))


def _script(step: Step) -> str:
    """Source of a step that is a file here; a package's version is the commands' own business."""
    words = shlex.split(step.words)
    names = {words[1], "problems.py"} if words[0] == "python" else set()
    return "".join(Path(name).read_text(encoding="utf-8") for name in sorted(names))


def _command(words: str) -> list[str]:
    first, *rest = shlex.split(words)
    return [sys.executable, *(["-m", "bvpo_stats.cli.main"] if first == "bvpo-stats" else []), *rest]


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def times(done: dict[str, dict[str, float]], all_steps: list[Step]) -> str:
    """Table of what each step took, goes on and repetitions included."""
    lines = [f"{'':<24}{'minutes':>9}{'CPU minutes':>13}"]
    for step in all_steps:
        wall, cpu = (done[step.words][name] / 60 for name in ("seconds", "cpu_seconds"))
        name = step.output.removesuffix("/report.json").rpartition("/")[2]
        lines.append(f"{name:<24}{wall:>9.1f}{cpu:>13.1f}")
    wall, cpu = (sum(done[step.words][name] for step in all_steps) / 60 for name in ("seconds", "cpu_seconds"))
    return "\n".join([*lines, f"{'in all':<24}{wall:>9.1f}{cpu:>13.1f}"])


def main() -> None:
    """Runs the steps in this folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few questions; nothing is to be concluded from them")
    sizes = SHORT if parser.parse_args().short else Sizes()
    os.chdir(Path(__file__).parent)
    try:
        run(sizes)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
