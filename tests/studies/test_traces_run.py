"""Traces runs: a bank on disk, resumed after a kill, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.lab.oracle.build import OracleConfig, build_oracle
from bvpo_stats.lab.oracle.draws import completion_records, draw_examples, pair_records
from bvpo_stats.records import TraceRecord, to_dict
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.traces import run as traces
from bvpo_stats.studies.traces.run import TracesConfig, run_traces
from tests.sampling.samples import write_samples

N_PAIRS, K = 9, 3


@dataclass(frozen=True)
class Inputs:
    folder: Path
    config: TracesConfig


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """Samples and pairs of the oracle, whose policy stands in for a loaded one; windows of two pairs."""
    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=3, n_answers=2, n_prompts=2, seed=2))
    monkeypatch.setattr(traces, "load_policy", lambda options: oracle.policy)
    monkeypatch.setattr(traces, "load_template", lambda options: oracle.policy.template)
    monkeypatch.setattr(traces, "WINDOW", 2)
    draws = draw_examples(oracle, N_PAIRS, np.random.default_rng(0))
    completions = completion_records(oracle, draws)
    write_samples(tmp_path / "samples", completions)
    (tmp_path / "pairs").mkdir()
    pairs, empty_pairs = pair_records(oracle, draws)
    for name, rows in (("thinking", pairs), ("nothinking", empty_pairs)):
        (tmp_path / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(to_dict(row)) + "\n" for row in rows))
    settings = TracesConfig(tmp_path / "pairs", tmp_path / "samples", traces_per_answer=K)
    return Inputs(tmp_path, settings)


def test_a_bank_on_disk_and_its_report(inputs: Inputs) -> None:
    report = run_traces(inputs.config, inputs.folder / "o")
    records = list(read_records(inputs.folder / "o" / "traces.jsonl", TraceRecord))
    assert len(records) == N_PAIRS * 2 * 2 * K == sum(report.tally.by_source.values())
    assert len({(r.prompt_id, r.side, r.source, r.index) for r in records}) == len(records)
    assert report.tally.sides == 2 * N_PAIRS
    distinct = {(r.prompt_id, r.side, r.source, r.completion_ids) for r in records}
    for source, count in report.tally.distinct.items():
        assert count == sum(1 for name in distinct if name[2] == source)
    assert report.tally.posterior == len({(*name[:2], name[3]) for name in distinct if name[2] != "prior"})
    assert report.mobility is not None
    stored = json.loads((inputs.folder / "o" / "report.json").read_text())
    assert stored["tally"]["by_source"] == report.tally.by_source
    assert stored["mobility"] == report.mobility == report.tally.moved / report.tally.proposals
    text = (inputs.folder / "o" / "report.md").read_text()
    assert f"| anchor | the pair's own trace | {2 * N_PAIRS} | 1.00 | 1.00 |" in text
    assert "Careful" not in text


def test_a_run_that_was_killed_goes_on_and_ends_the_same(inputs: Inputs) -> None:
    whole = inputs.folder / "whole"
    expected = run_traces(inputs.config, whole)
    content = (whole / "traces.jsonl").read_bytes()
    states = []
    limited = inputs.folder / "states"
    for pairs in (2, 4, 6):  # what progress.jsonl says after each window
        run_traces(replace(inputs.config, limit=pairs), limited / str(pairs))
        states.append((limited / str(pairs) / "progress.jsonl").read_text())
    kills = [(None, 0), (None, 500), (states[0], 0), (states[0], 77), (states[1], 5000), (states[2], 1)]
    for number, (state, extra) in enumerate(kills):
        killed = inputs.folder / f"killed-{number}"
        killed.mkdir()
        shutil.copy(whole / "run.json", killed)
        done = json.loads(state.splitlines()[-1])["bytes"] if state else 0
        (killed / "traces.jsonl").write_bytes(content[: done + extra])
        if state:
            (killed / "progress.jsonl").write_text(state)
        report = run_traces(inputs.config, killed)
        assert (killed / "traces.jsonl").read_bytes() == content
        assert report == expected


def test_damage_costs_the_windows_behind_it(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    """A digit changed, a row doubled, a row or half the file lost, in the bank or in what is said of its state."""
    run = inputs.folder / "o"
    expected = run_traces(inputs.config, run)
    content = (run / "traces.jsonl").read_bytes()
    for name in ("traces.jsonl", "progress.jsonl"):
        whole = (run / name).read_bytes()
        lines = whole.splitlines(keepends=True)
        last = len(lines) - 1
        digit = lines[last].replace(b"1", b"2", 1)
        doubled = [*lines[:last], lines[0], lines[last]]
        for damaged in (b"".join([*lines[:last], digit]), b"".join(doubled), b"".join(lines[:last])):
            assert damaged != whole
            (run / name).write_bytes(damaged)
            assert run_traces(inputs.config, run) == expected
            assert (run / "traces.jsonl").read_bytes() == content
            assert (run / name).read_bytes() == whole
    said = capsys.readouterr().err
    assert "traces.jsonl: " in said
    assert "progress.jsonl: " in said
    assert "is shorter than it was" in said


def test_a_finished_run_is_not_done_again(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_traces(inputs.config, inputs.folder / "o")
    monkeypatch.setattr(traces, "window_traces", lambda *arguments: pytest.fail("drew again"))
    assert run_traces(inputs.config, inputs.folder / "o") == report


def test_inputs_that_do_not_belong_together(inputs: Inputs) -> None:
    out = inputs.folder / "o"
    with pytest.raises(UserError, match=r"no thinking\.jsonl"):
        run_traces(replace(inputs.config, pairs=inputs.folder), out)
    with pytest.raises(UserError, match="no such folder"):
        run_traces(replace(inputs.config, samples=inputs.folder / "none"), out)
    with pytest.raises(UserError, match="`limit=0`"):
        run_traces(replace(inputs.config, limit=0), out)
    with pytest.raises(UserError, match="which has no traces"):
        run_traces(replace(inputs.config, pairs=inputs.folder / "pairs" / "nothinking.jsonl"), out)
    assert not (out / "report.json").exists()


def test_pairs_of_another_model_or_temperature_are_refused(inputs: Inputs) -> None:
    path = inputs.folder / "pairs" / "thinking.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for name, value, words in (
        ("model", "other", "is of other"),
        ("temperature", 0.7, "several temperatures are mixed"),
    ):
        changed = [dict(row, **{name: value}) if number == 4 else row for number, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(UserError, match=words):
            run_traces(inputs.config, inputs.folder / name)
    path.write_text("")
    with pytest.raises(UserError, match="holds no pairs"):
        run_traces(inputs.config, inputs.folder / "empty")


def test_responses_sampled_off_temperature_one_are_pointed_out(inputs: Inputs) -> None:
    path = inputs.folder / "pairs" / "thinking.jsonl"
    rows = [dict(json.loads(line), temperature=0.8) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run_traces(replace(inputs.config, limit=2), inputs.folder / "o")
    assert (report.sampled_at, report.burn_in) == (0.8, 10)
    assert "posterior draws at that temperature" in (inputs.folder / "o" / "report.md").read_text()


def test_a_bank_is_extended_by_more_pairs_wherever_they_stand(
    inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    """More samples and pairs in their folders, as `sample` and `pairs` leave them: sorted among the old ones."""
    whole = run_traces(inputs.config, inputs.folder / "whole")
    path, samples = inputs.folder / "pairs" / "thinking.jsonl", inputs.folder / "samples" / "samples.jsonl"
    rows, drawn = path.read_text().splitlines(keepends=True), samples.read_text().splitlines(keepends=True)
    early = [row for number, row in enumerate(rows) if number in (2, 3, 6)]
    names = {json.loads(row)["prompt_id"] for row in early}
    path.write_text("".join(early))
    samples.write_text("".join(line for line in drawn if json.loads(line)["prompt_id"] in names))
    run_traces(inputs.config, inputs.folder / "o")
    before = (inputs.folder / "o" / "traces.jsonl").read_text()
    path.write_text("".join(rows))
    samples.write_text("".join(drawn))
    capsys.readouterr()
    report = run_traces(inputs.config, inputs.folder / "o")
    assert "Tracing: 6 pairs" in capsys.readouterr().err
    after = (inputs.folder / "o" / "traces.jsonl").read_text()
    assert after.startswith(before)
    assert report.tally.sides == whole.tally.sides == 2 * N_PAIRS
    bank = {(r.prompt_id, r.side, r.source, r.index): r.completion_ids for r in bank_of(inputs.folder / "o")}
    assert bank == {
        (r.prompt_id, r.side, r.source, r.index): r.completion_ids for r in bank_of(inputs.folder / "whole")
    }
    assert run_traces(inputs.config, inputs.folder / "o") == report


def bank_of(folder: Path) -> list[TraceRecord]:
    return list(read_records(folder / "traces.jsonl", TraceRecord))


@pytest.mark.parametrize("changed", ["pairs", "samples", "fewer"])
def test_a_bank_of_pairs_that_have_changed_is_another(inputs: Inputs, changed: str) -> None:
    config = inputs.config
    run_traces(replace(config, limit=6), inputs.folder / "o")
    stored = (inputs.folder / "o" / "run.json").read_text()
    path = inputs.folder / ("samples/samples.jsonl" if changed == "samples" else "pairs/thinking.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if changed == "fewer":
        config = replace(config, limit=2)
    elif changed == "pairs":
        first = rows[1]
        rows[1] = first | {"chosen_ids": first["rejected_ids"], "rejected_ids": first["chosen_ids"]}
    else:
        rows[0] |= {"max_new_tokens": 60}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"different run \((limit|pairs|samples): .* there, .* now"):
        run_traces(config, inputs.folder / "o")
    assert (inputs.folder / "o" / "run.json").read_text() == stored
