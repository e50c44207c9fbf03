from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.records import MODES, Completion, Prompt
from bvpo_stats.sampling.engines.base import Draw, Outcome, Request, SamplingOptions, SetAside
from bvpo_stats.sampling.sample import (
    ModeSummary,
    SamplingRun,
    automatic_batch_size,
    check_one_source,
    count_set_aside,
    plan_batches,
    sample_into,
    summarise,
    window_size,
)
from bvpo_stats.store.jsonl import KeySet, append_jsonl, read_jsonl
from bvpo_stats.store.run_folder import WHOLE, Shard
from bvpo_stats.store.tables import read_records
from tests.sampling.samples import sample, template

TEMPLATE = template()
EOS = TEMPLATE.tokenizer.eos_token_id


class ScriptedEngine:
    """Writes each request's own index as its answer; can stop, and can set requests aside."""

    name = "scripted"

    def __init__(self, *, whole_batches: bool = True, stop_after: int | None = None, aside: Sequence[str] = ()) -> None:
        self.top_k = 0
        self.whole_batches = whole_batches
        self.batches: list[list[str]] = []
        self._stop_after = stop_after
        self._aside = aside

    def draw(
        self, batches: Iterable[Sequence[Request]], options: SamplingOptions
    ) -> Iterator[list[tuple[Request, Outcome]]]:
        for number, batch in enumerate(batches):
            if number == self._stop_after:
                raise UserError("The engine stops.")
            self.batches.append([request.key for request in batch])
            yield [(request, self._outcome(request)) for request in batch]

    def _outcome(self, request: Request) -> Outcome:
        if request.key in self._aside:
            return SetAside("odd", "for the test")
        text = f"7</think>{request.sample_index}" if request.mode == "thinking" else str(request.sample_index)
        return Draw((*TEMPLATE.tokenizer.encode(text, add_special_tokens=False), EOS), "stop")


def make_run(engine: ScriptedEngine | None = None, *, size: int = 7, samples: int = 5) -> SamplingRun:
    return SamplingRun(
        engine or ScriptedEngine(), TEMPLATE, SamplingOptions(samples=samples), "toy", batch_size=size, modes=MODES
    )


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"q{number}", "1+" * (number * 7 % 11) + "1", gold=str(number)) for number in range(count)]


def all_keys(count: int, samples: int = 5) -> set[str]:
    return {f"q{number}/{mode}/{index}" for number in range(count) for mode in MODES for index in range(samples)}


# Planning


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_every_request_is_planned_once(size: int) -> None:
    batches = list(plan_batches(prompts(75), make_run(size=size)))
    keys = [request.key for batch in batches for request in batch]
    assert len(keys) == len(set(keys))
    assert set(keys) == all_keys(75)
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len({request.mode for request in batch}) == 1


def test_batches_of_a_window_are_even_and_of_like_length() -> None:
    run = make_run(size=59)
    assert window_size(run.options) == 32
    first = list(plan_batches(prompts(32), run))[:3]
    assert [len(batch) for batch in first] == [53, 53, 54]  # and not 59, 59, 42
    widths = [[len(request.prompt_ids) for request in batch] for batch in first]
    assert max(widths[0]) <= min(widths[1])
    assert max(widths[1]) <= min(widths[2])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shards_draw_the_batches_of_one_process(count: int) -> None:
    run = make_run()
    whole = [tuple(request.key for request in batch) for batch in plan_batches(prompts(150), run)]
    parts = [
        tuple(request.key for request in batch)
        for index in range(count)
        for batch in plan_batches(prompts(150), run, Shard(index + 1, count))
    ]
    assert Counter(parts) == Counter(whole)


def test_shards_of_unlike_batch_size_leave_no_hole() -> None:
    parts = [
        request.key
        for index, size in enumerate((3, 50))
        for batch in plan_batches(prompts(150), make_run(size=size), Shard(index + 1, 2))
        for request in batch
    ]
    assert len(parts) == len(set(parts))
    assert set(parts) == all_keys(150)


def test_planning_reads_ahead_by_one_window_only() -> None:
    taken = 0

    def stream() -> Iterator[Prompt]:
        nonlocal taken
        for prompt in prompts(1_000):
            taken += 1
            yield prompt

    plan = plan_batches(stream(), make_run())
    next(plan)
    assert taken == 32


# Runs


def keys_on_record(folder: Path) -> list[str]:
    return [completion.key for completion in read_records(folder, Completion)]


