"""What the wheel holds: every package of the tree and the embedded model's files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


def test_every_package_is_listed(pyproject: str) -> None:
    """The list is written out because the folder ``cli`` is installed as ``bvpo_stats.cli``, which no search maps."""
    block = re.search(r"^packages = \[(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    assert block is not None
    listed = set(re.findall(r'"([^"]+)"', block[1]))
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "bvpo_stats").rglob("__init__.py")}
    assert listed == found | {"bvpo_stats.cli"}


def test_data_files_are_covered(pyproject: str) -> None:
    """Every file of the package that is not Python code matches a pattern of package-data."""
    patterns = re.findall(r'"([\w./*]+)"', pyproject.split("[tool.setuptools.package-data]")[1].split("\n[")[0])
    for file in (ROOT / "bvpo_stats").rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            assert any(file.match(pattern) for pattern in patterns), file


def test_weights_are_small(pyproject: str) -> None:
    assert (ROOT / "bvpo_stats/embedded/weights/model.safetensors").stat().st_size <= 3_000_000


def names(block: str) -> set[str]:
    return set(re.findall(r'"([a-z_-]+)[><=\[]', block))


def test_the_plain_installation_is_small_and_every_extra_is_explained(pyproject: str) -> None:
    core = re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    assert core is not None
    wanted = {"numpy", "scipy", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "jaxtyping"}
    assert names(core[1]) == wanted
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    extras = pyproject.split("[project.optional-dependencies]")[1].split("\n[")[0]
    for extra in ("cli", "plots", "math", "vllm", "real", "notebooks"):
        block = re.search(rf"^{extra} = (.*)$", extras, re.MULTILINE)
        assert block is not None, extra
        for name in names(block[1]) - {"bvpo-stats"}:
            assert f"`{name}`" in page, name
    for name in wanted:
        assert f"`{name}`" in page, name


def test_without_its_packages_the_command_says_which_extra_brings_them() -> None:
    code = "import sys; sys.modules['typer'] = None; from bvpo_stats.cli import main; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == ("Error: this needs typer, which the extra [cli] brings: pip install 'bvpo-stats[cli]'\n")
