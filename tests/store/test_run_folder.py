from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.store.run_folder import Shard, open_run, parse_shard, run_files

IDENTITY = {"seed": 0, "modes": ("thinking",)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_run_opens_again_and_another_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with open_run(folder, "sample", IDENTITY):
        pass
    with open_run(folder, "sample", IDENTITY) as again:
        assert again == folder
    before = contents(folder)
    with (
        pytest.raises(UserError, match=r"different run .*seed: 0 there, 1 now"),
        open_run(folder, "sample", IDENTITY | {"seed": 1}),
    ):
        pass
    with pytest.raises(UserError, match="command: 'sample' there, 'pairs' now"), open_run(folder, "pairs", IDENTITY):
        pass
    assert contents(folder) == before


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty"), open_run(tmp_path, "sample", IDENTITY):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"), open_run(tmp_path / "thesis.tex", "sample", IDENTITY):
        pass


def test_a_run_killed_during_its_set_up_can_start_again(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock-setup").touch()
    (tmp_path / "run.json.tmp").write_text('{"comm')
    with open_run(tmp_path, "sample", IDENTITY):
        pass
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "sample"
    assert not (tmp_path / "run.json.tmp").exists()


def test_an_unreadable_identity_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"Cannot read .*run\.json"), open_run(tmp_path, "sample", IDENTITY):
        pass
    assert (tmp_path / "run.json").read_text() == "{"


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("1/1", "1/1", False),
        ("1/1", "1/2", False),
        ("1/2", "1/1", False),
        ("1/2", "1/2", False),
        ("1/2", "2/2", True),
        ("1/2", "2/3", False),
        ("3/4", "1/2", False),
    ],
)
def test_who_may_write_at_the_same_time(tmp_path: Path, first: str, second: str, together: bool) -> None:
    folder = tmp_path / "run"
    with open_run(folder, "sample", IDENTITY, shard=parse_shard(first)):
        other = open_run(folder, "sample", IDENTITY, shard=parse_shard(second))
        if together:
            with other:
                pass
        else:
            with pytest.raises(UserError, match="Another process is writing"), other:
                pass
    with open_run(folder, "sample", IDENTITY, shard=parse_shard(second)):  # locks end with the run
        pass


def test_shards_that_start_at_the_same_moment_set_the_folder_up_once(tmp_path: Path) -> None:
    folder, count = tmp_path / "run", 8
    start, inside = threading.Barrier(count), threading.Barrier(count, timeout=20)
    faults: list[BaseException] = []

    def shard(index: int) -> None:
        try:
            start.wait()
            with open_run(folder, "sample", IDENTITY, shard=Shard(index, count)):
                inside.wait()  # all of them at once
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=shard, args=(index + 1,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert json.loads((folder / "run.json").read_text()) == {"command": "sample", "seed": 0, "modes": ["thinking"]}


def test_a_shard_that_sets_the_folder_up_while_another_looks_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, listing = tmp_path / "run", Path.iterdir

    def listed_late(path: Path) -> Iterator[Path]:
        monkeypatch.setattr(Path, "iterdir", listing)
        with open_run(folder, "sample", IDENTITY, shard=Shard(2, 2)):
            pass
        return listing(path)

    folder.mkdir()
    monkeypatch.setattr(Path, "iterdir", listed_late)
    with open_run(folder, "sample", IDENTITY, shard=Shard(1, 2)) as run:
        assert (run / "run.json").exists()


def test_a_process_repairs_its_own_files_only(tmp_path: Path) -> None:
    with open_run(tmp_path, "sample", IDENTITY):
        pass
    own, other = Shard(1, 2).file(tmp_path, "samples.jsonl"), Shard(2, 2).file(tmp_path, "samples.jsonl")
    own.write_text('{"a":1}\n{"a"')
    other.write_text('{"a":1}\n{"a"')  # another process may be in the middle of this line
    with open_run(tmp_path, "sample", IDENTITY, shard=Shard(1, 2)):
        assert own.read_text() == '{"a":1}\n'
        assert other.read_text() == '{"a":1}\n{"a"'
    with open_run(tmp_path, "sample", IDENTITY):  # nobody else can be writing now
        assert other.read_text() == '{"a":1}\n'


@pytest.mark.parametrize("value", ["0/4", "5/4", "1/0", "a/b", "1", "-1/2", "1/2/3", ""])
def test_shards_that_make_no_sense(value: str) -> None:
    with pytest.raises(UserError, match="`shard="):
        parse_shard(value)


def test_files_of_a_run(tmp_path: Path) -> None:
    names = ["samples.jsonl", "samples-00001-of-00002.jsonl", "samples-00002-of-00002.jsonl"]
    for name in [*names, "samples.jsonl.tmp", "samples-old.jsonl", "resamples.jsonl", "samples-00001-of-00002.parquet"]:
        (tmp_path / name).touch()
    assert sorted(path.name for path in run_files(tmp_path, "samples.jsonl")) == sorted(names)
    assert run_files(tmp_path / "none", "samples.jsonl") == []


@pytest.mark.parametrize(("prompts", "window", "count"), [(70, 32, 2), (5, 32, 3), (96, 32, 3), (1000, 7, 4)])
def test_shares_add_up(prompts: int, window: int, count: int) -> None:
    shares = [Shard(index + 1, count).share(prompts, window) for index in range(count)]
    assert sum(shares) == prompts
    by_hand = [0] * count
    for number in range(prompts):
        by_hand[number // window % count] += 1
    assert shares == by_hand
