"""Math evaluations: every scoring rule by hand, avg@k by hand, and whole runs from responses on file."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bvpo_stats.errors import UserError
from bvpo_stats.records import Completion, Mode, to_dict
from bvpo_stats.sampling.rewards import verifiers
from bvpo_stats.studies.evaluate.math import verdict_rows
from bvpo_stats.studies.evaluate.report import EvaluationReport
from bvpo_stats.studies.evaluate.run import EvaluateConfig, evaluate
from tests.sampling.samples import sample, truncated, unclosed


def response(answer: str, gold: str) -> tuple[Completion, str]:
    """A finished response with this text after its trace; the trace says something else."""
    return replace(sample("p", 0, "x"), answer=answer, trace=r"maybe \boxed{99}"), gold


def verdict(answer: str, gold: str, verifier: str = "math-verify") -> str:
    completion, gold = response(answer, gold)
    (row,) = verdict_rows([completion], {"p": gold}, verifier)
    return str(row["verdict"])


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        (r"So the answer is \boxed{17}.", "17", "correct"),
        (r"So the answer is $\boxed{18}$.", "17", "wrong"),
        (r"\boxed{\boxed{17}}", "17", "correct"),
        ("The final answer is 17.", "17", "correct"),
        (r"\boxed{0.5}", r"\frac{1}{2}", "correct"),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", "correct"),
        (r"\boxed{\dfrac{1}{3}}", "1/3", "correct"),
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}", "wrong"),
        (r"\boxed{5 \text{ cm}}", "5", "correct"),
        (r"\boxed{33^\circ}", "33", "correct"),
        (r"\boxed{50\%}", "50", "correct"),
        (r"\boxed{\$12}", "12", "correct"),
        (r"\boxed{12\text{ cm}}", r"13\text{ cm}", "wrong"),
        (r"\boxed{142}", "142.0", "correct"),  # AMC's golds are floats
        (r"\boxed{1,234}", "1234", "correct"),
        (r"\boxed{(2, 1)}", "(1, 2)", "wrong"),
        (r"\boxed{2, 1}", "1, 2", "correct"),  # OlympiadBench's lists of answers, in any order
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", "correct"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", "correct"),
        (r"\boxed{16} or rather \boxed{17}", "17", "wrong"),  # two answers are a set of two
        ("I do not know.", "17", "wrong"),
        ("", "17", "empty"),
    ],
)
def test_math_rules(answer: str, gold: str, expected: str) -> None:
    assert verdict(answer, gold) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("The answer is 17.", "correct"), ("17", "correct"), ("It is 18.", "wrong"), ("no idea", "wrong"), ("", "empty")],
)
def test_embedded_rules(answer: str, expected: str) -> None:
    assert verdict(answer, "17", "embedded") == expected


@pytest.mark.parametrize("verifier", ["embedded", "math-verify"])
def test_without_an_answer_nothing_is_correct(verifier: str) -> None:
    """The trace holds the right number in all of these, and the cut ones hold it as an answer, too."""
    cut = replace(sample("p", 0, "17"), finish_reason="length")
    cut_without_trace = replace(sample("p", 0, "17", mode="nothinking"), finish_reason="length")
    inside = replace(truncated("p", 0), trace=r"\boxed{17} 17")
    never = replace(unclosed("p", 0), trace=r"\boxed{17} 17")
    rows = verdict_rows([cut, cut_without_trace, inside, never], {"p": "17"}, verifier)
    assert [row["verdict"] for row in rows] == ["truncated", "truncated", "truncated", "unclosed"]
    assert [row.get("reward") for row in rows] == ([0.0] * 4 if verifier == "embedded" else [None] * 4)


def test_a_comparison_that_takes_too_long_is_wrong_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "_SECONDS", 1)
    started = time.monotonic()
    assert verdict(r"\boxed{9^{9^{9^{9^9}}}}", "17") == "timeout"
    assert verdict(r"\boxed{17}", "17") == "correct"  # the limit is over afterwards
    assert time.monotonic() - started < 20


def test_a_gold_answer_that_cannot_be_read() -> None:
    assert verdict(r"\boxed{17}", r"\boxed{}") == "unreadable gold"


GOLDS = {"p0": "17", "p1": r"\frac{1}{2}", "p2": "3"}


@pytest.fixture
def problems(tmp_path: Path) -> str:
    path = tmp_path / "problems.jsonl"
    rows = [{"id": name, "problem": f"What is {name}?", "answer": gold} for name, gold in GOLDS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_responses(
    path: Path, answers: dict[str, list[str | None]], mode: Mode = "thinking", model: str = "embedded@test"
) -> Path:
    """Responses to each problem; None is one that was cut."""
    rows = [
        to_dict(
            replace(truncated(name, index, mode), model=model)
            if answer is None
            else replace(sample(name, index, "1", mode=mode), answer=answer, gold=None, model=model)
        )
        for name, texts in answers.items()
        for index, answer in enumerate(texts)
    ]
    with path.open("a") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def settings(problems: str, *files: Path, **changes: Any) -> EvaluateConfig:
    given: dict[str, Any] = {"policy": None, "engine": "file", "samples_from": files, "data": (problems,)}
    return EvaluateConfig(**(given | {"modes": ("thinking",)} | changes))


def run(config: EvaluateConfig, output: Path) -> EvaluationReport:
    report = evaluate(config, output)
    assert report is not None
    return report


def test_avg_at_k_and_the_paired_difference_by_hand(problems: str, tmp_path: Path) -> None:
    base = write_responses(
        tmp_path / "base.jsonl",
        {"p0": ["17", "18", None, "17"], "p1": ["0.5", "0.5", r"\boxed{\frac{2}{4}}", "1"], "p2": ["4", "4", "", "3"]},
    )
    tuned = write_responses(
        tmp_path / "tuned.jsonl",
        {"p0": ["17", "17", "17", "17"], "p1": ["0.5", "0.5", "0.5", "1"], "p2": ["3", "4", "3", None]},
    )
    report = run(settings(problems, base, tuned), tmp_path / "run")
    old, new = np.array([2 / 4, 3 / 4, 1 / 4]), np.array([4 / 4, 3 / 4, 2 / 4])
    column = report.columns[0]
    assert (column.name, column.metric) == ("problems", "avg@4")
    assert report.scores["base"]["thinking"]["problems"].value == pytest.approx(old.mean())
    assert report.scores["tuned"]["thinking"]["problems"].value == pytest.approx(new.mean())
    found = report.differences["tuned"]["thinking"]["problems"]
    low, high = stats.t.interval(0.95, 2, loc=(new - old).mean(), scale=stats.sem(new - old))
    assert found.value == pytest.approx((new - old).mean())
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    counts = report.counts["base"]["thinking"]["problems"]
    assert (counts.responses, counts.truncated, counts.empty, counts.solved) == (12, 1, 1, 3)
    table = report.present().tables[0]
    assert [row[0] for row in table.rows] == ["base (embedded)", "tuned", "tuned - base"]
    assert table.rows[2][1].startswith("+25.0 (")
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert saved["differences"]["tuned"]["thinking"]["problems"]["value"] == pytest.approx(0.25)
    assert (tmp_path / "run" / "figures" / "differences.png").stat().st_size > 10_000
    assert "tuned - base" in (tmp_path / "run" / "report.md").read_text()
    assert "<td>tuned - base</td>" in report._repr_html_()


def test_one_response_each_is_pass_at_1_and_both_modes_count_apart(problems: str, tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    write_responses(path, {"p0": ["17"], "p1": ["0.5"], "p2": ["4"]})
    write_responses(path, {"p0": ["16"], "p1": ["2"], "p2": ["3"]}, mode="nothinking")
    report = run(settings(problems, path, modes=("thinking", "nothinking")), tmp_path / "run")
    assert report.columns[0].metric == "pass@1"
    scores = report.scores["base"]
    assert scores["thinking"]["problems"].value == pytest.approx(2 / 3)
    assert scores["nothinking"]["problems"].value == pytest.approx(1 / 3)


def test_several_benchmarks_are_averaged(problems: str, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "q0", "problem": "a?", "answer": 1}\n{"id": "q1", "problem": "b?", "answer": 2}\n')
    base = write_responses(tmp_path / "base.jsonl", {"p0": ["17"], "p1": ["1"], "p2": ["1"], "q0": ["1"], "q1": ["2"]})
    report = run(settings(problems, base, data=(problems, str(other))), tmp_path / "run")
    assert [column.name for column in report.columns] == ["problems", "other", "average"]
    assert report.scores["base"]["thinking"]["average"].value == pytest.approx((1 / 3 + 1) / 2)
    assert report.columns[2].title == "Avg."


def test_missing_responses_are_reported_and_count_neither_way(problems: str, tmp_path: Path) -> None:
    base = write_responses(tmp_path / "base.jsonl", {"p0": ["17", "17"], "p1": ["1"]})
    report = run(settings(problems, base), tmp_path / "run")
    assert report.scores["base"]["thinking"]["problems"].value == pytest.approx(0.5)
    assert report.counts["base"]["thinking"]["problems"].missing == 3
    assert any("3 responses of base, Thinking are missing" in line for line in report.present().lines())


def test_many_cut_responses_are_warned_of(problems: str, tmp_path: Path) -> None:
    base = write_responses(tmp_path / "base.jsonl", {"p0": ["17", None], "p1": [None, None], "p2": ["3", "3"]})
    report = run(settings(problems, base), tmp_path / "run")
    assert report.scores["base"]["thinking"]["problems"].value == pytest.approx(0.5)
    cautions = " ".join(report.present().cautions)
    assert "50.0% of the responses of base" in cautions
    assert "were cut at the token limit and count as wrong" in cautions
    assert "Sample again with a larger limit on new tokens." in cautions  # they come from a file
    drawn = replace(report, sampling={"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 0})
    assert "Raise `max_new_tokens`." in " ".join(drawn.present().cautions)


def test_the_papers_rows_stand_beside_its_models(problems: str, tmp_path: Path) -> None:
    answers: dict[str, list[str | None]] = {"p0": ["17"], "p1": ["1"], "p2": ["3"]}
    base = write_responses(tmp_path / "base.jsonl", answers, model="DeepSeek-R1-Distill-Qwen-1.5B@0123456789ab")
    preset = tmp_path / "math-500.jsonl"
    preset.write_text(Path(problems).read_text())
    report = run(settings(str(preset), base), tmp_path / "run")
    table = report.present().tables[0]
    rows = {row[0]: row[1] for row in table.rows}
    assert rows["R1-Qwen-1.5B (paper)"] == "81.8"
    assert rows["R1-Qwen-1.5B BVPO (paper)"] == "83.0"
    assert any("does not say in which mode" in line for line in report.present().lines())


def test_answers_to_other_problems(problems: str, tmp_path: Path) -> None:
    base = write_responses(tmp_path / "base.jsonl", {"z": ["17"]})
    with pytest.raises(UserError, match=r"base\.jsonl: no answers to the problems of problems.*e\.g\. p0"):
        evaluate(settings(problems, base), tmp_path / "run")
    with pytest.raises(UserError, match="no responses in mode nothinking"):
        evaluate(settings(problems, base, modes=("nothinking",)), tmp_path / "other")


def test_golds_that_cannot_be_read_are_set_aside_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    empty = '{"id": "p1", "problem": "b?", "answer": "\\\\boxed{}"}\n'
    path.write_text('{"id": "p0", "problem": "a?", "answer": "17"}\n' + empty)
    base = write_responses(tmp_path / "base.jsonl", {"p0": ["17"], "p1": ["1"]})
    report = run(settings(str(path), base), tmp_path / "run")
    assert report.benchmarks[0].unreadable_gold == ("p1",)
    assert report.scores["base"]["thinking"]["odd"].value == 1.0  # of the one problem that can be checked
    assert any("cannot read the gold answer of 1 problems" in line for line in report.present().lines())
    path.write_text(empty)
    with pytest.raises(UserError, match="can read none of the gold answers"):
        evaluate(settings(str(path), base), tmp_path / "none")
