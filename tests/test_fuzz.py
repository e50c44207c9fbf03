"""Some hundred attempts of `tests.fuzz`: no input ends in another number, a traceback or silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz import fuzz


@pytest.mark.slow
def test_whatever_comes_is_right_refused_or_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``BVPO_FUZZ_SEED`` and ``BVPO_FUZZ_N`` choose other attempts; the log has the seed and the counts by outcome."""
    seed, n = (int(os.environ.get(name, default)) for name, default in (("BVPO_FUZZ_SEED", 13), ("BVPO_FUZZ_N", 320)))
    tally = fuzz(seed, n, tmp_path)
    with capsys.disabled():
        print(f"\nfuzz, seed {seed}: {tally}")
    assert not tally.faults, "\n".join(tally.faults)
    outcomes = {outcome for _, outcome in tally.counts}
    assert outcomes == {"right", "refused", "repaired"}
