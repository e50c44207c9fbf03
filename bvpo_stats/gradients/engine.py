"""The engine: from examples to their gradients, each a weighted sum of scores, in one forward and one backward.

Every gradient of an example is a linear combination of scores: of its D_t pair, its D_e pair and the traces of its
bank. A `Planner` gathers the distinct sequences of a microbatch, `prompt_rows` says how they combine, and `Passes` runs
them and hands the combinations to a sink, weight by weight.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from bvpo_stats.gradients.examples import Example, SideBank
from bvpo_stats.gradients.marginal import (
    MarginalEstimator,
    SideDiagnostics,
    SideTraces,
    diagnose_side,
    select_traces,
)
from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.gradients.options import MarginalMethod
from bvpo_stats.gradients.reference import Reference, to_numpy
from bvpo_stats.model.batching import TokenSequence, length_batches, padding_share
from bvpo_stats.model.scores import Mix, ScoreOptions, batch_of, score_pass
from bvpo_stats.model.sinks import Mixture, Sink
from bvpo_stats.model.subset import Subset
from bvpo_stats.progress import stage, stages, within
from bvpo_stats.records import TraceRecord

_LAYER = re.compile(r"(?:^|\.)(layers|h|blocks|layer)\.(\d+)\.")
_FORWARDS = 0.3  # about their share of the time, where they are made apart from the scores' own
OTHER = "other"
"""Block of weights outside the decoder's layers."""


def block_of(name: str) -> str:
    """Block of a parameter: its decoder layer.

    >>> block_of("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight")
    'layers.3'
    """
    found = _LAYER.search(name)
    return OTHER if found is None else f"layers.{found.group(2)}"


