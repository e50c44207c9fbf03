"""The committed figures are what the committed reports give: nobody has to remember to draw them again."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from bvpo_stats.pages.figures import draw_all
from bvpo_stats.pages.runs import find_runs

FIGURES = Path(__file__).parents[2] / "figures"
RUNS = find_runs(FIGURES)
LARGEST = 150_000  # bytes of one picture


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_pictures_are_those_of_the_report(run, tmp_path: Path) -> None:
    (drawn,) = draw_all([run.folder], tmp_path)
    assert {path.name for path in drawn.figures} == {path.name for path in run.folder.glob("*.png")}
    for path in drawn.figures:
        mine, committed = (matplotlib.image.imread(folder / path.name) for folder in (path.parent, run.folder))
        assert mine.shape == committed.shape, path.name
        assert np.abs(mine - committed).mean() < 1e-3, path.name


def test_pictures_are_small() -> None:
    for path in FIGURES.rglob("*.png"):
        assert path.stat().st_size < LARGEST, path
