"""``pairs`` and ``traces`` as a user meets them."""

from __future__ import annotations

from pathlib import Path

from tests.cli.running import failed_politely, run
from tests.sampling.samples import both_modes, sample, write_samples


def test_pairs_prints_what_it_did_and_what_it_set_aside(tmp_path: Path) -> None:
    rows = [*both_modes("good", ["17", "18"]), *both_modes("same", ["17", "17"])]
    result = run(
        "pairs", "--samples", write_samples(tmp_path / "s", rows), "--reward", "embedded", "--output", tmp_path / "o"
    )
    assert result.returncode == 0, result.stderr
    assert "identical answers" in result.stdout
    assert "1 prompts have a pair in both modes" in result.stdout
    assert {path.name for path in (tmp_path / "o").iterdir()} >= {
        "thinking.jsonl",
        "thinking.parquet",
        "nothinking.jsonl",
        "nothinking.parquet",
        "report.json",
        "report.md",
        "scores.jsonl",
    }


def test_pairs_refuses_politely(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "s", [sample("p", 0, "17"), sample("p", 1, "18")])
    out = ("--output", tmp_path / "o")
    failed_politely(run("pairs", "--samples", samples, "--reward", "best", *out), "--reward best", "unknown")
    failed_politely(run("pairs", "--samples", tmp_path / "none", "--reward", "embedded", *out), "no such folder")
    failed_politely(run("pairs", "--samples", samples, *out), "--reward")
    failed_politely(run("pairs", "--samples", samples, "--reward", "embedded", "--mode", "loud", *out), "--mode")
    bad = write_samples(tmp_path / "bad", [sample("p", 0, "17"), sample("p", 0, "18")])
    failed_politely(run("pairs", "--samples", bad, "--reward", "embedded", *out), "samples.jsonl:2", "occurs twice")


def test_traces_refuses_politely(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "s", [sample("p", 0, "17"), sample("p", 1, "18")])
    common = ("--samples", samples, "--output", tmp_path / "o")
    failed_politely(run("traces", "--pairs", tmp_path, *common), "no thinking.jsonl")
    failed_politely(run("traces", "--pairs", tmp_path, "--sources", "anchor,dream", *common), "--sources", "dream")
    failed_politely(run("traces", "--pairs", tmp_path, "--traces-per-answer", 0, *common), "--traces-per-answer 0")
    failed_politely(run("traces", "--pairs", tmp_path, "--batch-size", 0, *common), "--batch-size 0")
    assert not (tmp_path / "o").exists()