@dataclass(frozen=True)
class BlockLayout:
    """Where each weight lies in its block.

    Attributes:
        sizes: Block to number of parameters, in the order of the model.
        places: Weight to (block, offset, parameters).
        dtype: float64 for float64 scores, else float32.
    """

    sizes: dict[str, int]
    places: dict[str, tuple[str, int, int]]
    dtype: type[np.floating]

    @classmethod
    def of(cls, subset: Subset) -> BlockLayout:
        """Layout of a subset."""
        sizes: dict[str, int] = {}
        places = {}
        for name in subset.parameters:
            block = block_of(name)
            size = math.prod(subset.shapes[name])
            places[name] = (block, sizes.get(block, 0), size)
            sizes[block] = sizes.get(block, 0) + size
        wide = all(weight.dtype == torch.float64 for weight in subset.parameters.values())
        return cls(sizes, places, np.float64 if wide else np.float32)

    def strung(self, pieces: Iterable[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Blocks from one flat piece a weight, in the order of `places`; float64."""
        blocks = {block: np.empty(size) for block, size in self.sizes.items()}
        for (block, offset, size), piece in zip(self.places.values(), pieces, strict=True):
            blocks[block][offset : offset + size] = piece
        return blocks

    @property
    def size(self) -> int:
        """Parameters of all blocks."""
        return sum(self.sizes.values())


class BlockRows:
    """A sink that adds up mixed scores by block, on the model's device: rows x parameters numbers of memory."""

    def __init__(self, layout: BlockLayout, rows: int, device: torch.device | str = "cpu") -> None:
        self._layout = layout
        dtype = torch.float64 if layout.dtype is np.float64 else torch.float32
        where = "cpu" if torch.device(device).type == "mps" else device  # which has no float64 for their products
        self.blocks = {
            block: torch.zeros((rows, size), dtype=dtype, device=where) for block, size in layout.sizes.items()
        }

    def __call__(self, name: str, scores: Float[Tensor, "rows ..."]) -> None:
        """Adds one weight's rows."""
        block, offset, size = self._layout.places[name]
        rows = self.blocks[block]
        rows[:, offset : offset + size] += scores.flatten(1).to(rows)

    def take(self, rows: list[int]) -> dict[str, Float[Tensor, "rows parameters"]]:
        """Some rows of every block; a view where they follow each other."""
        chosen = slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else rows
        return {block: values[chosen] for block, values in self.blocks.items()}


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


Row = dict[int, float]
"""One gradient as a sparse sum of scores: sequence to weight."""


def sparse_rows(
    plans: Sequence[PromptPlan], logps: LogProbs, sequences: Sequences, rules: RowRules
) -> tuple[list[dict[str, Row]], list[list[SideDiagnostics]]]:
    """The weights of scores in each of some examples' gradients, and the diagnostics of their trace weights.

    Args:
        plans: The examples.
        logps: Log-probabilities of the sequences.
        sequences: The sequences.
        rules: Which gradients.

    Returns:
        Of each example, member (``t``, ``e``, ``t2`` where there is one, ``m``, ``m1``, ``m2``) to row; diagnostics.
    """
    pairs = [(n, "t", plan.trace) for n, plan in enumerate(plans)] + [
        (n, "e", plan.empty) for n, plan in enumerate(plans)
    ]
    pairs += [(n, "t2", plan.second) for n, plan in enumerate(plans) if plan.second is not None]
    rows: list[dict[str, Row]] = [{} for _ in plans]
    chosen, rejected = np.array([pair for _, _, pair in pairs]).T
    tokens = np.array([float(len(sequence.completion_ids)) for sequence in sequences.sequences])
    columns = (logps.policy, tokens, logps.reference)
    terms = rules.objective(PairLogps(*(values[side] for values in columns for side in (chosen, rejected))))
    for (n, member, pair), weights in zip(
        pairs, zip(terms.chosen_weight.tolist(), terms.rejected_weight.tolist(), strict=True), strict=True
    ):
        rows[n][member] = _row(zip(pair, weights, strict=True))
    diagnostics: list[list[SideDiagnostics]] = [[] for _ in plans]
    for n, plan in enumerate(plans):
        if plan.marginal is not None:
            marginal, diagnostics[n] = _marginal_rows(plan, plan.marginal, logps, rules)
            rows[n] |= marginal
    return rows, diagnostics


def _marginal_rows(
    plan: PromptPlan, choices: tuple[TraceChoice, TraceChoice], logps: LogProbs, rules: RowRules
) -> tuple[dict[str, Row], list[SideDiagnostics]]:
    chosen, rejected = (_side_traces(choice, logps) for choice in choices)
    assert rules.method in ("anchored", "posterior", "prior", "jackknife", "multilevel")
    estimator = MarginalEstimator(rules.objective, rules.method, rules.at_reference)
    found = {"m": estimator(chosen, rejected, _rng(rules.seed, plan.example.key))}
    if rules.half_splits:
        found["m1"], found["m2"] = estimator.halves(chosen, rejected)
    rows = {
        member: _row(
            entry
            for choice, values in zip(choices, coefficients, strict=True)
            for entry in zip(choice.rows.tolist(), values.tolist(), strict=True)
        )
        for member, coefficients in found.items()
    }
    diagnostics = [
        SideDiagnostics(plan.example.prompt_id, side, diagnose_side(traces, _anchor(bank, choice, index, logps, plan)))
        for (side, bank), traces, choice, index in zip(
            plan.example.sides, (chosen, rejected), choices, plan.trace, strict=True
        )
    ]
    return rows, diagnostics


def _row(entries: Iterable[tuple[int, float]]) -> Row:
    row: Row = {}
    for column, weight in entries:  # two traces of an answer may be one sequence
        row[column] = row.get(column, 0.0) + weight
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
        names=np.asarray(choice.rows),
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


def log_probs(reference: Reference, sequences: Sequences) -> LogProbs:
    """Log-probabilities of all sequences by passes of their own, stored values of the reference where allowed."""
    policy = reference.forward(sequences.sequences, sequences.names)
    return _with_reference(reference, sequences)(policy)


def stored_log_probs(reference: Reference, sequences: Sequences) -> LogProbs:
    """Log-probabilities at theta_ref without a pass, for weights that only know log-ratios and stored values.

    A sequence whose log-probability is not stored gets 0: its log-ratio is 0 whatever it is.
    """
    known = np.nan_to_num(sequences.stored) if reference.stored else np.zeros(len(sequences.stored))
    return _with_reference(reference, sequences)(known)


def _with_reference(
    reference: Reference, sequences: Sequences
) -> Callable[[Float[np.ndarray, " sequences"]], LogProbs]:
    """From log pi_theta to all log-probabilities; passes of the reference are made now."""
    known = reference.of_sequences(sequences.sequences, sequences.names, sequences.stored)
    tempered = reference.tempered(sequences.sequences, sequences.names, sequences.temperature)
    return lambda policy: LogProbs(policy, policy if known is None else known, tempered)


Mixing = Callable[[LogProbs], Sequence[Row]]
"""From log-probabilities to the gradients as sparse rows."""


@dataclass(frozen=True)
class Passes:
    """The parameters, the model and its reference.

    Attributes:
        reference: The policy, where log pi_ref comes from, and the budgets.
        subset: The parameters theta.
        layout: Their blocks.
    """

    reference: Reference
    subset: Subset
    layout: BlockLayout

    def run(self, sequences: Sequences, mixing: Mixing, sink: Sink, known: LogProbs | None = None) -> None:
        """One microbatch: hands the sink the gradients, weight by weight (in several parts that add up).

        Where the weights depend on log-probabilities, they are taken between forward and backward of one pass if all
        sequences fit one rectangle without much padding, and from a forward of their own otherwise.

        Args:
            sequences: What to run.
            mixing: From log-probabilities to the gradients as rows of weights on scores.
            sink: Receives ``(name, rows [gradients, *shape])``.
            known: Log-probabilities, where the weights need no pass.

        Raises:
            UserError: As in :func:`~bvpo_stats.model.scores.score_pass`.
        """
        reference, lengths = self.reference, [len(sequence) for sequence in sequences.sequences]
        fits = len(lengths) * max(lengths) <= reference.max_tokens and padding_share(lengths) <= reference.max_padding
        if known is None and fits:
            complete = _with_reference(reference, sequences)
            everything = list(range(len(lengths)))

            def mix(found: Tensor) -> Mixture:
                return self._mixture(mixing(complete(to_numpy(found))), everything)

            self._scores(sequences, everything, mix, sink)
            return
        forwards = _FORWARDS if known is None else 0.0
        with stage(0.0, forwards):
            rows = mixing(log_probs(reference, sequences) if known is None else known)
        parts = length_batches(lengths, max_tokens=reference.max_tokens, max_padding=reference.max_padding)
        with stage(forwards, 1.0):
            for part in stages(parts):
                self._scores(sequences, part, _always(self._mixture(rows, part)), sink)

    def _mixture(self, rows: Sequence[Row], part: Sequence[int]) -> Mixture:
        place = {column: k for k, column in enumerate(part)}
        some = [{place[column]: weight for column, weight in row.items() if column in place} for row in rows]
        return Mixture.of_rows(some, len(part), self.reference.policy.device)

    def _scores(self, sequences: Sequences, part: list[int], mix: Mix, sink: Sink) -> None:
        names = [sequences.names[i] for i in part]
        batch = batch_of(self.reference.policy, [sequences.sequences[i] for i in part], names)
        reached = itertools.count(1)

        def moving(name: str, scores: Tensor) -> None:
            sink(name, scores)
            within(next(reached) / len(self.subset.parameters))

        score_pass(self.reference.policy.model, self.subset, batch, [moving], ScoreOptions(mix=mix, names=names))


def _always(mixture: Mixture) -> Mix:
    return lambda _: mixture
