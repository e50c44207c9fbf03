"""The trace bank: K traces for each answer of D_t, where each came from, and with which probability.

Two kinds of traces serve two kinds of estimators of the marginal gradient:

- posterior traces, draws of pi(r | x, y): the pair's own (``anchor``), those of other samples with the very same
  answer (``same-answer``), and a Metropolis-Hastings chain from the anchor (``mh``), in this order up to K;
- ``prior`` traces, draws of pi(r | x) whatever their answer was, up to K more, each followed by the pair's answer here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError, check_kind, check_positive, check_whole, rows_of
from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.policy import Policy, as_policy
from bvpo_stats.model.scores import completion_logprobs
from bvpo_stats.progress import in_hand, progress, stage, stages
from bvpo_stats.records import SIDES, Completion, PreferencePair, Prompt, Side, TraceRecord, TraceSource, content_of
from bvpo_stats.sampling.engines.base import Draw, Request, SamplingOptions
from bvpo_stats.sampling.engines.transformers_engine import TransformersEngine, sampler_identity, uniforms
from bvpo_stats.store.sample_index import check_sampling_model

SOURCES: tuple[TraceSource, ...] = get_args(TraceSource)
_PRIOR_ROUNDS = 4  # times a prior trace that does not close is drawn again before it is given up
_DRAWING = 0.9  # about its share of the time of drawing traces and scoring them
_BURN_IN = 10  # moves to move away from anchors that were sampled at another temperature than the target's
Trace = tuple[int, ...]
"""Token ids of a trace, closing tag included."""


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
        check_whole("traces_per_answer", self.traces_per_answer)
        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown or not self.sources:
            raise UserError(f"`sources={self.sources!r}`: choose from {', '.join(SOURCES)}.")
        check_positive("temperature", self.temperature)
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
        accepted: Accepted ones, those whose proposal was the very trace where the chain stood included.
        stuck: Sides whose chain never changed its trace.
        unclosed: Prior traces given up because they would not close.
        moved: Moves that changed the trace.
        distinct: Distinct traces by source, summed over sides.
        posterior: Distinct traces among a side's posterior ones (all sources but ``prior``), summed over sides.
    """

    sides: int = 0
    by_source: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))
    proposals: int = 0
    accepted: int = 0
    stuck: int = 0
    unclosed: int = 0
    moved: int = 0
    distinct: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))
    posterior: int = 0


WINDOW = 32
"""Pairs worked on together."""


