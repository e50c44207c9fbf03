"""Lines of progress where there is no terminal: when, how far, and how long still."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bvpo_stats import progress as module
from bvpo_stats.errors import UserError
from bvpo_stats.progress import in_hand, progress, say, stage, stages, within


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


def test_parts_of_a_batch_move_and_never_go_back(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def break_off() -> None:
        for _ in stages(range(2)):
            raise UserError("broken")

    def seen() -> str:
        clock.now += 60
        within(0)
        return capsys.readouterr().err.partition(",")[0].removeprefix("Tracing: about ").strip()

    with progress("Tracing", 64, "pairs") as advance:
        with in_hand(32):
            for part in stages(["score", "draw"], [1, 3]):
                if part == "draw":
                    assert seen() == "8/64 pairs"
                    for _ in stages(range(2)):  # batches of the draws
                        within(1.0)
                    assert seen() == "32/64 pairs"
                    within(0.5)  # a second round over the same
            with pytest.raises(UserError, match="broken"):
                break_off()
            assert seen() == "32/64 pairs"
        advance(32)
        capsys.readouterr()
        with in_hand(32), stage(0.0, 0.5):
            within(0.5)
            assert seen() == "40/64 pairs"
    assert list(stages("ab")) == ["a", "b"]  # nobody is listening


def test_one_batch_of_traces_gradients_and_log_probabilities_moves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bvpo_stats.gradients.examples import join
    from bvpo_stats.gradients.options import StreamOptions
    from bvpo_stats.gradients.stream import gradient_batches
    from bvpo_stats.lab.oracle.draws import completion_records
    from bvpo_stats.sampling.pairs import reference_logps
    from bvpo_stats.sampling.traces import make_traces
    from tests.gradients.conftest import population

    for pause in ("_LINE_EVERY_SECONDS", "_LINES_APART_SECONDS"):
        monkeypatch.setattr(module, pause, 0.0)
    found = population(8, drift=0.05)
    policy = found.oracle.policy

    def reached() -> list[int]:
        """Pairs behind us in each line of a batch in hand."""
        lines = [line for line in capsys.readouterr().err.splitlines() if " about " in line]
        places = [int(line.split("about ")[1].split("/")[0]) for line in lines]
        assert places == sorted(places)
        return places

    make_traces(policy, completion_records(found.oracle, found.draws), found.trace_pairs, 3)  # one window of 8
    assert len(set(reached())) >= 6
    joined = join(found.pairs, found.bank(3, "prior"))
    with progress("Gradients", joined.prompts, "prompts"):
        for _ in gradient_batches(policy, found.subset, joined.examples, StreamOptions(method="prior")):  # one pass
            pass
    assert len(set(reached())) >= 6
    with progress("Pairing", 8, "prompts"), in_hand(8):
        reference_logps(policy, found.pairs[:1] * 8)
    assert reached() == [8]  # one batch
