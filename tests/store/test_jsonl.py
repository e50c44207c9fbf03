from __future__ import annotations

import gzip
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.store.jsonl import append_jsonl, encode_row, mend, read_jsonl, repair_tail, write_atomic

ROWS = [{"a": 1, "text": "é▁｜"}, {"a": 2, "text": "line\nbreak"}]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files may not grow beyond 4 MiB: the kernel's EFBIG stands in for a full disk.

    The limit is the whole process's, the file that a test log goes to included, which is smaller than that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_come_back_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_jsonl(path, ROWS[:1])
    append_jsonl(path, ROWS[1:])
    append_jsonl(path, [])
    assert list(read_jsonl(path)) == [(1, ROWS[0]), (2, ROWS[1])]
    path.write_bytes(b"\n" + path.read_bytes())
    assert [number for number, _ in read_jsonl(path)] == [2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_know_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_row({"a": value})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a":1}\nnonsense\n', r":2: not JSON"),
        (b'{"a":1}\n[1]\n', r":2: a JSON list"),
        (b'{"a":"\xff"}\n', r":1: not valid UTF-8 \(byte 6\)"),
        (b'{"a":1}\n{"a":', r":2: the last line is cut off"),
        (b'{"a":1}\n{"a":"\xc3', r":2: the last line is cut off"),
        (b'{"a":"\\ud83d\\ude00"}\n{"a":1,"b":[{"c":"x \\uD83D"}]}\n', r":2: field `b` has half a character"),
        (b'{"\\udc00":1}\n', r":1: field `.udc00` has half a character"),
        (b'{"a":' + b"[" * 100_000 + b"\n", r":1: nested too deeply"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_jsonl(path))


def test_a_compressed_file_that_is_cut_or_damaged_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a":1}\n' * 1_000)
    for size in range(2, len(whole)):  # of one byte, gzip says that it is no gzip
        (tmp_path / "x.jsonl.gz").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"Cannot read .*x\.jsonl\.gz: .*its end is missing"):
            list(read_jsonl(tmp_path / "x.jsonl.gz"))
    for damaged in (b"x" + whole[1:], whole[:12] + b"\xff" * 4 + whole[16:], whole[:-8] + b"\0" * 8):
        (tmp_path / "x.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"Cannot read .*x\.jsonl\.gz: "):
            list(read_jsonl(tmp_path / "x.jsonl.gz"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*none\.jsonl: No such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_a_file_cut_anywhere_is_repaired_to_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_jsonl(path, ROWS)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        keep = 0 if size < first else first if size < len(whole) else size
        assert list(read_jsonl(path, growing=True)) == list(enumerate(ROWS, start=1))[: whole[:keep].count(b"\n")]
        assert repair_tail(path) == (keep != size)
        assert path.read_bytes() == whole[:keep]


def test_repair_finds_a_line_break_far_back(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a":1}\n{"b":"' + b"x" * 200_000)
    assert repair_tail(path)
    assert path.read_bytes() == b'{"a":1}\n'
    path.write_bytes(b"x" * 200_000)
    assert repair_tail(path)
    assert path.read_bytes() == b""
    assert not repair_tail(path)
    assert not repair_tail(tmp_path / "none.jsonl")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, small_disk: None) -> None:
    path = tmp_path / "x.jsonl"
    append_jsonl(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"Disk full while writing .*goes on where it stopped"):
        append_jsonl(path, [{"a": "y" * (1 << 20)}] * 5)
    assert path.read_bytes() == before
    append_jsonl(path, [{"a": 3}])  # there is still room for less
    assert len(list(read_jsonl(path))) == 3


def test_lines_that_are_not_as_written_are_named_and_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"n": n, "x": n * 1.5} for n in range(6)]
    path = tmp_path / "x.jsonl"
    append_jsonl(path, rows[:2])
    append_jsonl(path, rows[2:])
    lines = path.read_bytes().splitlines(keepends=True)
    for number, (damaged, kept, bad) in enumerate(
        [
            ([*lines[:2], lines[2].replace(b"3.0", b"3.1"), *lines[3:]], [0, 1, 3, 4, 5], 3),
            ([*lines[:2], lines[1], *lines[2:]], [0, 1, 2, 3, 4, 5], 3),
            ([*lines, lines[0]], [0, 1, 2, 3, 4, 5], 7),
            ([b'{"n":9,"x":0}\n', *lines], [0, 1, 2, 3, 4, 5], 1),
        ]
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(UserError, match=rf"x\.jsonl:{bad}: the line is not as it was written, or comes twice"):
            list(read_jsonl(path))
        if number % 2:
            mend(path, ordered=True)
            kept = kept[: bad - 1]
            words = f"x.jsonl: line {bad} is damaged or a copy; cut with the"
        else:
            mend(path)
            words = f"x.jsonl: 1 damaged or copied lines cut, the first of them line {bad};"
        assert [row["n"] for _, row in read_jsonl(path)] == kept
        assert words in capsys.readouterr().err
        append_jsonl(path, [row for row in rows if row["n"] not in kept])
        assert sorted(row["n"] for _, row in read_jsonl(path)) == list(range(6))
    mend(path)
    path.write_bytes(b"".join(lines[::-1][:4]))  # what is gone, or stands elsewhere, is no damage to a line
    mend(path)
    assert [row["n"] for _, row in read_jsonl(path)] == [5, 4, 3, 2]
    assert capsys.readouterr().err == ""
    assert sorted(os.listdir(tmp_path)) == [".x.jsonl.sums", "x.jsonl"]


def test_sums_that_are_cut_or_missing_lose_no_more_than_their_lines(tmp_path: Path) -> None:
    path, sums = tmp_path / "x.jsonl", tmp_path / ".x.jsonl.sums"
    append_jsonl(path, ROWS)
    whole = path.read_bytes()
    for size in range(sums.stat().st_size):
        path.write_bytes(whole)
        sums.write_bytes(sums.read_bytes()[:size])
        mend(path)
        assert path.read_bytes().count(b"\n") == size // 8
        append_jsonl(path, ROWS[size // 8 :])
        assert list(read_jsonl(path)) == list(enumerate(ROWS, start=1))
    sums.unlink()  # of somebody else: nothing is known against it
    path.write_bytes(whole + b'{"a":3}\n')
    append_jsonl(path, [{"a": 4}])
    assert len(list(read_jsonl(path))) == 4
    append_jsonl(path, [{"a": 5}], sums=False)
    with pytest.raises(UserError, match=r":5: the line is not as it was written"):
        list(read_jsonl(path))


def test_lines_that_another_process_appends_meanwhile_are_good(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_jsonl(path, ROWS)
    reading = read_jsonl(path, growing=True)
    assert next(reading)[0] == 1
    append_jsonl(path, [{"a": 3, "pad": "x" * 100_000}, {"a": 4}])
    assert [number for number, _ in reading] == [2, 3, 4]


def test_a_device_without_space_is_reported(tmp_path: Path) -> None:
    full = tmp_path / "x.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(UserError, match="Disk full"):
        append_jsonl(full, ROWS)


def test_whole_files_appear_at_once_or_not_at_all(tmp_path: Path, small_disk: None) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, "old")
    with pytest.raises(UserError, match="Disk full"):
        write_atomic(path, "new" * (2 << 20))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]
    write_atomic(path, b"new")
    assert path.read_text() == "new"


def test_a_folder_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot write .*No such file"):
        write_atomic(tmp_path / "none" / "x", "data")
