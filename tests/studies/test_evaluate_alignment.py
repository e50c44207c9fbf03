"""Alignment tasks: traces never reach a judge, lost answers stay in the files, win rates by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.records import Completion, to_dict
from bvpo_stats.statistics.proportions import difference_interval, length_controlled_rate, proportion_interval
from bvpo_stats.studies.evaluate.report import EvaluationReport
from bvpo_stats.studies.evaluate.run import EvaluateConfig, evaluate
from tests.sampling.samples import sample, truncated, unclosed

NAMES = [f"p{n}" for n in range(8)]
MODEL = "DeepSeek-R1-Distill-Qwen-7B@0123456789ab"


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    rows = [{"uid": name, "instruction": f"Tell me {name}.", "dataset": "koala"} for name in NAMES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answered(name: str, text: str) -> Completion:
    return replace(sample(name, 0, "17", model=MODEL), answer=text, trace="SECRET TRACE", text=f"SECRET TRACE{text}")


def write(path: Path, responses: list[Completion]) -> Path:
    path.write_text("".join(json.dumps(to_dict(replace(r, model=MODEL))) + "\n" for r in responses))
    return path


def lost() -> list[Completion]:
    """p0 is cut inside its trace, p1 never closes it, p2 says nothing, p3 is cut inside its answer, others end."""
    return [
        replace(truncated("p0", 0), trace="SECRET TRACE", text="SECRET TRACE"),
        replace(unclosed("p1", 0), trace="SECRET TRACE", text="SECRET TRACE"),
        answered("p2", ""),
        replace(answered("p3", "half an ans"), finish_reason="length"),
        *(answered(name, f"I am {name}") for name in NAMES[4:]),
    ]


def settings(prompts: str, *files: Path, **changes: Any) -> EvaluateConfig:
    given: dict[str, Any] = {
        "policy": None,
        "engine": "file",
        "task": "alpaca-eval",
        "samples_from": files,
        "data": (prompts,),
        "modes": ("thinking",),
    }
    return EvaluateConfig(**(given | changes))


def run(config: EvaluateConfig, output: Path) -> EvaluationReport:
    report = evaluate(config, output)
    assert report is not None
    return report


@pytest.mark.parametrize("task", ["alpaca-eval", "arena-hard"])
def test_answers_stand_alone_and_lost_ones_are_empty(task: str, prompts: str, tmp_path: Path) -> None:
    report = run(settings(prompts, write(tmp_path / "r.jsonl", lost()), task=task), tmp_path / "run")
    path = tmp_path / "run" / report.answer_files["base"]["thinking"]
    text = path.read_text()
    assert "SECRET" not in text
    assert "think>" not in text
    if task == "alpaca-eval":
        rows = json.loads(text)
        outputs = [row["output"] for row in rows]
        assert {row["generator"] for row in rows} == {path.stem} == {"DeepSeek-R1-Distill-Qwen-7B-thinking"}
        assert rows[0]["instruction"] == "Tell me p0."
        assert {row["dataset"] for row in rows} == {"koala"}
    else:
        rows = [json.loads(line) for line in text.splitlines()]
        outputs = [row["messages"][-1]["content"]["answer"] for row in rows]
        assert [row["uid"] for row in rows] == NAMES
        assert {row["model"] for row in rows} == {path.stem}
        assert [row["metadata"]["token_len"] for row in rows[:2]] == [0, 0]
    assert outputs == ["", "", "", "half an ans", *(f"I am {name}" for name in NAMES[4:])]
    counts = report.counts["base"]["thinking"][task]
    assert (counts.responses, counts.truncated, counts.unclosed, counts.empty) == (8, 2, 1, 1)
    shown = report.present()
    assert [table.title for table in shown.tables] == ["Responses; mean length in tokens"]  # nothing was judged
    assert any("empty answer" in note for note in shown.notes)


def judged(prompts: str, tmp_path: Path, **changes: Any) -> EvaluateConfig:
    """Rewards are answer lengths, known by heart below; the baseline says four letters to everything."""
    (tmp_path / "rewards_by_length.py").write_text(
        "def length(prompts, completions, gold):\n    return [None if c == 'SKIP' else len(c) for c in completions]\n"
    )
    baseline = tmp_path / "baseline.json"
    rows = [{"instruction": f"Tell me {name}.", "output": "four", "generator": "gpt4_turbo"} for name in NAMES]
    rows[7]["output"] = ""
    baseline.write_text(json.dumps(rows))
    old = ["", "four", "x", "xx", "longer", "SKIP", "longest", "y"]
    new = ["longer", "four", "longer", "xx", "longer", "longer", "longest", ""]
    files = [
        write(tmp_path / f"{name}.jsonl", [answered(p, text) for p, text in zip(NAMES, texts, strict=True)])
        for name, texts in (("old", old), ("new", new))
    ]
    judge = {"judge": "reward", "reward": "rewards_by_length:length", "baseline": baseline}
    return settings(prompts, *files, **judge, **changes)


def test_win_rates_by_hand(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = run(judged(prompts, tmp_path), tmp_path / "run")
    # no answer loses, equal rewards tie, p5 has no reward for the base, an answer beats none, none against none ties
    old = np.array([0.0, 0.5, 0.0, 0.0, 1.0, np.nan, 1.0, 1.0])
    new = np.array([1.0, 0.5, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5])
    both = np.isfinite(old)
    assert report.scores["base"]["thinking"]["win_rate"] == proportion_interval(old[both])
    assert report.scores["new"]["thinking"]["win_rate"] == proportion_interval(new)
    assert report.differences["new"]["thinking"]["win_rate"] == difference_interval(new[both], old[both])
    lengths = np.array([-4.0, 0.0, -3.0, -2.0, 2.0, 3.0, 1.0])  # "" to "y" against "four" and ""; p5 is left out
    controlled = length_controlled_rate(old[both], np.array([-4.0, 0.0, -3.0, -2.0, 2.0, 3.0, 1.0]))
    assert report.scores["base"]["thinking"]["lc_win_rate"] == controlled
    assert len(lengths) == both.sum()
    assert any("base, thinking: 1 prompts without a reward are left out" in note for note in report.notes)
    assert report.reward is not None
    assert report.reward.startswith("rewards_by_length:length@")
    tables = report.present().tables
    rows = {row[0]: row[1] for row in tables[0].rows}
    assert rows["R1-Qwen-7B (paper)"] == "15.7"
    assert rows["R1-Qwen-7B BVPO (paper)"] == "26.1"
    assert tables[0].head[1] == "Win rate, against gpt4_turbo (%)"
    assert (tmp_path / "run" / "figures" / "differences.png").exists()


def test_rewards_are_kept_for_each_judge(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = judged(prompts, tmp_path)
    first = run(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "judged").rglob("*.jsonl")}
    assert len(before) == 3
    assert run(config, tmp_path / "run").scores == first.scores
    unjudged = run(
        replace(config, judge=None, reward=None, baseline=None), tmp_path / "run"
    )  # another judge, or none, needs no new responses
    assert unjudged.columns == ()
    assert {path: path.read_bytes() for path in before} == before


def test_baselines_and_score_files_that_do_not_fit(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = judged(prompts, tmp_path)
    assert config.baseline is not None
    short = tmp_path / "short.json"
    short.write_text(json.dumps(json.loads(config.baseline.read_text())[:5]))
    with pytest.raises(UserError, match=r"short\.json'` has no answer to 3 of the 8 prompts, e\.g\. p5"):
        evaluate(replace(config, baseline=short), tmp_path / "run")
    with pytest.raises(UserError, match="scores of one model"):
        evaluate(replace(config, reward="file:scores.jsonl"), tmp_path / "run")
    with pytest.raises(UserError, match="unknown"):
        evaluate(replace(config, reward="gpt-4o"), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # all of it is found before anything is read or drawn


def test_scores_from_a_file_name_the_baseline_minus_one(prompts: str, tmp_path: Path) -> None:
    scores = tmp_path / "scores.jsonl"
    ours = [{"prompt_id": name, "mode": "thinking", "sample_index": 0, "reward": n} for n, name in enumerate(NAMES)]
    theirs = [{"prompt_id": name, "mode": "nothinking", "sample_index": -1, "reward": 3.5} for name in NAMES]
    scores.write_text("".join(json.dumps(row) + "\n" for row in [*ours, *theirs]))
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps([{"uid": name, "output": "four"} for name in NAMES]))
    responses = write(tmp_path / "r.jsonl", [answered(name, "x" * (1 + n % 3)) for n, name in enumerate(NAMES)])
    config = settings(prompts, responses, judge="reward", reward=f"file:{scores}", baseline=baseline)
    report = run(config, tmp_path / "run")
    assert report.scores["base"]["thinking"]["win_rate"].value == 0.5  # 4, 5, 6 and 7 beat 3.5
    assert report.columns[0].metric == "against baseline"
