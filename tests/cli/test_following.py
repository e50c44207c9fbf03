"""The last line of a command: what to go on with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from bvpo_stats.cli.following import next_command

from tests.golden.cases import Runs

NEXT = {
    "sample": "bvpo-stats pairs --samples runs/it --reward embedded",
    "pairs": "bvpo-stats alpha-star --pairs runs/it",
    "traces": "bvpo-stats alpha-star --adapter ADAPTER --pairs PAIRS --traces runs/it",
    "variance": "bvpo-stats alpha-star",
    "alpha-star": "bvpo-stats train --alpha adaptive",
    "train": "bvpo-stats evaluate --adapter runs/it/model",
    "evaluate": "bvpo-stats report runs",
    "theorems": None,
}


@pytest.mark.parametrize("study", NEXT)
def test_the_command_that_goes_on(study: str) -> None:
    embedded, other = (SimpleNamespace(study=study, model=m, shard="1/1") for m in ("embedded@2168", "Qwen3-4B@0f3a"))
    assert next_command(embedded, Path("runs/it")) == NEXT[study]
    if study not in ("evaluate", "theorems"):
        assert str(next_command(other, Path("runs/it"))).endswith(" --model MODEL")


def test_a_shard_is_not_the_whole() -> None:
    assert next_command(SimpleNamespace(study="sample", model="embedded@1", shard="1/2"), Path("x")) is None


def test_it_is_the_last_line(golden: Runs) -> None:
    folder = golden.output("sample")
    last = golden.printed("sample").rstrip().splitlines()[-1]
    assert last == f"Next: bvpo-stats pairs --samples {folder} --reward embedded"
