r"""Metropolis-Hastings over traces: regenerate the suffix after a cut, keep the result or not.

The target is the posterior of the trace given the pair's answer, under the sampling model at temperature 1:

    pi(r | x, y)  proportional to  pi(r | x) pi(y | x, r),

over traces r = (r_1 .. r_L) whose last token, and only it, closes the trace, with L at most M (what the sampler's
cut-off leaves room for). A move from r:

1. Draw a cut c uniformly from 0 .. L-1 and keep r_1 .. r_c.
2. Draw a new suffix from the model at temperature T until the trace closes: r' with length L' and r'_{1..c} = r_{1..c}.
   A suffix that ends the sequence instead, or makes L' exceed M, is outside the target's support: refused.
3. Move to r' with probability min(1, A), else stay.

The same cut c leads back: from r' it is drawn with probability 1/L' (L' > c because at least the closing tag lies after
the cut), and the suffix r_{c+1..L} is then regenerated with probability q_T(r_{>c} | x, r_{<=c}). Detailed balance may
be asked for each cut separately (the cut is an auxiliary variable that both directions share):

    pi(r | x,y) (1/L) q_T(r'_{>c} | r_{<=c}) A(r -> r') = pi(r' | x,y) (1/L') q_T(r_{>c} | r_{<=c}) A(r' -> r),

which min(1, A) solves with

    A = [pi(r', y | x) / pi(r, y | x)] [q_T(r_{>c} | r_{<=c}) / q_T(r'_{>c} | r_{<=c})] [L / L'].

At T = 1 the suffix is proposed from the target's own prior, the first two factors collapse, and

    A = [pi(y | x, r') / pi(y | x, r)] [L / L'].

The length factor does not cancel: without it, uniform cuts favour long traces. Summing over all cuts that could have
produced r' (those up to the common prefix of r and r') would be valid too, but needs no less work and mixes no better.

A chain that starts at a draw of the target has the target's law after every move: no burn-in. That is the case for the
pair's own trace when it was sampled at temperature 1 without top-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import completion_logprobs
from bvpo_stats.records import Prompt
from bvpo_stats.sampling.engines.base import Draw, Request, SamplingOptions
from bvpo_stats.sampling.engines.transformers_engine import TransformersEngine, uniforms
from bvpo_stats.sampling.trace_sides import PairSide, Trace


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
        temperature: Temperature of the draws (T above).
        seed: Decides every draw, together with the pair side's name and the step.
        batch_size: Sequences generated at once.
    """

    policy: Policy
    temperature: float
    seed: int
    batch_size: int

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
        for start in range(0, len(order), self.batch_size):
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
    """Moves one chain per side, all in the same batches.

    Args:
        drawer: Draws and scores; the states' ``token_logps`` must be at its temperature.
        sides: Whose posterior each chain samples.
        states: Where the chains stand.
        step: Number of the move; with seed and side it decides the random numbers.
    """
    numbers = [uniforms(f"{side.name}/mh/{step}", drawer.seed, 2) for side in sides]
    cuts = [int(u[0] * len(state.ids)) for u, state in zip(numbers, states, strict=True)]
    prefixes = [state.ids[:cut] for state, cut in zip(states, cuts, strict=True)]
    proposals = drawer.draw(sides, prefixes, "mh", [step] * len(sides))
    rows = [row for row, proposal in enumerate(proposals) if proposal is not None]
    scored = drawer.score([sides[row] for row in rows], [trace for trace in proposals if trace is not None])
    moves = [Move(state, False) for state in states]
    for row, proposal in zip(rows, scored, strict=True):
        log_ratio = log_acceptance(states[row], proposal, cuts[row])
        if math.log(1.0 - numbers[row][1]) < log_ratio:  # 1 - u lies in (0, 1]
            moves[row] = Move(proposal, True)
    return moves


def log_acceptance(state: ScoredTrace, proposal: ScoredTrace, cut: int) -> float:
    """Log A of a move that kept ``cut`` tokens; see the derivation at the head of this module.

    Args:
        state: r, with token log-probabilities at the proposal's temperature.
        proposal: r', likewise.
        cut: c, number of tokens that both share by construction.
    """
    suffixes = state.token_logps[cut:].sum() - proposal.token_logps[cut:].sum()
    lengths = math.log(len(state.ids)) - math.log(len(proposal.ids))
    return proposal.joint_logp - state.joint_logp + float(suffixes) + lengths
