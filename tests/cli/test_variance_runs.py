"""The variance command on the embedded model: same seed, same report, whatever the batches or kills."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.cli.running import run
from tests.processes import start
from tests.studies.test_variance_tables import write_samples

ARGUMENTS = (
    "variance",
    "--limit",
    "8",
    "--samples",
    "3",
    "--seed",
    "5",
    "--max-new-tokens",
    "200",
    "--batch-size",
    "8",
)


def report(folder: Path) -> dict[str, object]:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run(*ARGUMENTS, "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_report_has_every_promised_field(uninterrupted: Path) -> None:
    found = report(uninterrupted)
    promised = {
        "table3": ["logp_variance_ratio", "logp_geometric_ratio", "length_variance_ratio", "length_geometric_ratio"],
        "table4": ["mean_length_ratio", "nll_think", "nll_no", "delta_nll", "percent_increase"],
        "table5": ["trace_token_share", "nll_trace", "nll_answer", "nll_ratio"],
    }
    for table, entries in promised.items():
        assert list(found[table]) == entries  # type: ignore[call-overload]
        for entry in entries:
            cell = found[table][entry]  # type: ignore[index]
            assert cell["low"] <= cell["value"] <= cell["high"]
    assert {"n_prompts", "n_samples", "truncated", "model", "seed", "versions"} <= set(found)
    assert found["n_prompts"] == 8
    assert found["n_samples"] + found["truncated"] == 8 * 3 * 2  # type: ignore[operator]


def test_files_are_all_there(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.rglob("*") if path.is_file()}
    assert {"samples.jsonl", "logprobs.jsonl", "report.json", "report.md", "ratios.png", "lengths.png"} <= names
    text = (uninterrupted / "report.md").read_text()
    for line in text.splitlines():
        if line.startswith("!["):
            assert (uninterrupted / line.partition("](")[2].rstrip(")")).is_file()


def test_logprobs_are_the_models_own(uninterrupted: Path) -> None:
    """One response scored by transformers' own full logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from bvpo_stats.embedded.assets import embedded_model_path

    model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float64).eval()
    logged = {row["key"]: row["logprobs"] for row in map(json.loads, (uninterrupted / "logprobs.jsonl").open())}
    for line in (uninterrupted / "samples.jsonl").read_text().splitlines()[:30:7]:
        row = json.loads(line)
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.inference_mode():
            logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
        expected = logps[len(row["prompt_ids"]) - 1 :].tolist()
        found = logged[f"{row['prompt_id']}/{row['mode']}/{row['sample_index']}"]
        assert found == pytest.approx(expected, abs=2e-5)


def test_batch_size_does_not_matter(tmp_path: Path, uninterrupted: Path) -> None:
    result = run(*ARGUMENTS[:-1], "5", "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert report(tmp_path / "run") == report(uninterrupted)


def test_another_seed_is_another_report(tmp_path: Path, uninterrupted: Path) -> None:
    words = ["6" if before == "--seed" else word for before, word in zip(("", *ARGUMENTS), ARGUMENTS, strict=False)]
    assert run(*words, "--output", tmp_path / "run").returncode == 0
    assert report(tmp_path / "run")["table3"] != report(uninterrupted)["table3"]


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, uninterrupted: Path) -> None:
    """kill -9 at several places: after some samples, mid-line, after some scores."""
    folder = tmp_path / "run"
    samples = folder / "samples.jsonl"
    process = start("-m", "bvpo_stats.cli.main", *ARGUMENTS, "--output", folder)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (samples.exists() and samples.stat().st_size > 0):
        time.sleep(0.02)
    process.kill()
    with samples.open("rb+") as handle:  # a kill in the middle of a write leaves half a line
        handle.truncate(os.path.getsize(samples) - 40)
    assert run(*ARGUMENTS, "--output", folder).returncode == 0
    assert report(folder) == report(uninterrupted)

    scores = folder / "logprobs.jsonl"
    (folder / "report.json").unlink()
    scores.write_bytes(scores.read_bytes()[: scores.stat().st_size // 3])
    assert run(*ARGUMENTS, "--output", folder).returncode == 0
    assert report(folder) == report(uninterrupted)


def test_finished_run_again_changes_nothing(uninterrupted: Path) -> None:
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file() and path.name != ".lock"}
    assert run(*ARGUMENTS, "--output", uninterrupted).returncode == 0
    assert {path: path.read_bytes() for path in before} == before


def test_samples_from_the_same_run_give_the_same_tables(tmp_path: Path, uninterrupted: Path) -> None:
    result = run("variance", "--samples-from", uninterrupted / "samples.jsonl", "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    for table in ("table3", "table4", "table5"):
        for name, cell in report(uninterrupted)[table].items():  # type: ignore[attr-defined]
            assert report(tmp_path / "run")[table][name]["value"] == pytest.approx(cell["value"], rel=1e-4)  # type: ignore[index]


def test_published_row_beside_a_model_of_the_paper(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples.jsonl")
    name = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    result = run("variance", "--samples-from", samples, "--model", name, "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "R1-Qwen-7B" in result.stdout
    assert "10.17" in result.stdout
    assert report(tmp_path / "run")["published"]["table5"]["nll_answer"] == 0.261  # type: ignore[index]


def test_options_from_a_file(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples.jsonl")
    config = tmp_path / "config.yaml"
    config.write_text(f"samples-from: {samples}\nddof: 0\nlevel: 0.9\n")
    result = run("variance", "--config", config, "--level", "0.8", "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    definitions = report(tmp_path / "run")["definitions"]
    assert definitions == {"nll": "tokens", "ddof": 0, "level": 0.8}
