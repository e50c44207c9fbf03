"""Data flows one way: the floors of the house, no import upwards, no circle, nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("lazy", "errors", "options", "records", "progress", "distributed"),
    ("embedded",),
    ("store",),
    ("statistics",),
    ("model",),
    ("sampling",),
    ("gradients",),
    ("training",),
    ("studies",),
    ("lab",),
    ("pages",),
    ("cli",),
)
"""From the ground up. A package imports from its own floor and from those below."""


@cache
def modules() -> dict[str, ast.Module]:
    files = {
        **{path: path.relative_to(ROOT) for path in (ROOT / "bvpo_stats").rglob("*.py")},
        **{path: Path("bvpo_stats") / path.relative_to(ROOT) for path in (ROOT / "cli").rglob("*.py")},
    }
    names = {path: ".".join(dotted.with_suffix("").parts).removesuffix(".__init__") for path, dotted in files.items()}
    return {names[path]: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules of the package that a module imports, inside functions and for the type checker included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bvpo_stats"):
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in modules() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("bvpo_stats"))


def floor(module: str) -> int | None:
    """None for the front door, which leads everywhere."""
    place = module.split(".")[1:2]
    return next((number for number, floor in enumerate(FLOORS) if place and place[0] in floor), None)


def test_every_package_has_a_floor() -> None:
    assert [name for name in modules() if floor(name) is None] == ["bvpo_stats"]


def test_no_import_goes_upwards() -> None:
    upwards = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        for target in imports(tree)
        if (here := floor(name)) is not None and (there := floor(target)) is not None and there > here
    ]
    assert not upwards


def test_there_is_no_circle() -> None:
    arrows = {
        name: {t for t in imports(tree) if t in modules() and t != "bvpo_stats"} for name, tree in modules().items()
    }
    arrows.pop("bvpo_stats")
    while free := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows, f"circles among {sorted(arrows)}"


HEAVY = (
    "torch",
    "transformers",
    "peft",
    "scipy",
    "matplotlib",
    "seaborn",
    "pandas",
    "pyarrow",
    "datasets",
    "typer",
    "rich",
    "jinja2",
    "beartype",
)


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import bvpo_stats", ()),
        ("from bvpo_stats import PreferencePair, UserError, read_records", ()),
        ("from bvpo_stats.cli import main", ("typer", "rich")),
    ],
)
def test_nothing_heavy_before_it_is_needed(statement: str, allowed: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(HEAVY) & set(loaded) - set(allowed)
