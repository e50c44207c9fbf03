"""The trace bank: K traces for each answer of D_t, where each came from, and with which probability.

Two kinds of traces serve two kinds of estimators of the marginal gradient:

- posterior traces, draws of pi(r | x, y): the pair's own (``anchor``), those of other samples with the very same
  answer (``same-answer``), and a Metropolis-Hastings chain from the anchor (``mh``), in this order up to K;
- ``prior`` traces, draws of pi(r | x) whatever their answer was, up to K more, each followed by the pair's answer here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from bvpo_stats.errors import UserError
from bvpo_stats.records import TraceRecord, TraceSource
from bvpo_stats.sampling.trace_chain import ScoredTrace, TraceDrawer, metropolis_moves
from bvpo_stats.sampling.trace_sides import PairSide, Trace

SOURCES: tuple[TraceSource, ...] = get_args(TraceSource)
_PRIOR_ROUNDS = 4  # times a prior trace that does not close is drawn again before it is given up
_BURN_IN = 10  # moves to move away from anchors that were sampled at another temperature than the target's


@dataclass(frozen=True)
class BankOptions:
    """What goes into a bank.

    Attributes:
        traces_per_answer: K.
        sources: Which kinds of traces.
        temperature: Of new draws (``mh`` proposals and fresh ``prior`` traces).
        mh_moves: Moves of a chain for each trace that is kept.
        burn_in: Moves before the first is kept; None for 0 where the anchors were sampled at temperature 1 (their
            chains are stationary from the start) and 10 elsewhere.
        prior: ``fresh`` draws new traces; ``samples`` takes those of the prompt's other responses, which costs nothing
            but is biased by the selection of the pair: their answers lost or did not win against y.
    """

    traces_per_answer: int = 8
    sources: tuple[TraceSource, ...] = SOURCES
    temperature: float = 1.0
    mh_moves: int = 3
    burn_in: int | None = None
    prior: Literal["fresh", "samples"] = "fresh"

    def __post_init__(self) -> None:
        if self.traces_per_answer < 1:
            raise UserError(f"`traces_per_answer={self.traces_per_answer}`: at least 1.")
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown or not self.sources:
            raise UserError(f"`sources={self.sources!r}`: choose from {', '.join(SOURCES)}.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"`temperature={self.temperature}`: must be positive.")
        if self.mh_moves < 1 or (self.burn_in or 0) < 0:
            raise UserError(
                f"`mh_moves={self.mh_moves}` `burn_in={self.burn_in}`: at least 1 move, and no negative burn-in."
            )

    def burn_in_moves(self, sampled_at: float) -> int:
        """Moves to discard for anchors sampled at a temperature."""
        if self.burn_in is not None:
            return self.burn_in
        return 0 if sampled_at == 1.0 else _BURN_IN


@dataclass
class BankTally:
    """Running counts over a bank.

    Attributes:
        sides: Pair sides done.
        by_source: Traces by source.
        proposals: Metropolis-Hastings moves.
        accepted: Accepted ones.
        stuck: Sides whose chain never moved.
        unclosed: Prior traces given up because they would not close.
    """

    sides: int = 0
    by_source: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))
    proposals: int = 0
    accepted: int = 0
    stuck: int = 0
    unclosed: int = 0


def trace_bank(
    sides: Sequence[PairSide], sampled_at: float, drawer: TraceDrawer, options: BankOptions, tally: BankTally
) -> Iterator[TraceRecord]:
    """The bank of some pair sides, worked on together in the same batches.

    Args:
        sides: Pair sides.
        sampled_at: Temperature that the pairs' own responses were sampled at.
        drawer: The sampling model.
        options: What goes in.
        tally: Is added to.

    Yields:
        Records by side and, within a side, by source in the order of :data:`SOURCES`.
    """
    k = options.traces_per_answer
    taken: list[dict[TraceSource, list[ScoredTrace]]] = [{} for _ in sides]
    if "anchor" in options.sources:
        _add_sampled(drawer, sides, [(side.anchor,) for side in sides], sampled_at, "anchor", taken)
    if "same-answer" in options.sources:
        wanted = [side.same_answer[: k - _count(bank)] for side, bank in zip(sides, taken, strict=True)]
        _add_sampled(drawer, sides, wanted, sampled_at, "same-answer", taken)
    if "mh" in options.sources:
        missing = [k - _count(bank) for bank in taken]
        anchors = drawer.score(sides, [side.anchor for side in sides])
        chains = _chains(drawer, sides, anchors, missing, options, options.burn_in_moves(sampled_at), tally)
        for bank, chain in zip(taken, chains, strict=True):
            bank["mh"] = chain
    if "prior" in options.sources and options.prior == "samples":
        _add_sampled(drawer, sides, [side.others[:k] for side in sides], sampled_at, "prior", taken)
    elif "prior" in options.sources:
        for bank, drawn in zip(taken, _fresh_prior(drawer, sides, k, tally), strict=True):
            bank["prior"] = drawn
    fresh = {"mh"} | ({"prior"} if options.prior == "fresh" else set())
    for side, bank in zip(sides, taken, strict=True):
        tally.sides += 1
        for source in SOURCES:
            temperature = drawer.temperature if source in fresh else sampled_at
            for index, scored in enumerate(bank.get(source, ())):
                tally.by_source[source] += 1
                yield _record(side, source, index, scored, temperature, drawer)


def _count(bank: dict[TraceSource, list[ScoredTrace]]) -> int:
    return sum(map(len, bank.values()))


def _add_sampled(
    drawer: TraceDrawer,
    sides: Sequence[PairSide],
    traces: Sequence[Sequence[Trace]],
    temperature: float,
    source: TraceSource,
    taken: list[dict[TraceSource, list[ScoredTrace]]],
) -> None:
    """Scores traces that are on record already and puts them into the sides' banks."""
    owners = [row for row, some in enumerate(traces) for _ in some]
    scored = drawer.score([sides[row] for row in owners], [trace for some in traces for trace in some], temperature)
    for row, trace in zip(owners, scored, strict=True):
        taken[row].setdefault(source, []).append(trace)


