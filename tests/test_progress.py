"""Lines of progress where there is no terminal: when, how far, and how long still."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bvpo_stats import progress as module
from bvpo_stats.progress import progress, say, within


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def test_a_line_every_tenth_and_every_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Sampling", 1000, "responses", done=200) as advance:
        for _ in range(20):
            clock.now += 2
            advance(4)  # 2 a second: a tenth takes 50 s, so that half minutes come first
        assert capsys.readouterr().err.splitlines() == ["Sampling: 260/1000 responses, 2.0 responses/s, 6 min left"]
        clock.now += 10
        advance(220)
        assert capsys.readouterr().err == "Sampling: 500/1000 responses, 6.0 responses/s, 83 s left\n"
        clock.now += 1
        advance(100)  # the next tenth, but a line was just now
        assert capsys.readouterr().err == ""
        advance(400)
    assert capsys.readouterr().err == "Sampling: 1000/1000 responses in 51.0 s\n"


def test_a_long_batch_moves(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Training", 4, "steps") as advance:
        clock.now += 60
        within(0.5)
        assert capsys.readouterr().err == "Training: about 0/4 steps, 2 min for one, 7 min left\n"
        clock.now += 60
        advance(1)
        assert capsys.readouterr().err == "Training: 1/4 steps, 2 min for one, 6 min left\n"
        with progress("Scoring", 2, "responses"):  # the inner work is meant
            clock.now += 60
            within(1)
            assert capsys.readouterr().err == "Scoring: about 1/2 responses, 60 s for one, 60 s left\n"
    assert capsys.readouterr().err == "Training: 1/4 steps in 180.0 s\n"
    within(1)  # nobody is listening
    assert capsys.readouterr().err == ""


def test_of_several_processes_one_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    say("nothing")
    monkeypatch.setenv("RANK", "0")
    say("something")
    assert capsys.readouterr().err == "something\n"
