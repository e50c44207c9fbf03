"""Pairs of preference data: answers kept, traces drawn behind them, a bank that alpha-star takes, resume, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bvpo_stats.embedded.assets import embedded_prompts
from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import join
from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.policy import PolicyOptions, load_policy
from bvpo_stats.model.scores import completion_logprobs
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.pairs.config import PairsConfig, PreferenceOptions
from bvpo_stats.studies.pairs.run import run_pairs
from tests.cli.running import failed_politely, run

POLICY = load_policy("embedded", device="cpu")


def rows(count: int) -> list[dict[str, Any]]:
    """Right and wrong answers to the embedded questions, in UltraFeedback's binarised layout."""
    found = []
    for prompt in embedded_prompts(count):
        gold = int(str(prompt.gold))
        chosen, rejected = f"The answer is {gold}.", f"The answer is {gold + 1}."
        turn = {"role": "user", "content": prompt.prompt}
        messages = [[turn, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
        found.append({"prompt": prompt.prompt, "chosen": messages[0], "rejected": messages[1],
                      "score_chosen": 8.0, "score_rejected": 2.0})  # fmt: skip
    return found


def written(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def config(source: Path, **changes: Any) -> PairsConfig:
    options = PreferenceOptions(str(source), traces_per_answer=2, mh_moves=1, burn_in=1, max_new_tokens=64)
    return PairsConfig(policy=PolicyOptions(device="cpu"), preferences=replace(options, **changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    content = rows(4)
    content[1]["rejected"] = [content[1]["chosen"][0], {"role": "assistant", "content": ""}]
    content[2]["score_chosen"] = 2.0
    run_pairs(config(written(folder / "data.jsonl", content)), folder / "out")
    return folder


def test_answers_are_kept_and_traces_of_the_model_stand_before_them(made: Path) -> None:
    d_t = list(read_records(made / "out", PreferencePair, mode="thinking"))
    d_e = list(read_records(made / "out", PreferencePair, mode="nothinking"))
    bank = list(read_records(made / "out", TraceRecord))
    assert len(d_t) == len(d_e) == 3  # one answer is empty
    assert {p.chosen_answer for p in d_t} == {p.chosen_answer for p in d_e}
    assert all(p.model is None and p.temperature is None and p.template == "embedded" for p in d_t)
    for pair in d_t:
        assert pair.chosen_answer_start
        assert pair.chosen_answer_start > 1
        assert POLICY.template.trace_length(pair.chosen_ids) == pair.chosen_answer_start
    kinds = [(t.source, t.index) for t in bank if t.prompt_id == d_t[0].prompt_id and t.side == "chosen"]
    assert kinds == [("anchor", 0), ("mh", 1), ("prior", 0), ("prior", 1)]
    logp = completion_logprobs(POLICY, [TokenSequence(bank[0].prompt_ids, bank[0].completion_ids)], [""])[0]
    assert bank[0].joint_logp == pytest.approx(float(logp.sum()), abs=1e-4)
    examples = join([*d_t, *d_e], bank).examples  # refuses a bank that is not of these pairs
    assert len(examples) == 3
    assert "is not recorded" in str(examples[0].not_plain)  # so that mu = E g_t is not taken


def test_the_report_says_what_became_of_the_rows_and_what_changes(made: Path) -> None:
    report = json.loads((made / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["preferences"]["layouts"] == {"chosen and rejected": 4}
    assert (report["preferences"]["given"], report["preferences"]["drawn"]) == (0, 3)
    assert sum(report["set_aside"].values()) == 1
    (aside,) = map(json.loads, (made / "out" / "set_aside.jsonl").read_text(encoding="utf-8").splitlines())
    assert "data.jsonl:2" in aside["place"]
    assert "is empty" in aside["reason"]
    text = (made / "out" / "report.md").read_text(encoding="utf-8")
    assert "not draws of this model" in text.replace("\\", "")


def test_a_run_goes_on_and_gives_the_same(made: Path, tmp_path: Path) -> None:
    before = (made / "out" / "thinking.jsonl").read_bytes()
    run_pairs(config(made / "data.jsonl"), made / "out")
    assert (made / "out" / "thinking.jsonl").read_bytes() == before


def test_traces_that_come_with_the_data_are_kept(tmp_path: Path) -> None:
    content = rows(2)
    for row in content:
        for side in ("chosen", "rejected"):
            row[side][1]["content"] = f"<think>1+1=2</think>{row[side][1]['content']}"
    content.append(rows(3)[2])
    content[2]["chosen"][1]["content"] = "<think>1</think>1"  # the other side has none
    report = run_pairs(config(written(tmp_path / "d.jsonl", content)), tmp_path / "o")
    assert report.preferences is not None
    assert (report.preferences.given, report.preferences.drawn) == (2, 0)
    assert not (tmp_path / "o" / "traces.jsonl").exists()
    (pair, _) = read_records(tmp_path / "o", PreferencePair, mode="thinking")
    assert pair.chosen.startswith("1+1=2</think>The answer is")
    (empty, _) = read_records(tmp_path / "o", PreferencePair, mode="nothinking")
    assert empty.chosen_answer == pair.chosen_answer
    assert report.set_aside == {"one of the two answers has a trace, the other none.": 1}
    assert any("no draws of this model" in line for line in report.present().cautions)


def test_refusals(tmp_path: Path) -> None:
    words = ("pairs", "--output", tmp_path / "o", "--from-preferences")
    failed_politely(run(*words, tmp_path / "none.jsonl"), "none.jsonl")
    unknown = written(tmp_path / "u.jsonl", [{"text": "a", "label": 1}])
    failed_politely(run(*words, unknown), "u.jsonl:1", "columns: text, label", "UltraFeedback")
    failed_politely(run(*words, unknown, "--reward", "embedded"), "leave out --samples and --reward")
    failed_politely(run("pairs", "--samples", "s", "--reward", "embedded", "--burn-in", 3), "--from-preferences")
    empty = written(tmp_path / "e.jsonl", [{"prompt": "What is 1+1?", "chosen": "", "rejected": "2"}])
    with pytest.raises(UserError, match="No row gives a pair"):
        run_pairs(config(empty), tmp_path / "o")
