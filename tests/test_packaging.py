"""What the wheel holds: every package of the tree and the embedded model's files."""

from __future__ import annotations

import re
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
