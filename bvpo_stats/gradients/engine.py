"""The engine: from examples to their gradients, each a weighted sum of scores, in one forward and one backward.

Every gradient of an example is a linear combination of scores: of its D_t pair, its D_e pair and the traces of its
bank. A `Planner` gathers the distinct sequences of a microbatch, `prompt_rows` says how they combine, and `Passes` runs
them and hands the combinations to a sink, weight by weight.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvpo_stats.gradients.examples import Example, SideBank
from bvpo_stats.gradients.marginal import (
    MarginalEstimator,
    SideDiagnostics,
    SideTraces,
    diagnose_side,
    score_weights,
    select_traces,
)
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.options import MarginalMethod
from bvpo_stats.model.batching import Batch, TokenSequence, collate, length_batches, padding_share
from bvpo_stats.model.head import sequence_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import Mix, ScoreOptions, completion_logprobs, log_probabilities, score_pass
from bvpo_stats.model.subset import Subset
from bvpo_stats.records import TraceRecord

_LAYER = re.compile(r"(?:^|\.)(layers|h|blocks|layer)\.(\d+)\.")
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
        for name, weight in subset.parameters.items():
            block = block_of(name)
            places[name] = (block, sizes.get(block, 0), weight.numel())
            sizes[block] = sizes.get(block, 0) + weight.numel()
        wide = all(weight.dtype == torch.float64 for weight in subset.parameters.values())
        return cls(sizes, places, np.float64 if wide else np.float32)

    @property
    def size(self) -> int:
        """Parameters of all blocks."""
        return sum(self.sizes.values())


class BlockRows:
    """A sink that adds up mixed scores by block, on the CPU: rows x parameters numbers of memory."""

    def __init__(self, layout: BlockLayout, rows: int) -> None:
        self._layout = layout
        self.blocks = {block: np.zeros((rows, size), dtype=layout.dtype) for block, size in layout.sizes.items()}

    def __call__(self, name: str, scores: Float[Tensor, "rows ..."]) -> None:
        """Adds one weight's rows."""
        block, offset, size = self._layout.places[name]
        self.blocks[block][:, offset : offset + size] += scores.flatten(1).cpu().numpy()

    def take(self, rows: list[int]) -> dict[str, Float[np.ndarray, "rows parameters"]]:
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


@dataclass(frozen=True)
class Forwards:
    """The model and how it is run forward.

    Attributes:
        policy: The policy at theta.
        at_reference: theta = theta_ref: log pi_ref = log pi_theta, and no reference pass is made.
        use_stored: Whether stored log pi_ref are used where there are any.
        max_tokens: Budget of padded tokens per forward.
        max_padding: Largest share of padding per forward.
    """

    policy: Policy
    at_reference: bool
    use_stored: bool
    max_tokens: int
    max_padding: float

    def stored_log_probs(self, sequences: Sequences) -> LogProbs:
        """Log-probabilities at theta_ref without a pass, for weights that only know log-ratios and stored values.

        A sequence whose log-probability is not stored gets 0: its log-ratio is 0 whatever it is.
        """
        known = np.nan_to_num(sequences.stored) if self.use_stored else np.zeros(len(sequences.stored))
        return LogProbs(known, known, self.tempered(sequences))

    def batch(self, sequences: Sequences, part: list[int]) -> Batch:
        """Some of the sequences as one padded batch."""
        return collate(
            [sequences.sequences[i] for i in part],
            pad_id=self.policy.pad_id,
            max_positions=self.policy.max_positions,
            names=[sequences.names[i] for i in part],
            device=self.policy.device,
        )

    def log_probs(self, sequences: Sequences) -> LogProbs:
        """Log-probabilities of all sequences by passes of their own, stored values of the reference where allowed."""
        policy = self._forward(sequences, list(range(len(sequences.sequences))), self.policy.model)
        reference = self.reference(sequences)
        return LogProbs(policy, policy if reference is None else reference, self.tempered(sequences))

    def reference(self, sequences: Sequences) -> Float[np.ndarray, " sequences"] | None:
        """Log pi_ref of all sequences; None at theta_ref."""
        if self.at_reference:
            return None
        values = sequences.stored.copy() if self.use_stored else np.full(len(sequences.stored), math.nan)
        missing = np.flatnonzero(np.isnan(values)).tolist()
        if missing:
            with self.policy.reference() as model:
                values[missing] = self._forward(sequences, missing, model)
        return values

    def tempered(self, sequences: Sequences) -> Float[np.ndarray, " sequences"]:
        """Log q_T of the sequences that need it: pi_ref sampled at another temperature, token by token."""
        values = np.full(len(sequences.sequences), math.nan)
        for temperature in np.unique(sequences.temperature[~np.isnan(sequences.temperature)]).tolist():
            rows = np.flatnonzero(sequences.temperature == temperature).tolist()
            with self.policy.reference():
                found = completion_logprobs(
                    self.policy,
                    [sequences.sequences[i] for i in rows],
                    [sequences.names[i] for i in rows],
                    temperatures=(temperature,),
                    max_tokens=self.max_tokens,
                )
            values[rows] = [float(tokens.sum()) for tokens in found]
        return values

    def _forward(
        self, sequences: Sequences, rows: list[int], model: torch.nn.Module
    ) -> Float[np.ndarray, " some_sequences"]:
        """Log-probabilities of some sequences, in batches of the budget."""
        lengths = [len(sequences.sequences[i]) for i in rows]
        found = np.zeros(len(rows))
        for part in length_batches(lengths, max_tokens=self.max_tokens, max_padding=self.max_padding):
            members = [rows[k] for k in part]
            names = [sequences.names[i] for i in members]
            found[part] = to_numpy(
                sequence_logprobs(log_probabilities(model, self.batch(sequences, members), names=names))
            )
        return found