def _chains(
    drawer: TraceDrawer,
    sides: Sequence[PairSide],
    anchors: Sequence[ScoredTrace],
    wanted: Sequence[int],
    options: BankOptions,
    burn_in: int,
    tally: BankTally,
) -> list[list[ScoredTrace]]:
    """``wanted`` states of each side's chain, ``options.mh_moves`` apart, after ``burn_in`` moves from the anchor."""
    kept: list[list[ScoredTrace]] = [[] for _ in sides]
    states, accepted = list(anchors), [0] * len(sides)
    active = [row for row, number in enumerate(wanted) if number > 0]
    moving = list(active)
    step = 0
    while active:
        moves = metropolis_moves(drawer, [sides[row] for row in active], [states[row] for row in active], step)
        step += 1
        for row, move in zip(active, moves, strict=True):
            states[row] = move.state
            accepted[row] += move.accepted
            if step > burn_in and (step - burn_in) % options.mh_moves == 0:
                kept[row].append(move.state)
        tally.proposals += len(active)
        active = [row for row in active if len(kept[row]) < wanted[row]]
    tally.accepted += sum(accepted)
    tally.stuck += sum(accepted[row] == 0 for row in moving)
    return kept


def _fresh_prior(drawer: TraceDrawer, sides: Sequence[PairSide], k: int, tally: BankTally) -> list[list[ScoredTrace]]:
    """K new draws of the trace for each side; one that does not close is drawn again a few times."""
    found: dict[tuple[int, int], Trace] = {}
    todo = [(row, number) for row in range(len(sides)) for number in range(k)]
    for attempt in range(_PRIOR_ROUNDS):
        owners = [sides[row] for row, _ in todo]
        drawn = drawer.draw(owners, [()] * len(todo), "prior", [number + attempt * k for _, number in todo])
        found.update((place, trace) for place, trace in zip(todo, drawn, strict=True) if trace is not None)
        todo = [place for place in todo if place not in found]
    tally.unclosed += len(todo)
    places = sorted(found)
    scored = drawer.score([sides[row] for row, _ in places], [found[place] for place in places])
    banks: list[list[ScoredTrace]] = [[] for _ in sides]
    for (row, _), trace in zip(places, scored, strict=True):
        banks[row].append(trace)
    return banks


def _record(
    side: PairSide, source: TraceSource, index: int, scored: ScoredTrace, temperature: float, drawer: TraceDrawer
) -> TraceRecord:
    return TraceRecord(
        prompt_id=side.prompt_id,
        side=side.side,
        source=source,
        index=index,
        prompt_ids=side.prompt_ids,
        completion_ids=side.completion(scored.ids),
        answer_start=len(scored.ids),
        trace_logp=scored.trace_logp,
        joint_logp=scored.joint_logp,
        temperature=temperature,
        model=drawer.policy.identity,
        template=drawer.policy.template.name,
    )
