"""The configurations in examples/configs: each is the command's that it names, and every option in it is taken."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from bvpo_stats.cli.build import Command
from bvpo_stats.cli.main import _command

from bvpo_stats.errors import UserError
from tests.cli.running import run
from tests.cli.test_nonsense import COMMANDS

FILES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))
PLACES = {command: place for command, (_, place, _) in COMMANDS.items()} | {"doctor": "studies.doctor:diagnose"}


def command_of(file: Path) -> str:
    """The command that the first line of a file gives it to."""
    words = file.read_text(encoding="utf-8").splitlines()[0].split()
    assert words[:2] == ["#", "bvpo-stats"], file
    assert words[-1] == f"examples/configs/{file.name}"
    return words[2]


def test_every_command_with_a_configuration_has_an_example() -> None:
    commands: dict[str, Any] = _command(None).commands
    wanted = {
        name
        for name, command in commands.items()
        if isinstance(command, Command) and any(p.name == "config" for p in command.params)
    }
    assert {command_of(file) for file in FILES} == wanted


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_reaches_the_run_with_its_values(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = command_of(file)
    module, _, name = PLACES[command].partition(":")
    seen: list[Any] = []

    def reached(config: Any, *_: Any) -> None:
        seen.append(config)
        raise UserError("reached")

    monkeypatch.setattr(importlib.import_module(f"bvpo_stats.{module}"), name, reached)
    result = run(command, "--config", file)
    assert result.stderr == "Error: reached\n"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "model" in values:
        assert seen[0].policy.model == values["model"]
