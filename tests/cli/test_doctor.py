"""``bvpo-stats doctor``: what is found, what is refused, and the estimate against the formulas."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import AutoConfig

from bvpo_stats import __version__
from bvpo_stats.embedded.assets import embedded_model_path
from bvpo_stats.model.needs import ModelShape
from bvpo_stats.studies import doctor
from tests.cli.running import run


def test_as_json_and_as_lines(tmp_path: Path) -> None:
    words = ("doctor", "--prompts", 100, "--output", tmp_path / "runs")
    result = run(*words, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["versions"]["bvpo-stats"] == __version__
    assert found["versions"]["torch"] == version("torch")
    assert found["refused"] == found["outdated"] == []
    assert found["disk"][str(tmp_path / "runs")] > 0
    model, estimate = found["model"], found["estimate"]
    assert (model["parameters"], model["words"], model["positions"]) == (729_344, 305, 512)
    assert model["thinking"].endswith("<think>")
    assert model["nothinking"].endswith("<think></think>")
    shape = ModelShape.of(AutoConfig.from_pretrained(embedded_model_path()))
    assert shape is not None
    assert estimate["tokens"] == 5 * 128
    speed = 0.4 * found["machine"]["operations"]
    seconds = shape.operations(100 * 640, trained=False) / speed
    assert estimate["alpha_star"]["seconds"] == pytest.approx(seconds)
    assert estimate["alpha_star"]["disk"] == shape.closed(shape.moving(16))
    assert estimate["train_all"]["seconds"] > estimate["train_lora"]["seconds"] > seconds
    lines = run(*words).stdout.splitlines()
    assert lines[-1] == "Nothing stands in the way."
    assert any(line.startswith("prompt template embedded, empty trace") for line in lines)


def test_what_is_missing_or_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2.6", "peft>=99", "no-such-package", "numpy<1; python_version < '3'", "x>=1; extra == 'math'"]
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    versions, outdated, extras = doctor.packages()
    assert outdated == (f"peft>=99 (has {version('peft')}) is needed", "no-such-package is needed")
    assert versions["no-such-package"] == "missing"
    assert "numpy" not in versions  # not on this Python
    assert extras == {"math": ("x>=1",)}


def model_folder(tmp_path: Path, **changes: object) -> Path:
    """The embedded model's tokenizer beside another configuration, and no weights."""
    folder = tmp_path / "model"
    shutil.copytree(embedded_model_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def refusals(*words: object) -> list[str]:
    """What stands in the way, from the JSON; the exit code says so, too."""
    result = run("doctor", "--json", *words)
    assert result.returncode == 2, result.stdout
    assert result.stderr == ""
    found: list[str] = json.loads(result.stdout)["refused"]
    return found


def test_no_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert "no such folder" in refusals("--model", tmp_path / "none")[0]
    folder = model_folder(tmp_path)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "chat template" in refusals("--model", folder)[0]


def test_a_mixture_of_experts_is_refused_by_name_without_its_weights(tmp_path: Path) -> None:
    changes = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    folder = model_folder(tmp_path, **changes, num_experts_per_tok=2)
    (reason,) = refusals("--model", folder)
    assert "is not supported; only LoRA on Linear layers is" in reason


def test_a_large_model_is_judged_without_its_weights_and_does_not_fit(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 8, "num_attention_heads": 64}
    folder = model_folder(tmp_path, **sizes, num_key_value_heads=8, head_dim=128, layer_types=["full_attention"] * 8)
    found = run("doctor", "--model", folder, "--max-tokens", 10**7)
    assert found.returncode == 2
    assert "REFUSED `bvpo-stats alpha-star` would need" in found.stdout
    assert "lower --max-tokens" in found.stdout
    assert "does NOT fit" in found.stdout
