"""Pairs runs from samples to files: content, resume, what is set aside, what is refused."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from bvpo_stats.embedded.task import grade
from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import join
from bvpo_stats.model.policy import PolicyOptions, load_policy
from bvpo_stats.records import MODES, Completion, PreferencePair, Truncation
from bvpo_stats.sampling.pairs import make_pairs
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.pairs.run import PairsConfig, run_pairs
from tests.sampling.samples import both_modes, sample, template, truncated, unclosed, write_samples

WORDINGS = ("{}", "It is {}.", "The answer is {}.")


def synthetic(prompts: int, seed: int = 0) -> list[Completion]:
    rng = random.Random(seed)
    return [
        c
        for p in range(prompts)
        for c in both_modes(f"p{p:04d}", [rng.choice(WORDINGS).format(rng.randint(16, 18)) for _ in range(4)])
    ]


def config(samples: Path, reward: str = "embedded", **changes: object) -> PairsConfig:
    return replace(PairsConfig(samples, reward, PolicyOptions(device="cpu")), **changes)  # type: ignore[arg-type]


def test_counts_of_everything_that_is_set_aside(tmp_path: Path) -> None:
    def thinking(prompt: str, *answers: str) -> list[Completion]:
        return [sample(prompt, index, answer) for index, answer in enumerate(answers)]

    rows = [
        *thinking("pair", "17", "18", "17", "18"),
        *thinking("tie", "It is 16.", "It is 18.", "It is 18."),
        *thinking("identical", "17", "17"),
        *thinking("too few", "17"),
        *[truncated("cut", 0), unclosed("cut", 1), sample("cut", 2, "17"), sample("cut", 3, "The answer is 17.")],
        *[truncated("all cut", 0), truncated("all cut", 1)],
        sample("pair", 0, "17", mode="nothinking"),
    ]
    report = run_pairs(config(write_samples(tmp_path / "s", rows)), tmp_path / "o")
    d_t, d_e = report.modes["thinking"], report.modes["nothinking"]
    assert (d_t.prompts, d_t.responses) == (6, 16)
    assert (d_t.pairs, d_t.ties, d_t.identical, d_t.too_few) == (2, 1, 1, 2)
    assert (d_t.truncated, d_t.unclosed, d_t.unscored) == (3, 1, 0)
    assert (d_t.shared_best, d_t.shared_worst, d_t.other_tokens) == (1, 1, 0)
    gaps = [grade("17", 17) - grade("18", 17), grade("The answer is 17.", 17) - grade("17", 17)]
    assert d_t.mean_gap == pytest.approx(sum(gaps) / 2)
    assert (d_t.min_gap, d_t.max_gap) == pytest.approx((min(gaps), max(gaps)))
    assert (d_e.prompts, d_e.pairs, d_e.too_few, d_e.mean_gap) == (1, 0, 1, None)
    assert report.in_both_modes == 0
    assert report.truncation == {"thinking": Truncation(16, 3, 1), "nothinking": Truncation(1, 0, 0)}
    pairs = list(read_records(tmp_path / "o" / "thinking.jsonl", PreferencePair))
    assert {(p.cut_share, p.unclosed_share, p.top_k) for p in pairs} == {(3 / 16, 1 / 16, 0)}
    cautions = report.present().cautions
    assert any(line.startswith("18.8% of the thinking responses were cut at the token limit") for line in cautions)
    assert any(line.startswith("6.2% of the thinking responses ended by themselves without") for line in cautions)
    assert not any("nothinking responses" in line for line in cautions)
    made = [p for p in make_pairs(rows, "embedded", policy=template()) if p.mode == "thinking"]
    assert {p.prompt_id: p for p in made} == {p.prompt_id: p for p in pairs}  # in memory as on disk
    stored = json.loads((tmp_path / "o" / "report.json").read_text())
    assert stored["modes"]["thinking"]["ties"] == 1
    text = (tmp_path / "o" / "report.md").read_text()
    assert "| prompts set aside: best and worst tie | 1 | 0 |" in text
    assert "No pairs in D_e" in text


def test_requests_that_sampling_set_aside_are_mentioned(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "s", synthetic(3))
    reasons = ["refused", "ids-differ", "refused"]
    rows = "".join(json.dumps({"prompt_id": "p9", "reason": reason}) + "\n" for reason in reasons)
    (samples / "set_aside-00001-of-00002.jsonl").write_text(rows)
    report = run_pairs(config(samples), tmp_path / "o")
    assert report.set_aside == {"refused": 2, "ids-differ": 1}
    assert "set 3 requests aside (1 ids-differ, 2 refused;" in (tmp_path / "o" / "report.md").read_text()


def test_chosen_beats_rejected_by_the_verifier(tmp_path: Path) -> None:
    rows = synthetic(30)
    report = run_pairs(config(write_samples(tmp_path / "s", rows)), tmp_path / "o")
    by_key = {c.key: c for c in rows}
    for mode in ("thinking", "nothinking"):
        pairs = list(read_records(tmp_path / "o" / f"{mode}.jsonl", PreferencePair))
        assert len(pairs) == report.modes[mode].pairs > 15
        for pair in pairs:
            answers = [by_key[f"{pair.prompt_id}/{mode}/{i}"].answer for i in range(4)]
            grades = [grade(str(answer), 17) for answer in answers]
            assert pair.chosen_reward == max(grades) > pair.rejected_reward == min(grades)
            assert (pair.chosen_index, pair.rejected_index) == (grades.index(max(grades)), grades.index(min(grades)))
            assert pair.chosen_answer == answers[pair.chosen_index]


def test_datasets_loads_the_folder_and_its_files(tmp_path: Path) -> None:
    run_pairs(config(write_samples(tmp_path / "s", synthetic(10))), tmp_path / "o")
    cache = str(tmp_path / "cache")
    for mode in ("thinking", "nothinking"):
        records = list(read_records(tmp_path / "o" / f"{mode}.jsonl", PreferencePair))
        for table in (
            datasets.load_dataset(str(tmp_path / "o"), mode, split="train", cache_dir=cache),
            datasets.load_dataset(
                "parquet", data_files=str(tmp_path / "o" / f"{mode}.parquet"), split="train", cache_dir=cache
            ),
            datasets.load_dataset(
                "json", data_files=str(tmp_path / "o" / f"{mode}.jsonl"), split="train", cache_dir=cache
            ),
        ):
            assert table.column_names[:3] == ["prompt", "chosen", "rejected"] or "json" in str(table.builder_name)
            assert {"prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"} <= set(
                table.column_names
            )
            assert [tuple(ids) for ids in table["chosen_ids"]] == [pair.chosen_ids for pair in records]
            assert table["rejected"][:] == [pair.rejected for pair in records]
            assert table["chosen_reward"][:] == [pair.chosen_reward for pair in records]


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_the_order_of_the_samples_does_not_matter(tmp_path: Path) -> None:
    rows = synthetic(12)
    run_pairs(config(write_samples(tmp_path / "s", rows)), tmp_path / "o")
    random.Random(3).shuffle(rows)
    run_pairs(config(write_samples(tmp_path / "t", rows)), tmp_path / "p")
    assert outputs(tmp_path / "o") == outputs(tmp_path / "p")


@pytest.fixture(scope="module")
def embedded() -> str:
    return load_policy(PolicyOptions(device="cpu")).identity


def test_reference_log_probabilities_are_those_of_the_exact_ids(tmp_path: Path, embedded: str) -> None:
    import torch

    rows = [replace(c, model=embedded, engine="transformers") for c in synthetic(5)]
    run_pairs(config(write_samples(tmp_path / "s", rows), ref_logps=True), tmp_path / "o")
    policy = load_policy(PolicyOptions(device="cpu", dtype="float64"))
    pairs = [
        p for mode in ("thinking", "nothinking") for p in read_records(tmp_path / "o" / f"{mode}.jsonl", PreferencePair)
    ]
    assert len(pairs) > 5
    for pair in pairs:
        for ids, stored in ((pair.chosen_ids, pair.ref_chosen_logps), (pair.rejected_ids, pair.ref_rejected_logps)):
            with torch.no_grad():
                logits = policy.model(torch.tensor([pair.prompt_ids + ids])).logits[0, len(pair.prompt_ids) - 1 : -1]
            truth = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
            assert stored == pytest.approx(truth, abs=1e-4)
    wrong = [replace(c, model="other@0", engine="transformers") for c in synthetic(2)]
    with pytest.raises(UserError, match=r"drawn by other@0, but `model` is embedded"):
        run_pairs(config(write_samples(tmp_path / "w", wrong), ref_logps=True), tmp_path / "x")


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path, embedded: str) -> None:
    """What a kill leaves behind: some windows of scores, a half-written line, half of the pairs' temporary files."""
    rows = [replace(c, model=embedded, engine="transformers") for c in synthetic(150)]
    settings = config(write_samples(tmp_path / "s", rows), ref_logps=True)
    run_pairs(settings, tmp_path / "o")
    whole = outputs(tmp_path / "o")
    assert {"scores.jsonl", "ref_logps.jsonl", "thinking.jsonl", "nothinking.jsonl"} == set(whole)
    for scores, logps in ((0, 0), (700, 3), (5000, 900), (len(whole["scores.jsonl"]) - 1, 7000)):
        killed = tmp_path / f"k{scores}"
        killed.mkdir()
        shutil.copy(tmp_path / "o" / "run.json", killed)
        (killed / "scores.jsonl").write_bytes(whole["scores.jsonl"][:scores])
        (killed / "ref_logps.jsonl").write_bytes(whole["ref_logps.jsonl"][:logps])
        (killed / "thinking.jsonl.part").write_bytes(whole["thinking.jsonl"][:333])
        (killed / ".samples.sqlite").write_bytes(b"half an index")
        report = run_pairs(settings, killed)
        assert outputs(killed) == whole
        assert report.modes["thinking"].prompts == 150
    assert not list((tmp_path / "k0").glob("*.part"))
    assert not (tmp_path / "k0" / ".samples.sqlite").exists()


