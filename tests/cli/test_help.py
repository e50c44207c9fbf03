"""The command's first impression: help that is quick, because it imports nothing heavy, and has examples."""

from __future__ import annotations

import json
import subprocess
import sys

from bvpo_stats import __version__
from tests.cli.running import run

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "matplotlib",
    "seaborn",
    "pandas",
    "datasets",
    "peft",
    "accelerate",
    "pyarrow",
    "arviz_stats",
}
HEAVY |= {"jinja2", "beartype", "yaml"}
COMMANDS = ("", "demo", "variance", "sample", "pairs", "traces", "alpha-star", "train", "evaluate", "oracle-training")
COMMANDS += ("theorems", "figures", "report", "tiny", "tiny train", "tiny evaluate")


def imported(code: str) -> set[str]:
    """What a new interpreter has imported after some code."""
    code += "\nimport sys, json\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_help_of_any_command_imports_nothing_heavy() -> None:
    code = (
        "from bvpo_stats.cli.main import main\n"
        f"for command in {COMMANDS!r}:\n"
        "    try: main([*command.split(), '--help'])\n"
        "    except SystemExit: pass"
    )
    assert not HEAVY & imported(code)


def test_the_package_imports_neither_models_nor_the_command_line() -> None:
    assert not (HEAVY | {"typer", "rich", "click"}) & imported("import bvpo_stats")


def test_version() -> None:
    assert run("--version").stdout.strip() == f"bvpo-stats {__version__}"


def test_commands_show_examples() -> None:
    assert "bvpo-stats variance --model" in run("variance", "--help").stdout


def test_a_wrong_command_line_is_one_line_and_code_2() -> None:
    for arguments in (["nonsense"], ["variance", "--samples", "many"], ["variance", "--nonsense"]):
        result = run(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.strip().splitlines()) == 1


def test_help_says_every_default_that_depends_on_something() -> None:
    """Square brackets in a help text are the terminal library's own: it took "[default: ...]" for a colour."""
    for command, words in (
        ("train", "the preset's, or embedded|the method's|the preset's, 0.1|twice the rank|1% of the tokens|0.5"),
        ("traces", "0 for samples at temperature 1, else 10"),
        ("alpha-star", "what lies beside --pairs|with --optimizer adamw, the second moments"),
        ("report", "report.html in FOLDER"),
        ("figures", "the reports that lie in --output"),
    ):
        said = " ".join(run(command, "--help").stdout.replace("│", " ").split())
        for each in words.split("|"):
            assert f"[default: ({each}" in said, (command, each)
