"""What each prompt asks of the model: its sequences, and the gradients as rows of weights on their scores."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from bvpo_stats.gradients.examples import Example, SideBank
from bvpo_stats.gradients.marginal import MarginalEstimator, SideDiagnostics, SideTraces, diagnose_side, score_weights
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.options import MarginalMethod
from bvpo_stats.gradients.selection import select_traces
from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.records import TraceRecord

IndexPair = tuple[int, int]


@dataclass(frozen=True)
class RowRules:
    """Which gradients are formed, and how.

    Attributes:
        objective: The loss.
        method: Estimator of m; ``reference-point`` and ``none`` form no m.
        at_reference: theta = theta_ref.
        traces_per_answer: Most traces per side.
        second_traces: Whether to form g_t on a second trace draw.
        half_splits: Whether to form m from either half of the traces.
        seed: Decides the levels of ``multilevel``.
    """

    objective: Objective
    method: MarginalMethod
    at_reference: bool
    traces_per_answer: int | None = None
    second_traces: bool = True
    half_splits: bool = False
    seed: int = 0

    @property
    def forms_m(self) -> bool:
        """Whether m is formed at all."""
        return self.method not in ("reference-point", "none")

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the vectors of a prompt, ``t2`` aside."""
        marginal = ("m", "m1", "m2") if self.half_splits else ("m",)
        return ("t", "e", *marginal) if self.forms_m else ("t", "e")

    @property
    def weights_need_model(self) -> bool:
        """Whether weights depend on more than stored values: at theta_ref log-ratios are 0 and w is that of pi_ref."""
        return not (self.at_reference and self.objective.needs_reference)


@dataclass(frozen=True)
class Sequences:
    """The distinct sequences of some prompts.

    Attributes:
        sequences: What to run.
        names: How errors call them.
        stored: Stored log pi_ref of each, NaN where there is none.
        temperature: Temperature T at which log q_T(r, y | x) is needed; NaN where it is not.
    """

    sequences: list[TokenSequence]
    names: list[str]
    stored: Float[np.ndarray, " sequences"]
    temperature: Float[np.ndarray, " sequences"]


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of :class:`Sequences`.

    Attributes:
        policy: log pi_theta.
        reference: log pi_ref.
        tempered: log q_T, NaN where not needed.
    """

    policy: Float[np.ndarray, " sequences"]
    reference: Float[np.ndarray, " sequences"]
    tempered: Float[np.ndarray, " sequences"]


@dataclass(frozen=True)
class TraceChoice:
    """The traces of one side that enter m.

    Attributes:
        traces: The records.
        rows: Index of each in the sequences.
        answer_tokens: Tokens of the answer.
        is_prior: Whether all (but an anchor in front) are draws of q(r | x).
        anchored: Whether the first is the anchor in front of prior draws.
    """

    traces: tuple[TraceRecord, ...]
    rows: Int[np.ndarray, " traces"]
    answer_tokens: int
    is_prior: bool
    anchored: bool


@dataclass(frozen=True)
class PromptPlan:
    """One prompt's part of a microbatch; pairs are (chosen, rejected) indices of sequences."""

    example: Example
    trace: IndexPair
    empty: IndexPair
    second: IndexPair | None
    marginal: tuple[TraceChoice, TraceChoice] | None


class Planner:
    """Builds the plans of one microbatch; equal sequences are run once."""

    def __init__(self, rules: RowRules) -> None:
        self._rules = rules
        self._index: dict[TokenSequence, int] = {}
        self._names: list[str] = []
        self._stored: list[float] = []
        self._temperature: list[float] = []

    def add(self, example: Example) -> PromptPlan:
        """Registers a prompt's sequences.

        Raises:
            UserError: The bank lacks what the method needs.
        """
        pairs: list[IndexPair] = []
        for pair in example.both:
            label = f"pair {pair.prompt_id} ({pair.mode}, "
            rows = (
                self._row(pair.prompt_ids, pair.chosen_ids, f"{label}chosen)", pair.ref_chosen_logps),
                self._row(pair.prompt_ids, pair.rejected_ids, f"{label}rejected)", pair.ref_rejected_logps),
            )
            pairs.append(rows)
        second: IndexPair | None = None
        if self._rules.second_traces and example.chosen.same_answer and example.rejected.same_answer:
            second = (self._trace(example.chosen.same_answer[0]), self._trace(example.rejected.same_answer[0]))
        marginal = None
        if self._rules.forms_m:
            marginal = (self._choice(example.chosen), self._choice(example.rejected))
        return PromptPlan(example, pairs[0], pairs[1], second, marginal)

    def sequences(self) -> Sequences:
        """Everything registered so far."""
        stored, temperature = np.array(self._stored), np.array(self._temperature)
        return Sequences(list(self._index), list(self._names), stored, temperature)

    def _choice(self, bank: SideBank) -> TraceChoice:
        method = self._rules.method
        traces = select_traces(bank, method, self._rules.traces_per_answer)
        rows = np.array([self._trace(trace) for trace in traces])
        is_prior = all(trace.source == "prior" for trace in traces) or method == "anchored"
        if not is_prior:
            for trace, row in zip(traces, rows, strict=True):
                if trace.source != "mh" and trace.temperature not in (1.0, None):
                    self._temperature[row] = trace.temperature or math.nan
        return TraceChoice(traces, rows, bank.answer_tokens, is_prior, method == "anchored")

    def _trace(self, trace: TraceRecord) -> int:
        name = f"{trace.source} trace {trace.index} of prompt {trace.prompt_id} ({trace.side})"
        return self._row(trace.prompt_ids, trace.completion_ids, name, trace.joint_logp)

    def _row(self, prompt: Sequence[int], completion: Sequence[int], name: str, stored: float | None) -> int:
        sequence = TokenSequence(tuple(prompt), tuple(completion))
        row = self._index.setdefault(sequence, len(self._index))
        if row == len(self._names):
            self._names.append(name)
            self._stored.append(math.nan)
            self._temperature.append(math.nan)
        if stored is not None and math.isnan(self._stored[row]):
            self._stored[row] = stored
        return row


