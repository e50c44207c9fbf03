import json

import pytest
from bvpo_stats.cli.tiny import app
from safetensors.torch import load_file
from typer.testing import CliRunner

from bvpo_stats.errors import UserError


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_train_and_evaluate_from_the_command_line(tmp_path):
    folder, report = tmp_path / "model", tmp_path / "measures.json"
    result = run("train", "--output", folder, "--seed", 4, "--steps", 1)
    assert result.exit_code == 0
    assert str(folder) in result.output
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied to the embeddings
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["seed"] == 4
    # An untrained model never closes its traces by design: it measures as hopeless, but it measures.
    result = run("evaluate", "--model", folder, "--limit", 2, "--samples", 2, "--output", report)
    assert result.exit_code == 0
    assert "| Thinking accuracy | 0.0%" in result.output
    assert json.loads(report.read_text())["n_prompts"] == 2
    with pytest.raises(UserError, match="nothing was overwritten"):
        run("evaluate", "--model", folder, "--output", report)
    with pytest.raises(UserError, match="not empty"):
        run("train", "--output", folder)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"bvpo-stats tiny {command}" in result.output
