"""Numbers that no run can have are refused in one line that names the option, before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.cli.running import failed_politely, run

HUGE = 99_999_999_999_999_999_999


@pytest.mark.parametrize(
    "line",
    [
        "train --max-steps 0",
        "train --max-steps -7",
        "train --lora-alpha 0",
        "train --lora-r -1",
        "train --save-steps 0",
        "train --logging-steps 0",
        f"train --warmup {math.nan}",
        "train --warmup -1",
        f"train --learning-rate {math.inf}",
        "train --beta 0",
        "train --epochs 0",
        "train --batch-size -1",
        "train --eta-l -1",
        "train --alpha-ema 1",
        "train --alpha-prior 2",
        f"train --seed {HUGE}",
        "alpha-star --groups 1",
        f"alpha-star --batch-size {math.nan}",
        f"alpha-star --gamma {math.nan}",
        "alpha-star --max-tokens 0",
        "oracle-training --level 1.5",
        f"oracle-training --eta-l {math.nan}",
        "sample --seed -1",
        f"sample --samples {HUGE}",
        "variance --ddof 2",
        f"variance --level {math.nan}",
        "evaluate --top-p 0",
        "evaluate --limit -1",
        "theorems --beta 0",
        "demo --seed -1",
        "tiny train --seed -1",
        "tiny evaluate --seed -1",
    ],
)
def test_nonsense_is_refused(line: str, tmp_path: Path) -> None:
    option, value = line.split()[-2:]
    failed_politely(run(*line.split(), "--output", tmp_path / "run"), f"{option} {value}")


def test_a_schedule_does_not_begin_before_the_first_step(tmp_path: Path) -> None:
    failed_politely(run("train", "--alpha", "-5:0.2", "--output", tmp_path / "run"), "steps rising from 0")