def test_a_run_records_everything_once(tmp_path: Path) -> None:
    tally = sample_into(tmp_path, prompts(40), make_run(), n_prompts=40)
    assert sorted(keys_on_record(tmp_path)) == sorted(all_keys(40))
    assert (tally.responses, tally.set_aside) == (400, 0)
    record = next(c for c in read_records(tmp_path, Completion) if c.key == "q3/thinking/4")
    assert (record.trace, record.answer, record.answer_start, record.gold) == ("7", "4", 2, "3")
    assert record.prompt_ids == TEMPLATE.prompt_ids(prompts(4)[3].prompt, "thinking")
    assert tally.tokens == sum(len(c.completion_ids) for c in read_records(tmp_path, Completion))
    before = (tmp_path / "samples.jsonl").read_bytes()
    assert sample_into(tmp_path, prompts(40), make_run(), n_prompts=40).responses == 0
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_an_engine_that_stops_loses_nothing(tmp_path: Path) -> None:
    uninterrupted, interrupted = tmp_path / "a", tmp_path / "b"
    uninterrupted.mkdir()
    interrupted.mkdir()
    sample_into(uninterrupted, prompts(40), make_run(), n_prompts=40)
    with pytest.raises(UserError, match="stops"):
        sample_into(interrupted, prompts(40), make_run(ScriptedEngine(stop_after=9)), n_prompts=40)
    assert len(keys_on_record(interrupted)) == len(set(keys_on_record(interrupted))) > 0
    sample_into(interrupted, prompts(40), make_run(), n_prompts=40)
    assert (interrupted / "samples.jsonl").read_bytes() == (uninterrupted / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("whole", [True, False])
def test_half_a_batch_is_finished_in_the_way_its_engine_needs(tmp_path: Path, whole: bool) -> None:
    """An engine whose rounding depends on the batch repeats it whole; another is asked for the missing part only."""
    sample_into(tmp_path, prompts(3), make_run(), n_prompts=3)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_text("".join(lines[:3]))
    engine = ScriptedEngine(whole_batches=whole)
    sample_into(tmp_path, prompts(3), make_run(engine), n_prompts=3)
    assert (tmp_path / "samples.jsonl").read_text() == "".join(lines)
    first = next(plan_batches(prompts(3), make_run()))
    assert engine.batches[0] == [request.key for request in first][0 if whole else 3 :]


def test_what_is_set_aside_is_counted_and_not_asked_for_again(tmp_path: Path) -> None:
    odd = ["q1/thinking/0", "q2/nothinking/4"]
    tally = sample_into(tmp_path, prompts(5), make_run(ScriptedEngine(aside=odd)), n_prompts=5)
    assert (tally.responses, tally.set_aside) == (48, 2)
    assert set(keys_on_record(tmp_path)) == all_keys(5) - set(odd)
    assert count_set_aside([tmp_path / "set_aside.jsonl"]) == {"odd": 2}
    engine = ScriptedEngine()
    sample_into(tmp_path, prompts(5), make_run(engine), n_prompts=5)
    assert engine.batches == []


def test_shards_share_a_folder_and_any_process_fills_the_holes(tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    whole.mkdir()
    shared.mkdir()
    sample_into(whole, prompts(100), make_run(), n_prompts=100)
    sample_into(shared, prompts(100), make_run(), n_prompts=100, shard=Shard(1, 2))
    with pytest.raises(UserError, match="stops"):
        sample_into(shared, prompts(100), make_run(ScriptedEngine(stop_after=3)), n_prompts=100, shard=Shard(2, 2))
    (shared / "samples-00002-of-00002.jsonl").open("a").write('{"half')  # another process is writing here
    sample_into(shared, prompts(100), make_run(), n_prompts=100, shard=WHOLE)
    lines = [
        line for path in shared.glob("samples*.jsonl") for line in path.read_text().splitlines() if line.endswith("}")
    ]
    assert len(list(shared.glob("samples*.jsonl"))) == 3
    assert sorted(lines) == sorted((whole / "samples.jsonl").read_text().splitlines())


@pytest.mark.parametrize("field", ["model", "template"])
def test_records_of_another_source_are_not_mixed_in(tmp_path: Path, field: str) -> None:
    sample_into(tmp_path, prompts(2), make_run(), n_prompts=2)
    row = next(row for _, row in read_jsonl(tmp_path / "samples.jsonl"))
    append_jsonl(tmp_path / "samples.jsonl", [row | {field: "other"}])
    before = (tmp_path / "samples.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"samples\.jsonl:21: a record of {field} 'other'"):
        sample_into(tmp_path, prompts(3), make_run(), n_prompts=3)
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_folders_without_samples_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no samples\.jsonl"):
        next(read_records(tmp_path, Completion))
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt_id": "q"}) + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl:1: not a Completion record; missing"):
        next(read_records(tmp_path, Completion))


def test_automatic_batches_shrink_with_length() -> None:
    assert automatic_batch_size(9, 10**9, True) == 9
    assert automatic_batch_size(None, 1, False) == 256
    assert automatic_batch_size(None, 300, False) == 54
    assert automatic_batch_size(None, 300, True) == 218
    assert automatic_batch_size(None, 10**6, False) == 1


def test_one_source() -> None:
    one = sample("a", 0, "1")
    check_one_source([one, one])
    with pytest.raises(UserError, match="several models are mixed: embedded@test, other"):
        check_one_source([one, replace(one, model="other")])


# Counting


def test_key_sets_are_sets() -> None:
    keys = [f"q{number}/thinking/{number % 5}" for number in range(3_000)]
    found = KeySet(iter(keys + keys[:100]))
    assert len(found) == 3_000
    assert all(key in found for key in keys)
    assert not any(f"{key}0" in found for key in keys)
    assert "a" not in KeySet([])
    assert found._digests.nbytes == 16 * 3_000


def test_a_summary_counts_by_hand() -> None:
    answered = sample("a", 0, "17")  # "8+9=17</think>17" and the end
    unclosed = replace(answered, sample_index=1, finish_reason="length", answer_start=None, answer=None)
    cut = replace(answered, sample_index=2, finish_reason="length")
    silent = replace(answered, sample_index=3, answer="")
    never = replace(answered, sample_index=4, answer_start=None, answer=None)  # ended by itself
    length, start = len(answered.completion_ids), answered.answer_start
    assert start is not None
    direct = sample("a", 0, "17", mode="nothinking")
    found = summarise([answered, unclosed, cut, direct, silent, never])
    assert list(found) == ["thinking", "nothinking"]
    assert found["thinking"] == ModeSummary(5, 5 * length, 2, 1, 1, length, start, length - start)
    size = len(direct.completion_ids)
    assert found["nothinking"] == ModeSummary(1, size, 0, 0, 0, size, None, size)