def prompt_rows(
    plan: PromptPlan, logps: LogProbs, sequences: Sequences, rules: RowRules
) -> tuple[dict[str, Float[np.ndarray, " sequences"]], list[SideDiagnostics]]:
    """Weights of all sequences' scores in each of a prompt's gradients, and the diagnostics of its trace weights.

    Args:
        plan: The prompt.
        logps: Log-probabilities of the sequences.
        sequences: The sequences.
        rules: Which gradients.

    Returns:
        Member (``t``, ``e``, ``t2`` where there is one, ``m``, ``m1``, ``m2``) to weights, and the diagnostics.
    """
    pairs = {"t": plan.trace, "e": plan.empty} | ({} if plan.second is None else {"t2": plan.second})
    rows = {member: _pair_row(pair, logps, sequences, rules.objective) for member, pair in pairs.items()}
    if plan.marginal is None:
        return rows, []
    choices = plan.marginal
    chosen, rejected = (_side_traces(choice, logps) for choice in choices)
    assert rules.method in ("anchored", "posterior", "prior", "jackknife", "multilevel")
    estimator = MarginalEstimator(rules.objective, rules.method, rules.at_reference)
    found = {"m": estimator(chosen, rejected, _rng(rules.seed, plan.example.key))}
    if rules.half_splits:
        found["m1"], found["m2"] = estimator.halves(chosen, rejected)
    for member, coefficients in found.items():
        row = np.zeros(len(logps.policy))
        for choice, values in zip(choices, coefficients, strict=True):
            np.add.at(row, choice.rows, values)
        rows[member] = row
    diagnostics = [
        SideDiagnostics(plan.example.prompt_id, side, diagnose_side(traces, _anchor(bank, choice, index, logps, plan)))
        for (side, bank), traces, choice, index in zip(
            plan.example.sides, (chosen, rejected), choices, plan.trace, strict=True
        )
    ]
    return rows, diagnostics


def _pair_row(
    pair: IndexPair, logps: LogProbs, sequences: Sequences, objective: Objective
) -> Float[np.ndarray, " sequences"]:
    tokens = [float(len(sequences.sequences[index].completion_ids)) for index in pair]
    weights = score_weights(objective, logps.policy[list(pair)].tolist(), logps.reference[list(pair)].tolist(), tokens)
    row = np.zeros(len(logps.policy))
    np.add.at(row, list(pair), weights)
    return row


def _side_traces(choice: TraceChoice, logps: LogProbs) -> SideTraces:
    reference = logps.reference[choice.rows]
    if choice.is_prior:
        proposal = np.array([trace.trace_logp for trace in choice.traces])
    else:
        tempered = logps.tempered[choice.rows]
        proposal = np.where(np.isnan(tempered), reference, tempered)
    return SideTraces(
        log_policy=logps.policy[choice.rows],
        log_ref=reference,
        log_proposal=proposal,
        answer_tokens=choice.answer_tokens,
        anchored=choice.anchored,
        normalised=choice.is_prior,
    )


def _anchor(bank: SideBank, choice: TraceChoice, index: int, logps: LogProbs, plan: PromptPlan) -> float | None:
    """Log-weight of the pair's own trace, where it is a posterior draw and prior traces are in use."""
    plain = choice.is_prior and not choice.anchored and plan.example.sampled_plainly
    if not plain or math.isnan(bank.own.trace_logp):
        return None
    return float(logps.policy[index]) - bank.own.trace_logp


def _rng(seed: int, key: str) -> np.random.Generator:
    """Random numbers that belong to an example, whatever batch it is in."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
