"""What is known before the weights are loaded is said before they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bvpo_stats.records import to_dict
from bvpo_stats.sampling.pairs import make_pairs
from tests.cli.running import failed_politely, run
from tests.sampling.samples import both_modes, template, write_samples


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Samples, pairs of two temperatures and other bad files; whoever loads weights fails."""
    samples = [row for p in range(4) for row in both_modes(f"p{p}", ["17", "18"])]
    write_samples(tmp_path / "samples", samples)
    rows = [to_dict(pair) for pair in make_pairs(samples, "embedded", policy=template())]
    warm = [row | {"temperature": 0.7} if row["prompt_id"] == "p3" else row for row in rows]
    same = [row | {"rejected_ids": row["chosen_ids"]} for row in rows]
    aborted = [to_dict(each) | {"finish_reason": "abort"} for each in samples]
    trace = {
        "prompt_id": "p9",
        "side": "chosen",
        "source": "mh",
        "index": 0,
        "prompt_ids": [2],
        "completion_ids": [7, 3],
    }
    trace |= {"answer_start": 1, "trace_logp": -1.0, "joint_logp": -1.0}
    for name, lines in (("pairs", rows), ("warm", warm), ("same", same), ("bank", [trace]), ("abort", aborted)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))

    def weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sample --template nonsense", "--template nonsense"),
        ("sample --dtype float12", "--dtype float12"),
        ("sample --device tpu:7", "--device tpu:7"),
        ("sample --prompts none.jsonl", "none.jsonl"),
        ("variance --template nonsense", "--template nonsense"),
        ("evaluate --limit 2 --template nonsense", "--template nonsense"),
        ("pairs --samples samples --reward nonsense --ref-logps", "--reward nonsense"),
        ("pairs --samples samples --reward embedded --ref-logps --template nonsense", "--template nonsense"),
        ("pairs --samples none --reward embedded", "--samples none"),
        ("traces --pairs warm.jsonl --samples samples", "several temperatures"),
        ("traces --pairs pairs.jsonl --samples none", "--samples none"),
        ("alpha-star --gamma 1 --traces none.jsonl", "--gamma 1 belongs to --loss simpo"),
        ("alpha-star --optimizer-state none.pt", "--optimizer-state none.pt: no such file"),
        ("alpha-star --traces none.jsonl", "--traces none.jsonl"),
        ("alpha-star --traces bank.jsonl", "no traces of these pairs' prompts, but of others, e.g. 'p9'"),
        ("alpha-star --groups 9999", "9999 jackknife groups"),
        ("train --pairs none.jsonl", "--pairs none.jsonl"),
        ("train --alpha 1.5", "--alpha 1.5: must lie"),
        ("train --alpha 0%:0.5,110%:1", "--alpha 0%:0.5,110%:1: a run ends at 100%"),
        ("train --alpha 5:0.5,3:1", "--alpha 5:0.5,3:1: a schedule needs"),
        ("train --gamma 1", "--gamma 1 belongs to --loss simpo"),
        ("variance --samples-from abort.jsonl", "--engine file of `bvpo-stats sample` sets such responses aside"),
        ("train --alpha adaptive --traces bank.jsonl", "no traces of these pairs' prompts"),
        ("train --scheduler sometimes", "sometimes"),
    ],
)
def test_before_the_weights(line: str, words: str, folder: Path) -> None:
    failed_politely(run(*line.split(), "--output", folder / "run"), words)


def test_pairs_of_equal_sides(folder: Path) -> None:
    """Today's `alpha* 1 (1 to 1)`: no gradient at all."""
    for mode in ("thinking", "nothinking"):
        rows = [line for line in (folder / "same.jsonl").read_text().splitlines() if f'"mode": "{mode}"' in line]
        (folder / f"{mode}.jsonl").write_text("\n".join(rows) + "\n")
    line = ("alpha-star", "--pairs", folder / "thinking.jsonl", "--empty-pairs", folder / "nothinking.jsonl")
    failed_politely(run(*line, "--output", folder / "run"), "same tokens as chosen and as rejected")


def test_a_bank_that_is_not_used_is_said(folder: Path) -> None:
    said = run("train", "--alpha", "0.3", "--traces", "bank.jsonl", "--output", folder / "run").stderr
    assert "--traces bank.jsonl is not used: --alpha 0.3 is not adaptive." in said
