"""The command's first impression: help that is quick, because it imports nothing heavy, and has examples."""

from __future__ import annotations

import subprocess
import sys

from bvpo_stats import __version__
from tests.cli.running import run


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom bvpo_stats.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'matplotlib', 'datasets', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


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