def test_scores_written_by_one_run_serve_another(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "s", synthetic(10))
    run_pairs(config(folder), tmp_path / "o")
    run_pairs(config(folder, f"file:{tmp_path / 'o' / 'scores.jsonl'}"), tmp_path / "p")
    for mode in ("thinking", "nothinking"):
        assert (tmp_path / "o" / f"{mode}.jsonl").read_bytes() == (tmp_path / "p" / f"{mode}.jsonl").read_bytes()
    partial = tmp_path / "some.jsonl"
    partial.write_text("".join((tmp_path / "o" / "scores.jsonl").read_text().splitlines(keepends=True)[:13]))
    report = run_pairs(config(folder, f"file:{partial}"), tmp_path / "q")
    assert sum(summary.unscored for summary in report.modes.values()) == 80 - 13


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": "armorm"}, "unknown"),
        ({"reward": "file:none.jsonl"}, "no such file"),
        ({"samples": Path("none")}, "no such folder"),
    ],
)
def test_bad_settings_leave_no_folder_behind(tmp_path: Path, changes: dict, words: str) -> None:
    settings = replace(config(write_samples(tmp_path / "s", synthetic(2))), **changes)
    with pytest.raises(UserError, match=words):
        run_pairs(settings, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_samples_that_cannot_be_paired(tmp_path: Path) -> None:
    no_gold = write_samples(tmp_path / "g", [replace(c, gold=None) for c in synthetic(2)])
    with pytest.raises(UserError, match="prompt p0000 has none"):
        run_pairs(config(no_gold), tmp_path / "og")
    clash = [*both_modes("p0", ["17", "18"]), sample("p0", 2, "3", question="What is 1+2?")]
    with pytest.raises(UserError, match="prompt id p0 stands for 2 different prompts"):
        run_pairs(config(write_samples(tmp_path / "c", clash)), tmp_path / "oc")
    first, *rest = both_modes("p0", ["17", "18"])
    clash = [replace(first, gold="18"), *rest]
    with pytest.raises(UserError, match="prompt p0 come with 2 different gold answers"):
        run_pairs(config(write_samples(tmp_path / "d", clash)), tmp_path / "od")
    scores = tmp_path / "nan.jsonl"
    scores.write_text('{"prompt_id": "p0000", "mode": "thinking", "sample_index": 0, "reward": Infinity}\n')
    with pytest.raises(UserError, match="the reward of p0000/thinking/0 is inf"):
        run_pairs(config(write_samples(tmp_path / "s", synthetic(2)), f"file:{scores}"), tmp_path / "on")


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "s", synthetic(3))
    run_pairs(config(folder), tmp_path / "o")
    before = outputs(tmp_path / "o")
    write_samples(folder, synthetic(4))
    with pytest.raises(UserError, match=r"different run \(samples"):
        run_pairs(config(folder), tmp_path / "o")
    assert outputs(tmp_path / "o") == before


