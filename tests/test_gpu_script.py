"""`make gpu` in miniature on the CPU, so that it cannot rot; and what it says where something is wrong."""

import json
from typing import Any

import pytest
import torch

from benchmarks import gpu
from bvpo_stats.model import capture


def test_every_row_in_miniature(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--small", "--json", str(tmp_path / "rows.json")]) == 0, capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    checked = [name for name, row in rows.items() if row["passed"]]
    assert len(checked) == 4
    assert {"moments' share of an alpha-star step", "generation, 16 at a time", "most memory of either"} <= set(rows)
    printed = capsys.readouterr().out
    assert "(no GPU)" in printed or torch.cuda.is_available()
    assert "| capture against autograd, bfloat16 |" in printed


def test_a_check_that_fails_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    product = capture.per_sequence_product
    monkeypatch.setattr(capture, "per_sequence_product", lambda left, right: 2 * product(left, right))
    monkeypatch.setattr(gpu, "PARTS", (gpu.capture,))
    assert gpu.main(["--small"]) == 1
    assert "ScoreMismatchError" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert gpu.main([]) == 1
        assert "No GPU is here: nothing was run" in capsys.readouterr().out


def test_a_missing_library_skips_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    (row,) = gpu.trainer(gpu.Setting(torch.device("cpu"), gpu.SHAPES["1.5B"], 64, small=False))
    assert (row.value, row.passed) == ("skipped: no trl, datasets here", None)
