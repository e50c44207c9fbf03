"""Numbers that no run can have are refused in one line that names the option, before anything is loaded."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from bvpo_stats.cli import (
    alpha_star,
    evaluate,
    oracle_training,
    pairs,
    sample,
    theorems,
    traces,
    train,
    variance,
)
from bvpo_stats.cli.build import _parameters

from bvpo_stats.errors import UserError
from bvpo_stats.options import Option, members
from tests.cli.running import failed_politely, run

HUGE = 99_999_999_999_999_999_999


@pytest.mark.parametrize(
    "line",
    [
        "train --max-steps 0",
        "train --max-steps -7",
        "train --lora-alpha 0",
        "train --lora-r -1",
        "train --save-steps 0",
        "train --logging-steps 0",
        f"train --warmup {math.nan}",
        "train --warmup -1",
        f"train --learning-rate {math.inf}",
        "train --beta 0",
        "train --epochs 0",
        "train --batch-size -1",
        "train --eta-l -1",
        "train --alpha-rule best",
        "train --alpha-prior 2",
        f"train --seed {HUGE}",
        "alpha-star --groups 1",
        f"alpha-star --batch-size {math.nan}",
        f"alpha-star --gamma {math.nan}",
        "alpha-star --max-tokens 0",
        "oracle-training --level 1.5",
        "oracle-training --horizons 3",
        "sample --seed -1",
        f"sample --samples {HUGE}",
        "variance --ddof 2",
        f"variance --level {math.nan}",
        "evaluate --top-p 0",
        "evaluate --limit -1",
        "theorems --beta 0",
        "demo --seed -1",
        "tiny train --seed -1",
        "tiny evaluate --seed -1",
    ],
)
def test_nonsense_is_refused(line: str, tmp_path: Path) -> None:
    option, value = line.split()[-2:]
    failed_politely(run(*line.split(), "--output", tmp_path / "run"), f"{option} {value}")


def test_a_schedule_does_not_begin_before_the_first_step(tmp_path: Path) -> None:
    failed_politely(run("train", "--alpha", "-5:0.2", "--output", tmp_path / "run"), "steps rising from 0")


COMMANDS: dict[str, tuple[Callable[..., None], str, list[str]]] = {
    "variance": (variance.variance, "studies.variance.run:run_variance", []),
    "sample": (sample.sample, "studies.sample.run:run_sample", []),
    "pairs": (pairs.pairs, "studies.pairs.run:run_pairs", ["--samples", "s", "--reward", "embedded"]),
    "traces": (traces.traces, "studies.traces.run:run_traces", ["--samples", "s", "--pairs", "p"]),
    "alpha-star": (alpha_star.alpha_star, "studies.alpha_star.run:run_alpha_star", []),
    "train": (train.train, "studies.train.run:run_train", []),
    "evaluate": (evaluate.evaluate, "studies.evaluate.run:evaluate", []),
    "oracle-training": (oracle_training.oracle_training, "lab.oracle_training.run:run_oracle_training", []),
    "theorems": (theorems.theorems, "lab.theorems.run:run_theorems", []),
}
"""Each command, what it runs, and what it cannot be without."""

SERVED = ["--engine", "openai", "--base-url", "http://localhost:1", "--model", "m"]
"""What the options of a server need beside them."""

NONSENSE = ("nan", "inf", "-inf", "-1", "-7", "0", "1.5", "1e30", str(HUGE), "x", "a\x1b[31mb\n\u202ec", "\udcff", "")


TOGETHER = [("warmup", "1.5"), ("gamma", "1.5")]
"""In range, and refused for a reason of its own."""


def options_of(command: str) -> list[Any]:
    return list(_parameters(get_type_hints(COMMANDS[command][0])["config"]))


def numbers_of(kind: Any) -> list[type]:
    """The numbers among the types of an option, those in a tuple included."""
    flat = [inner for each in members(kind) for inner in (get_args(each) if get_origin(each) is tuple else (each,))]
    return [each for each in flat if each in (int, float)]


def fits(option: Option, kinds: list[type], word: str) -> bool:
    """Whether the declared type and range hold a word."""
    try:
        value = int(word) if kinds == [int] else float(word)
    except ValueError:
        return False
    return (
        math.isfinite(value)
        and not (option.low is not None and value < option.low)
        and not (option.above is not None and value <= option.above)
        and not (option.high is not None and value > option.high)
        and not (option.below is not None and value >= option.below)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range(command: str) -> None:
    for parameter in options_of(command):
        option = parameter.option
        if numbers_of(parameter.kind) and parameter.name != "alpha":  # or adaptive, or a schedule: its own reader
            assert option.low is not None or option.above is not None, parameter.flag
            assert option.high is not None or option.below is not None, parameter.flag


@pytest.mark.parametrize("command", COMMANDS)
def test_nonsense_for_every_option_is_refused_by_name_or_means_something(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is loaded: what a command would run says that it was reached."""
    _, place, needed = COMMANDS[command]
    module, _, name = place.partition(":")

    def reached(config: object, *_: object) -> None:
        raise UserError("reached")

    monkeypatch.setattr(importlib.import_module(f"bvpo_stats.{module}"), name, reached)
    for parameter in options_of(command):
        if set(members(parameter.kind)) <= {bool, NoneType}:
            continue
        beside = needed
        if parameter.path[0] == "server":
            beside = [*SERVED, *needed]
        if parameter.path[0] == "preferences":
            beside = ["--from-preferences", "f"]
        for word in NONSENSE if numbers_of(parameter.kind) else NONSENSE[-4:]:
            result = run(command, *beside, f"{parameter.flag}={word}", "--output", tmp_path / "run")
            failed_politely(result)
            accepted = result.stderr == "Error: reached\n"
            numbers = numbers_of(parameter.kind)
            if numbers and parameter.name != "alpha" and (parameter.name, word) not in TOGETHER:
                assert accepted == fits(parameter.option, numbers, word), (parameter.flag, word, result.stderr)
            if word == "":
                assert accepted == parameter.option.blank, (parameter.flag, result.stderr)
            if not accepted:
                assert parameter.flag in result.stderr, (word, result.stderr)
            assert result.stderr.count("\n") == 1, (parameter.flag, word)
            assert "\x1b" not in result.stderr, (parameter.flag, word)
            assert "\u202e" not in result.stderr, (parameter.flag, word)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("oracle-training --horizons 25,9999999", "at most 1,000,000"),
        ("sample --timeout 5", "--timeout says nothing without --base-url"),
        ("sample --concurrency 5", "--concurrency says nothing without --base-url"),
        ("train --warmup 1.5", "--warmup 1.5: a share of at most 1, or a whole number of steps"),
        ("alpha-star --pairs \udcff", "--pairs '\\udcff': is not UTF-8"),
    ],
)
def test_what_costs_too_much_or_says_nothing_is_refused(line: str, words: str) -> None:
    failed_politely(run(*line.split()), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: true", "seed must be a word, a number"),
        ("parquet: 1", "parquet must be true or false"),
        ("samples: {a: 1}", "samples must be a word, a number"),
        ("seed: 2020-01-01", "seed must be"),
        ("a: &a [*a]", "unknown options a"),
        ("output: ''", "output is empty"),
        ("prompts: ''", "prompts is empty"),
        ('prompts: "a\\0b"', "--prompts 'a\\x00b': holds a NUL character"),
        ("[" * 100_000, "cannot be read as YAML"),
        ("\0", "cannot be read as YAML"),
        ("samples: 1e30", "--samples"),
        ("temperature: .nan", "--temperature"),
    ],
)
def test_nonsense_in_a_config_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    failed_politely(run("sample", "--config", path, "--output", tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()