def test_ties_are_said_by_name_and_before_a_join_fails(tmp_path: Path) -> None:
    """Nearly all prompts tie, and the two sets have no prompt in common."""
    rows = [c for p in range(8) for c in both_modes(f"p{p}", ["17", "17"])]
    rows += [
        sample("t", 0, "17"),
        sample("t", 1, "18"),
        *[sample("e", i, f"{17 + i}", mode="nothinking") for i in (0, 1)],
    ]
    report = run_pairs(config(write_samples(tmp_path / "s", rows)), tmp_path / "o")
    assert report.in_both_modes == 0
    said = (tmp_path / "o" / "report.md").read_text()
    assert "Ties: 8 of 9 prompts of D_t (thinking) give no pair" in said
    assert "Ties: 8 of 9 prompts of D_e (nothinking) give no pair" in said
    assert "0 prompts have a pair in both modes, of 1 and 1" in said
    pairs = [pair for mode in MODES for pair in read_records(tmp_path / "o" / f"{mode}.jsonl", PreferencePair)]
    with pytest.raises(
        UserError, match=r"share no prompts .*1 prompts in D_t and 1 prompts in D_e.* ties have removed"
    ):
        join(pairs)


def test_a_least_gap_is_counted_and_makes_another_run(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "s", synthetic(12))
    every = run_pairs(config(samples), tmp_path / "o")
    report = run_pairs(config(samples, min_gap=0.9), tmp_path / "far")
    for mode, counts in report.modes.items():
        pairs = list(read_records(tmp_path / "far" / f"{mode}.jsonl", PreferencePair))
        assert all((p.chosen_reward or 0) - (p.rejected_reward or 0) > 0.9 - 1e-9 for p in pairs)
        assert len(pairs) == counts.pairs == every.modes[mode].pairs - counts.small_gap
        assert counts.small_gap > 0
        assert counts.prompts == counts.pairs + counts.too_few + counts.identical + counts.ties + counts.small_gap
    assert make_pairs(synthetic(12), "embedded", policy=template(), min_gap=0.9) == [
        pair
        for prompt in sorted({c.prompt_id for c in synthetic(12)})
        for mode in MODES
        for pair in read_records(tmp_path / "far" / f"{mode}.jsonl", PreferencePair)
        if pair.prompt_id == prompt
    ]
    with pytest.raises(UserError, match=r"different run \(min_gap: 0\.9 there, none now\)"):
        run_pairs(config(samples), tmp_path / "far")
    with pytest.raises(UserError, match="`min_gap=-1`"):
        make_pairs(synthetic(2), "embedded", policy=template(), min_gap=-1)
