"""What the documents say is so: commands exist, links lead somewhere, numbers are the committed ones."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from bvpo_stats.cli.main import app

from bvpo_stats.lab.theorems.report import TheoremsReport

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
COMMAND = typer.main.get_command(app)


def command_lines(text: str) -> Iterator[list[str]]:
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "bvpo-stats":
                yield words[1:]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_block_is_tried(path: Path) -> None:
    """Python runs (tests/test_front_door.py), commands are parsed below; another kind of block needs its test."""
    text = path.read_text(encoding="utf-8")
    kinds = re.findall(r"^ *```(\w*)", text, re.MULTILINE)[::2]
    assert set(kinds) <= {"python", "console"}
    if "python" in kinds:
        assert path.name in ("README.md", "from-python.md", "tasks.md")


def test_claims_of_the_reviewers_page() -> None:
    """Every row is the committed report's: claim, quantity, measured, should be, verdict, source."""
    page = (ROOT / "docs" / "reviewers.md").read_text(encoding="utf-8")
    found = TheoremsReport.from_json((ROOT / "figures" / "theorems" / "report.json").read_text(encoding="utf-8"))
    checks = [check for topic in found.topics for check in topic.checks]
    for check in checks:
        assert "| " + " | ".join(re.sub(r"([|*])", r"\\\1", cell) for cell in check.row) + " |" in page
    assert len(re.findall(r"^\| .* \| (?:holds|holds with limits|loose|fails) \|", page, re.MULTILINE)) == len(checks)
    star = report("alpha-star")["alpha_star"]
    assert f"{star['value']:.3f} ({star['low']:.3f} to {star['high']:.3f})" in page
    ratio, rise = report("variance")["table3"]["logp_variance_ratio"], report("variance")["table4"]["percent_increase"]
    assert f"{ratio['value']:.3g} ({ratio['low']:.3g} to {ratio['high']:.3g})" in page
    assert f"falls by {-rise['value']:.1f}% ({-rise['high']:.1f} to {-rise['low']:.1f})" in page