def make_traces(
    policy: Policy,
    samples: Sequence[Completion],
    pairs: Sequence[PreferencePair],
    k: int = 8,
    *,
    sources: Sequence[TraceSource] = SOURCES,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[TraceRecord]:
    """A trace bank, in memory: what ``bvpo-stats traces`` makes of the same pairs and samples.

    Args:
        policy: The sampling model.
        samples: The responses that the pairs were made from.
        pairs: The pairs; only those of D_t (``thinking``) have traces.
        k: Traces for each answer.
        sources: Which kinds, see `BankOptions`.
        temperature: Of new draws.
        seed: Decides every draw.
        batch_size: Sequences generated at once.

    Returns:
        Records by pair, side, source and number.

    Raises:
        UserError: No pairs of D_t, pairs sampled at several or unknown temperatures or with a nucleus, samples of
            another model, or a pair that is not among the samples.
    """
    policy = as_policy(policy)
    check_whole("k", k)
    check_whole("seed", seed, low=0)
    check_whole("batch_size", batch_size)
    options = BankOptions(k, tuple(rows_of("sources", sources)), temperature)
    thinking = []
    for number, pair in enumerate(rows_of("pairs", pairs), start=1):
        check_kind(f"pairs, row {number}", pair, PreferencePair, "a PreferencePair")
        if pair.mode == "thinking":
            thinking.append(pair)
    if not thinking:
        raise UserError("There are no thinking pairs (D_t), so there is nothing to find traces for.")
    by_prompt: dict[str, list[Completion]] = {}
    identity = sampler_identity(policy)
    for number, completion in enumerate(rows_of("samples", samples), start=1):
        check_kind(f"samples, row {number}", completion, Completion, "a Completion")
        if completion.mode == "thinking":
            check_sampling_model(completion.engine, completion.model, identity)
            by_prompt.setdefault(completion.prompt_id, []).append(completion)
    check_one_temperature(set(map(sampling_temperature, thinking)))
    drawer, tally = TraceDrawer(policy, temperature, seed, batch_size), BankTally()
    found: list[TraceRecord] = []
    with progress("Tracing", len(thinking), "pairs") as advance:
        for start in range(0, len(thinking), WINDOW):
            window = thinking[start : start + WINDOW]
            with in_hand(len(window)):
                found += window_traces(window, lambda name: by_prompt.get(name, []), drawer, options, tally)
            advance(len(window))
    return found


def window_traces(
    window: Sequence[PreferencePair],
    samples: Callable[[str], Sequence[Completion]],
    drawer: TraceDrawer,
    options: BankOptions,
    tally: BankTally,
) -> Iterator[TraceRecord]:
    """The bank of some D_t pairs, worked on together.

    Args:
        window: The pairs, sampled at one temperature.
        samples: Gives the ``thinking`` responses of a prompt.
        drawer: The sampling model.
        options: What goes in.
        tally: Is added to.

    Raises:
        UserError: A pair is of another model or template than its samples; or see :func:`pair_sides`.
    """
    sides: list[PairSide] = []
    for pair in window:
        responses = samples(pair.prompt_id)
        for response in responses[:1]:
            if content_of([pair.model, pair.template]) != content_of([response.model, response.template]):
                raise UserError(
                    f"Pair {pair.prompt_id} is of {pair.model} ({pair.template}), the samples of {response.model} "
                    f"({response.template}). Give the samples that the pairs were made from."
                )
        sides += pair_sides(pair, responses, drawer.policy.max_positions)
    return trace_bank(sides, sampling_temperature(window[0]), drawer, options, tally)


def check_one_temperature(temperatures: set[float]) -> None:
    """Raises UserError where pairs were sampled at several temperatures."""
    if len(temperatures) > 1:
        raise UserError(
            f"Pairs sampled at several temperatures are mixed: {', '.join(map(str, sorted(temperatures)))}. "
            "Make one bank for each."
        )


@dataclass(frozen=True)
class PairSide:
    """One answer of a D_t pair, and what is known about traces that lead to it.

    Attributes:
        prompt_id: The prompt.
        side: Which answer of the pair.
        question: The prompt's text.
        prompt_ids: Token ids of the prompt.
        anchor: The pair's own trace.
        answer_ids: Token ids of the answer y, end-of-sequence included.
        max_trace: Longest trace, in tokens, that leaves room for y under the sampler's cut-off: the law of traces is
            everywhere restricted to these, as the sampler's was.
        same_answer: Traces of the prompt's other samples that ended in the very same answer ids. Given all answers,
            choosing a pair depends on answers and indices alone, so these are independent exact draws of the sampler's
            q(r | x, y).
        others: All closed traces of the prompt's other samples. Their answers lost (or did not win) against y, so they
            are draws of q(r | x) only up to that selection.
    """

    prompt_id: str
    side: Side
    question: str
    prompt_ids: tuple[int, ...]
    anchor: Trace
    answer_ids: tuple[int, ...]
    max_trace: int
    same_answer: tuple[Trace, ...]
    others: tuple[Trace, ...]

    @property
    def name(self) -> str:
        """How errors and random numbers name it."""
        return f"{self.prompt_id}/{self.side}"

    def completion(self, trace: Trace) -> tuple[int, ...]:
        """Token ids of (r, y)."""
        return trace + self.answer_ids


def sampling_temperature(pair: PreferencePair) -> float:
    """The temperature that a pair's responses were sampled at.

    Raises:
        UserError: It or the nucleus is not recorded, or the nucleus is below 1: the proposal's probabilities would
            be unknown or wrong.
    """
    if pair.temperature is None or pair.top_p is None or pair.top_k is None:
        raise UserError(
            f"The temperature, top-p and top-k that pair {pair.prompt_id} was sampled with are not recorded, or not "
            "the same for both responses; without them its traces have no weights. Make pairs with `bvpo-stats sample` "
            "and `pairs`, or give the fields `temperature`, `top_p` and `top_k` (0 for none)."
        )
    if pair.top_p < 1 or pair.top_k:
        limit = f"top-p {pair.top_p:g}" if pair.top_p < 1 else f"top-k {pair.top_k}"
        raise UserError(
            f"Pair {pair.prompt_id} was sampled with {limit}: cut-off traces have no proposal probability, so no "
            "weights. Sample without (`top_p=1`)."
        )
    return pair.temperature


def pair_sides(pair: PreferencePair, samples: Sequence[Completion], max_positions: int | None) -> list[PairSide]:
    """Both sides of a D_t pair.

    Args:
        pair: The pair.
        samples: The prompt's ``thinking`` responses.
        max_positions: Longest sequence the model has positions for; None for no limit.

    Raises:
        UserError: The pair is not of D_t, is not among the samples, or see :func:`sampling_temperature`.
    """
    if pair.mode != "thinking":
        raise UserError(
            f"Pair {pair.prompt_id} is a {pair.mode} pair, which has no traces. Give a folder with thinking.jsonl."
        )
    sampling_temperature(pair)
    found = []
    for side in SIDES:
        index = pair.chosen_index if side == "chosen" else pair.rejected_index
        ids = pair.chosen_ids if side == "chosen" else pair.rejected_ids
        own = next(
            (
                sample
                for sample in samples
                if (index is None or sample.sample_index == index)
                and (sample.prompt_ids, sample.completion_ids) == (pair.prompt_ids, ids)
            ),
            None,
        )
        if own is None:
            number = "" if index is None else f" (sample {index})"
            raise UserError(
                f"The {side} response of pair {pair.prompt_id}{number} is not in `samples`. Give the "
                "samples that the pairs were made from."
            )
        found.append(_side(pair, side, own, samples, max_positions))
    return found


def _side(
    pair: PreferencePair, side: Side, own: Completion, samples: Sequence[Completion], max_positions: int | None
) -> PairSide:
    assert own.answer_start is not None  # pairs hold complete responses only
    anchor, answer = own.completion_ids[: own.answer_start], own.completion_ids[own.answer_start :]
    room = None if max_positions is None else max_positions - len(own.prompt_ids)
    cut_off = own.max_new_tokens or room or max(len(sample.completion_ids) for sample in samples)
    longest = cut_off if room is None else min(cut_off, room)
    max_trace = max(longest - len(answer), len(anchor))
    same_answer, others = [], []
    for sample in samples:
        if sample.sample_index == own.sample_index or sample.answer_start is None:
            continue
        trace = sample.completion_ids[: sample.answer_start]
        if len(trace) > max_trace:
            continue
        others.append(trace)
        if sample.complete and sample.completion_ids[sample.answer_start :] == answer:
            same_answer.append(trace)
    return PairSide(
        pair.prompt_id,
        side,
        own.prompt,
        pair.prompt_ids,
        anchor,
        answer,
        max_trace,
        tuple(same_answer),
        tuple(others),
    )


@dataclass(frozen=True)
class ScoredTrace:
    """A trace of one pair side with its log-probabilities, in nats.

    Attributes:
        ids: Token ids, closing tag included.
        token_logps: Log-probability of each of them at the proposal's temperature.
        joint_logp: log pi(r, y | x) at temperature 1.
    """

    ids: Trace
    token_logps: Float[np.ndarray, " tokens"]
    joint_logp: float

    @property
    def trace_logp(self) -> float:
        """Log q(r | x) at the proposal's temperature."""
        return float(self.token_logps.sum())


@dataclass(frozen=True)
class TraceDrawer:
    """The model as a source of traces.

    Attributes:
        policy: The sampling model.
        temperature: Temperature of the draws.
        seed: Decides every draw, together with the pair side's name and the step.
        batch_size: Sequences generated at once.
    """

    policy: Policy
    temperature: float
    seed: int
    batch_size: int

    @functools.cached_property
    def identity(self) -> str:
        """The model's name in the records."""
        return sampler_identity(self.policy)

    def score(
        self, sides: Sequence[PairSide], traces: Sequence[Trace], temperature: float | None = None
    ) -> list[ScoredTrace]:
        """Scores each trace followed by its side's answer.

        Args:
            sides: Whose answer follows.
            traces: One trace per side.
            temperature: Temperature of ``token_logps``; the drawer's own when None.
        """
        other = self.temperature if temperature is None else temperature
        logps = completion_logprobs(
            self.policy,
            [TokenSequence(side.prompt_ids, side.completion(trace)) for side, trace in zip(sides, traces, strict=True)],
            [f"a trace of {side.name}" for side in sides],
            temperatures=(1.0,) if other == 1.0 else (1.0, other),
        )
        return [
            ScoredTrace(trace, values[-1, : len(trace)], float(values[0].sum()))
            for trace, values in zip(traces, logps, strict=True)
        ]

    def draw(
        self, sides: Sequence[PairSide], prefixes: Sequence[Trace], purpose: str, steps: Sequence[int]
    ) -> list[Trace | None]:
        """Continues each side's prefix until the trace closes.

        Args:
            sides: Where the traces belong.
            prefixes: Trace tokens to keep; without a closing tag.
            purpose: Sets these random numbers apart from others of the same side.
            steps: Number of each draw, likewise.

        Returns:
            The whole trace, prefix included; None where the sequence ended first or the trace grew over ``max_trace``.
        """
        requests = [
            Request(Prompt(f"{side.name}/{purpose}", side.question), "thinking", step, side.prompt_ids + prefix, "")
            for side, prefix, step in zip(sides, prefixes, steps, strict=True)
        ]
        room = [side.max_trace - len(prefix) for side, prefix in zip(sides, prefixes, strict=True)]
        drawn: list[Trace | None] = [None] * len(sides)
        order = sorted(range(len(sides)), key=lambda row: (len(requests[row].prompt_ids), row))
        for start in stages(range(0, len(order), self.batch_size)):
            rows = order[start : start + self.batch_size]
            draws = self._generate([requests[row] for row in rows], [room[row] for row in rows])
            for row, draw in zip(rows, draws, strict=True):
                drawn[row] = self._closed(prefixes[row] + draw.completion_ids, sides[row].max_trace)
        return drawn

    def _generate(self, requests: Sequence[Request], room: Sequence[int]) -> list[Draw]:
        template = self.policy.template
        tag = template.tokenizer.encode(template.protocol.close_tag, add_special_tokens=False)
        engine = TransformersEngine(self.policy, stop_ids=tag if len(tag) == 1 else ())

        draws: dict[int, Draw] = {}
        todo = list(range(len(requests)))
        while todo:
            options = SamplingOptions(1, self.temperature, 1.0, max(room[row] for row in todo), self.seed)
            for row, draw in zip(todo, engine.generate([requests[row] for row in todo], options), strict=True):
                # The padding of a batch takes positions away from its shorter rows. Those that were cut for that reason
                # alone are drawn again among themselves, with the same random numbers, so that what is refused never
                # depends on the batch. The longest row is never among them: each round has fewer rows.
                if draw.finish_reason == "stop" or len(draw.completion_ids) >= room[row]:
                    draws[row] = draw
            todo = [row for row in todo if row not in draws]
        return [draws[row] for row in range(len(requests))]

    def _closed(self, ids: Trace, longest: int) -> Trace | None:
        length = self.policy.template.trace_length(ids)
        return None if length is None or length > longest else ids[:length]


@dataclass(frozen=True)
class Move:
    """Result of one move of one chain: where it stands now, and whether it accepted the proposal."""

    state: ScoredTrace
    accepted: bool


def metropolis_moves(
    drawer: TraceDrawer, sides: Sequence[PairSide], states: Sequence[ScoredTrace], step: int
) -> list[Move]:
    r"""Moves one chain per side, all in the same batches.

    The target is the posterior of the trace given the pair's answer, under the sampling model at temperature 1:

        pi(r | x, y)  proportional to  pi(r | x) pi(y | x, r),

    over traces r = (r_1 .. r_L) whose last token, and only it, closes the trace, with L at most M (what the
    sampler's cut-off leaves room for). A move from r:

    1. Draw a cut c uniformly from 0 .. L-1 and keep r_1 .. r_c.
    2. Draw a new suffix from the model at temperature T until the trace closes: r' with length L' and r'_{1..c} =
       r_{1..c}. A suffix that ends the sequence instead, or makes L' exceed M, is outside the target's support:
       refused.
    3. Move to r' with probability min(1, A), else stay.

    The same cut c leads back: from r' it is drawn with probability 1/L' (L' > c because at least the closing tag
    lies after the cut), and the suffix r_{c+1..L} is then regenerated with probability q_T(r_{>c} | x, r_{<=c}).
    Detailed balance may be asked for each cut separately (the cut is an auxiliary variable that both directions
    share):

        pi(r | x,y) (1/L) q_T(r'_{>c} | r_{<=c}) A(r -> r') = pi(r' | x,y) (1/L') q_T(r_{>c} | r_{<=c}) A(r' -> r),

    which min(1, A) solves with

        A = [pi(r', y | x) / pi(r, y | x)] [q_T(r_{>c} | r_{<=c}) / q_T(r'_{>c} | r_{<=c})] [L / L'].

    At T = 1 the suffix is proposed from the target's own prior, the first two factors collapse, and

        A = [pi(y | x, r') / pi(y | x, r)] [L / L'].

    The length factor does not cancel: without it, uniform cuts favour long traces. Summing over all cuts that could
    have produced r' (those up to the common prefix of r and r') would be valid too, but needs no less work and
    mixes no better.

    A chain that starts at a draw of the target has the target's law after every move: no burn-in. That is the case
    for the pair's own trace when it was sampled at temperature 1 without top-p.

    Args:
        drawer: Draws and scores; the states' ``token_logps`` must be at its temperature.
        sides: Whose posterior each chain samples.
        states: Where the chains stand.
        step: Number of the move; with seed and side it decides the random numbers.
    """
    numbers = [uniforms(f"{side.name}/mh/{step}", drawer.seed, 2) for side in sides]
    cuts = [int(u[0] * len(state.ids)) for u, state in zip(numbers, states, strict=True)]
    prefixes = [state.ids[:cut] for state, cut in zip(states, cuts, strict=True)]
    with stage(0.0, _DRAWING):
        proposals = drawer.draw(sides, prefixes, "mh", [step] * len(sides))
    rows = [row for row, proposal in enumerate(proposals) if proposal is not None]
    with stage(_DRAWING, 1.0):
        scored = drawer.score([sides[row] for row in rows], [trace for trace in proposals if trace is not None])
    moves = [Move(state, False) for state in states]
    for row, proposal in zip(rows, scored, strict=True):
        log_ratio = log_acceptance(states[row], proposal, cuts[row])
        if math.log(1.0 - numbers[row][1]) < log_ratio:  # 1 - u lies in (0, 1]
            moves[row] = Move(proposal, True)
    return moves


def log_acceptance(state: ScoredTrace, proposal: ScoredTrace, cut: int) -> float:
    """Log A of a move that kept ``cut`` tokens; see :func:`metropolis_moves`.

    Args:
        state: r, with token log-probabilities at the proposal's temperature.
        proposal: r', likewise.
        cut: c, number of tokens that both share by construction.
    """
    suffixes = state.token_logps[cut:].sum() - proposal.token_logps[cut:].sum()
    lengths = math.log(len(state.ids)) - math.log(len(proposal.ids))
    return proposal.joint_logp - state.joint_logp + float(suffixes) + lengths


def traces_for_answers(
    sides: Sequence[PairSide], drawer: TraceDrawer, options: BankOptions, tally: BankTally
) -> list[list[TraceRecord]]:
    """Traces for answers that came without one: chains under pi(r | x, y) that start at a draw of pi(r | x).

    After ``options.burn_in`` moves (see :func:`metropolis_moves`) the first state that is kept is the answer's own
    trace, the ``anchor`` of the bank; K - 1 more follow as ``mh``, and K ``prior`` ones. How far the chain is from its
    law then is not known: an answer that the model would hardly give accepts few moves.

    Args:
        sides: The answers; their anchors are not looked at.
        drawer: The model.
        options: K, moves and burn-in.
        tally: Is added to.

    Returns:
        The records of each side; none where no first draw closed its trace.
    """
    starts: dict[int, Trace] = {}
    todo = list(range(len(sides)))
    for attempt in range(_PRIOR_ROUNDS):
        drawn = drawer.draw([sides[row] for row in todo], [()] * len(todo), "start", [attempt] * len(todo))
        starts.update((row, trace) for row, trace in zip(todo, drawn, strict=True) if trace is not None)
        todo = [row for row in todo if row not in starts]
    rows = sorted(starts)
    anchored = [replace(sides[row], anchor=starts[row]) for row in rows]
    found: list[list[TraceRecord]] = [[] for _ in sides]
    owners = {side.name: row for row, side in zip(rows, anchored, strict=True)}
    wanted = replace(options, sources=("mh", "prior"))
    for record in trace_bank(anchored, drawer.temperature, drawer, wanted, tally):
        own = record.source == "mh" and record.index == 0
        found[owners[f"{record.prompt_id}/{record.side}"]].append(replace(record, source="anchor") if own else record)
    return found


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
    burn_in, move = options.burn_in_moves(sampled_at), 1 / (1 - _DRAWING)  # in passes that score one trace a side
    costs = {"anchor": 1, "same-answer": k, "mh": move * (burn_in + options.mh_moves * k)}
    costs["prior"] = k if options.prior == "samples" else move * k
    wanted = [source for source in SOURCES if source in options.sources]
    for source in stages(wanted, [costs[source] for source in wanted]):
        if source == "anchor":
            _add_sampled(drawer, sides, [(side.anchor,) for side in sides], sampled_at, source, taken)
        elif source == "same-answer":
            known = [side.same_answer[: k - _count(bank)] for side, bank in zip(sides, taken, strict=True)]
            _add_sampled(drawer, sides, known, sampled_at, source, taken)
        elif source == "mh":
            missing = [k - _count(bank) for bank in taken]
            with stage(0.0, 1 / costs[source]):
                anchors = drawer.score(sides, [side.anchor for side in sides])
            chains = _chains(drawer, sides, anchors, missing, options, burn_in, tally)
            for bank, chain in zip(taken, chains, strict=True):
                bank["mh"] = chain
        elif options.prior == "samples":
            _add_sampled(drawer, sides, [side.others[:k] for side in sides], sampled_at, source, taken)
        else:
            for bank, drawn in zip(taken, _fresh_prior(drawer, sides, k, tally), strict=True):
                bank["prior"] = drawn
    fresh = {"mh"} | ({"prior"} if options.prior == "fresh" else set())
    for side, bank in zip(sides, taken, strict=True):
        tally.sides += 1
        traces = {source: {scored.ids for scored in bank.get(source, ())} for source in SOURCES}
        for source, found in traces.items():
            tally.distinct[source] += len(found)
        tally.posterior += len(set().union(*(found for source, found in traces.items() if source != "prior")))
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
    states, moved = list(anchors), [0] * len(sides)
    active = [row for row, number in enumerate(wanted) if number > 0]
    moving = list(active)
    for step in stages(range(burn_in + options.mh_moves * max(wanted, default=0) if active else 0)):
        moves = metropolis_moves(drawer, [sides[row] for row in active], [states[row] for row in active], step)
        behind = step + 1 - burn_in
        for row, move in zip(active, moves, strict=True):
            moved[row] += move.state.ids != states[row].ids
            tally.accepted += move.accepted
            states[row] = move.state
            if behind > 0 and behind % options.mh_moves == 0:
                kept[row].append(move.state)
        tally.proposals += len(active)
        active = [row for row in active if len(kept[row]) < wanted[row]]
    tally.moved += sum(moved)
    tally.stuck += sum(moved[row] == 0 for row in moving)
    return kept


def _fresh_prior(drawer: TraceDrawer, sides: Sequence[PairSide], k: int, tally: BankTally) -> list[list[ScoredTrace]]:
    """K new draws of the trace for each side; one that does not close is drawn again a few times."""
    found: dict[tuple[int, int], Trace] = {}
    todo = [(row, number) for row in range(len(sides)) for number in range(k)]
    with stage(0.0, _DRAWING):
        for attempt in range(_PRIOR_ROUNDS):  # the first does nearly all
            owners = [sides[row] for row, _ in todo]
            drawn = drawer.draw(owners, [()] * len(todo), "prior", [number + attempt * k for _, number in todo])
            found.update((place, trace) for place, trace in zip(todo, drawn, strict=True) if trace is not None)
            todo = [place for place in todo if place not in found]
    tally.unclosed += len(todo)
    places = sorted(found)
    with stage(_DRAWING, 1.0):
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
        model=drawer.identity,
        template=drawer.policy.template.name,
    )
