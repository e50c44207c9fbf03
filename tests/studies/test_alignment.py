"""benchmarks/alignment.py without its training: the rule that chooses settings, the intervals, the tables."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def alignment() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # it imports its neighbour
    try:
        spec = importlib.util.spec_from_file_location("alignment", BENCHMARKS / "alignment.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def answers(rng: np.random.Generator, prompts: int, *, liked: float, correct: float) -> dict[str, Any]:
    """Answers of which a share is worded as the judge likes, and a share right."""
    shape = (prompts, 2)
    one = {
        "reward": np.where(rng.random(shape) < liked, 1.0, 0.0).tolist(),
        "correct": (rng.random(shape) < correct).astype(float).tolist(),
        "tokens": np.full(shape, 9.0).tolist(),
    }
    return {"thinking": one, "nothinking": one}


def test_prompts_are_fresh_and_different(alignment: ModuleType, tmp_path: Path) -> None:
    place = alignment.place_of(tmp_path, 1.0)
    asked = {part: {p.prompt for p in place.prompts(part)} for part in ("train", "validation", "test")}
    assert [len(texts) for texts in asked.values()] == [2000, 300, 400]
    assert not asked["train"] & asked["validation"]
    assert not (asked["train"] | asked["validation"]) & asked["test"]


def test_every_method_has_the_same_search(alignment: ModuleType) -> None:
    cells = [alignment.searched(method) for method in alignment.METHODS]
    assert {len(each) for each in cells} == {6}
    names = [cell.name for each in cells for cell in each]
    assert len(set(names)) == len(names)


def test_the_rule_takes_the_highest_win_rate_that_keeps_accuracy(alignment: ModuleType) -> None:
    rng = np.random.default_rng(0)
    base = answers(rng, 4000, liked=0.3, correct=0.8)
    cells = alignment.searched(alignment.METHODS[1])[:3]
    shifts = {cells[0].name: (0.5, 0.8), cells[1].name: (0.7, 0.8), cells[2].name: (0.9, 0.6)}
    found = {name: answers(rng, 4000, liked=liked, correct=correct) for name, (liked, correct) in shifts.items()}
    assert alignment.chosen(cells, found, base) == cells[1]  # the third wins more, and unlearns arithmetic
    worse = {name: answers(rng, 4000, liked=0.9, correct=c) for name, c in zip(found, (0.6, 0.7, 0.5), strict=True)}
    assert alignment.chosen(cells, worse, base) == cells[1]  # all of them do: the one that loses least


def test_win_rate_counts_ties_as_half(alignment: ModuleType) -> None:
    base = {"thinking": {"reward": [[0.0, 1.0], [1.0, 1.0]], "correct": [[1, 1], [0, 1]], "tokens": [[3, 5], [2, 2]]}}
    ours = {"thinking": base["thinking"] | {"reward": [[1.0, 1.0], [0.0, 1.0]]}}
    found = alignment.measures(ours, base, "thinking")
    np.testing.assert_allclose(found["win"], [0.75, 0.25])
    np.testing.assert_allclose(found["tokens"], [4, 2])
    np.testing.assert_allclose(alignment.measures(base, base, "thinking")["win"], 0.5)


def test_intervals_over_seeds_and_prompts_cover(alignment: ModuleType) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        values = rng.normal(size=(5, 1)) * 0.05 + rng.normal(size=(1, 100)) * 0.5 + rng.normal(size=(5, 100)) * 0.5
        found = alignment.over_both(values)
        hits += found["low"] <= 0 <= found["high"]
    assert 0.93 <= hits / 400 <= 1.0  # it errs on the wide side
    flat = alignment.over_both(np.ones((5, 10)))
    assert flat == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_tables_and_verdict(alignment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole study on made-up answers: DPO on D_t learns wording, BVPO more of it."""
    liked = {"SimPO": 0.4, "DPO on D_t": 0.5, "DPO on D_e": 0.5, "BVPO, alpha = 0.5": 0.7, "BVPO, adaptive": 0.5}
    place = alignment.place_of(tmp_path, 0.8)

    def run(self: Any, cell: Any) -> dict[str, Any]:
        rng = np.random.default_rng(list(cell.name.encode()))
        share = 0.3 if cell.method is None else liked[cell.method.name]
        course = [{"step": s, "alpha/h_sq": 0.1, "alpha/P1": 1.0} for s in range(1, 5)]
        alpha = [{"alpha": 0.5 + 0.1 * s} for s in range(4)]
        made = answers(rng, 400, liked=share, correct=0.8)
        return made | ({} if cell.method is None else {"history": course, "alpha": alpha, "steps": 4})

    monkeypatch.setattr(alignment.Workplace, "run", run)
    monkeypatch.setattr(alignment.Workplace, "make_pairs", lambda self: None)
    monkeypatch.setattr(alignment, "in_a_process", lambda place, cell: place.run(cell))
    place.pairs.mkdir(parents=True)
    (place.pairs / "thinking.jsonl").write_text("{}\n" * 7)
    part = alignment.study(place, 1)
    assert json.loads(json.dumps(part)) == part
    assert "BVPO, alpha = 0.5 beats DPO on D_t Thinking" in alignment.verdict(part)
    assert "BVPO, adaptive is not told apart from DPO on D_t" in alignment.verdict(part)
    text = alignment.markdown({"machine": {"cores": 2}, "temperatures": [part]})
    assert "## Pairs sampled at temperature 0.8 (7 in D_t)" in text
    assert text.count("| BVPO, adaptive |") == 3  # both tables and the settings
    assert "| untrained | 50.0 | 50.0 |" in text
    assert alignment.alignment_figure({"temperatures": [part]}, tmp_path).stat().st_size > 10_000