def to_numpy(values: Tensor) -> Float[np.ndarray, " sequences"]:
    """Log-probabilities in float64 on the CPU."""
    return values.detach().double().cpu().numpy()


Mixing = Callable[[LogProbs], Float[np.ndarray, "rows sequences"]]
"""From log-probabilities to the weight of every sequence's score in every gradient."""


@dataclass(frozen=True)
class Passes:
    """The parameters and the model.

    Attributes:
        forwards: The model and how it is run.
        subset: The parameters theta.
        layout: Their blocks.
    """

    forwards: Forwards
    subset: Subset
    layout: BlockLayout

    def run(self, sequences: Sequences, rows: int, mixing: Mixing, known: LogProbs | None = None) -> BlockRows:
        """The gradients of one microbatch.

        Where the weights depend on log-probabilities, they are taken between forward and backward of one pass if all
        sequences fit one rectangle without much padding, and from a forward of their own otherwise.

        Args:
            sequences: What to run.
            rows: Number of gradients.
            mixing: Weights of the scores.
            known: Log-probabilities, where the weights need no pass.

        Raises:
            UserError: As in :func:`~bvpo_stats.model.scores.score_pass`.
        """
        forwards, sink = self.forwards, BlockRows(self.layout, rows)
        lengths = [len(sequence) for sequence in sequences.sequences]
        parts = length_batches(lengths, max_tokens=self.forwards.max_tokens, max_padding=self.forwards.max_padding)
        if known is None and self._fits(lengths):
            everything = list(range(len(lengths)))
            others = forwards.reference(sequences), forwards.tempered(sequences)
            device = self.forwards.policy.device

            def mix(found: Tensor) -> Tensor:
                policy = to_numpy(found)
                logps = LogProbs(policy, policy if others[0] is None else others[0], others[1])
                return torch.as_tensor(mixing(logps), device=device)

            self._scores(sequences, everything, mix, sink)
            return sink
        weights = torch.as_tensor(mixing(forwards.log_probs(sequences) if known is None else known))
        for part in parts:
            some = weights[:, part].to(forwards.policy.device)
            self._scores(sequences, part, _always(some), sink)
        return sink

    def _fits(self, lengths: list[int]) -> bool:
        return (
            len(lengths) * max(lengths) <= self.forwards.max_tokens
            and padding_share(lengths) <= self.forwards.max_padding
        )

    def _scores(self, sequences: Sequences, part: list[int], mix: Mix, sink: BlockRows) -> None:
        options = ScoreOptions(mix=mix, names=[sequences.names[i] for i in part])
        score_pass(self.forwards.policy.model, self.subset, self.forwards.batch(sequences, part), [sink], options)


def _always(weights: Tensor) -> Mix:
    return lambda _: weights