def test_gallery_shows_every_figure() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\(\.\./(figures/[^)]+)\)", page))
    assert shown == {str(path.relative_to(ROOT)) for path in (ROOT / "figures").rglob("*.png")}
    for path in [*(ROOT / "bvpo_stats").rglob("figures.py")]:
        for name in re.findall(r"^def (plot_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert f"`{name}`" in page


def report(study: str) -> dict[str, Any]:
    return json.loads((ROOT / "figures" / study / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_parse(path: Path) -> None:
    """Every option that a document shows is one that the command takes."""
    for name, *rest in command_lines(path.read_text(encoding="utf-8")):
        command = COMMAND.commands[name]  # type: ignore[attr-defined]
        try:
            command.make_context(name, list(rest), resilient_parsing=False)
        except click.ClickException as error:  # pragma: no cover - the failure that this test is for
            pytest.fail(f"{path.name}: bvpo-stats {name} {' '.join(rest)}: {error.format_message()}")


def test_readme_shows_every_command() -> None:
    for name in COMMAND.commands:  # type: ignore[attr-defined]
        assert name == "tiny" or f"`{name}`" in README or f"bvpo-stats {name}" in README, name


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "ARCHITECTURE.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    made = ("commands.md", "api/", "architecture.md", "changelog.md", "notebooks/")  # pages of docs/hooks/pages.py
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http", *made)):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = path.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL))
    shown = set(re.findall(r"^make ([a-z-]+)", blocks, re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)", text))
    assert shown <= targets


def test_numbers_of_alpha_star() -> None:
    found = report("alpha-star")
    star, single, share = found["alpha_star"], found["curve"][0], found["trace_sampling_share"]
    assert (found["batch_size"], found["eta_l"], found["seed"], single["batch_size"]) == (128, 1, 0, 1)
    assert f"{star['value']:.3f} ({star['low']:.3f} to {star['high']:.3f})" in RESULTS
    assert f"{single['alpha']:.2f} ({single['low']:.2f} to {single['high']:.2f})" in RESULTS
    assert not share["identified"]
    assert f"{share['value']:.1%} (not identified: the 34 prompts" in RESULTS
    assert f"weigh as {share['n_eff']:.1f})" in RESULTS
    verdict = found["verdict"]
    assert (verdict["beats_trace"], verdict["beats_empty"]) == ("yes", "yes")
    assert found["mse"]["zero"] < found["mse"]["alpha_star"]  # "as it does for the embedded model at B = 128"


def test_numbers_of_appendix_b() -> None:
    found = report("variance")
    assert (found["n_prompts"], found["n_samples"], found["seed"]) == (200, 2000, 0)
    rows = {
        "Variance ratio (log p), Thinking / NoThinking": (found["table3"]["logp_variance_ratio"], "{:.3g}"),
        "Ratio of geometric means (log p)": (found["table3"]["logp_geometric_ratio"], "{:.2f}"),
        "Variance ratio (length)": (found["table3"]["length_variance_ratio"], "{:.1f}"),
        "Ratio of geometric means (length)": (found["table3"]["length_geometric_ratio"], "{:.1f}"),
        "Mean length ratio": (found["table4"]["mean_length_ratio"], "{:.2f}"),
        "NLL Think (nats per token)": (found["table4"]["nll_think"], "{:.3f}"),
        "NLL No": (found["table4"]["nll_no"], "{:.3f}"),
        "% increase of NLL": (found["table4"]["percent_increase"], "{:.1f}"),
        "Trace token share": (found["table5"]["trace_token_share"], "{:.3f}"),
        "NLL trace / NLL answer": (found["table5"]["nll_ratio"], "{:.3f}"),
    }
    for label, (cell, form) in rows.items():
        value, low, high = (form.format(cell[key]) for key in ("value", "low", "high"))
        assert f"| {label} | {value} | {low} to {high} |" in RESULTS, label
    trace, answer = (found["spreads"][mode]["logp"] for mode in ("thinking", "nothinking"))
    shares = (trace["top_share"], answer["top_share"], trace["even_top_share"])
    assert "hold {:.0%} of the variance of log p with a trace and {:.0%} without ({:.0%} if".format(*shares) in RESULTS
    n_eff = [found["table3"][f"logp_{kind}_ratio"]["n_eff"] for kind in ("variance", "geometric")]
    assert n_eff == [pytest.approx(6, abs=0.5), pytest.approx(60, abs=0.5)]


def test_numbers_of_coverage_under_tails() -> None:
    lines = json.loads((ROOT / "benchmarks" / "tails.json").read_text())["lines"]
    held = [line for line in lines if not line["power_law"]]
    assert all(line["passed"] for line in lines)
    assert f"covers {min(line['coverage'] for line in held):.0%}".rstrip("%") in RESULTS
    assert min(line["coverage"] for line in held if line["questions"] >= 200) >= 0.93
    before = [line["before"]["coverage"] for line in held]
    assert f".{min(before) * 100:.0f} to .{max(before) * 100:.0f}, hardly better" in RESULTS
    assert len({line["population"] for line in lines}) == 12


def test_numbers_of_the_theorems() -> None:
    checks = [check for topic in report("theorems")["topics"] for check in topic["checks"]]
    should = [check for check in checks if check["should_hold"]]
    holding = [check for check in should if check["verdict"] != "fails"]
    loose = [check for check in should if check["verdict"] == "loose"]
    strong = [check for check in checks if not check["should_hold"] and check["verdict"] == "fails"]
    words = f"{len(holding)} of {len(should)} that should, {len(loose)} of them loosely; {len(strong)} sentences"
    assert words in RESULTS


def test_numbers_of_the_evaluation() -> None:
    found = report("evaluate")
    assert (found["sampling"]["temperature"], found["sampling"]["seed"]) == (0.6, 0)
    for mode, label in (("thinking", "Thinking"), ("nothinking", "NoThinking")):
        accuracy, reward = (found["scores"]["base"][mode][name] for name in ("embedded", "embedded_reward"))
        percent, low, high = (f"{100 * accuracy[key]:.1f}" for key in ("value", "low", "high"))
        grades = f"{reward['value']:.3f} ({reward['low']:.3f} to {reward['high']:.3f})"
        assert f"| {label} | {percent} ({low} to {high}) | {grades} |" in RESULTS
