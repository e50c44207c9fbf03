"""One pass over examples: g_t, g_e and the marginal gradient m of each, in batches of a token budget.

What is ever held is the model, one microbatch, and one vector for each gradient of the microbatch's examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.errors import check_kind
from bvpo_stats.gradients.engine import (
    BlockLayout,
    BlockRows,
    LogProbs,
    Passes,
    Planner,
    Row,
    RowRules,
    Sequences,
    sparse_rows,
    stored_log_probs,
)
from bvpo_stats.gradients.examples import Example, Joined, Unmatched, check_identity, join
from bvpo_stats.gradients.ladder import MarginalChoice, check_method, choose_marginal, reference_of
from bvpo_stats.gradients.marginal import SideDiagnostics
from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.reference import check_stored_log_probs, to_numpy
from bvpo_stats.model.batching import length_batches
from bvpo_stats.model.head import sequence_logprobs
from bvpo_stats.model.policy import Policy, as_policy
from bvpo_stats.model.scores import ScoreOptions, batch_of, check_alone, check_scores, score_pass
from bvpo_stats.model.subset import Probe, Subset, linear_subset, lora_subset, probe_subset
from bvpo_stats.progress import in_hand, progress
from bvpo_stats.records import TraceRecord
from bvpo_stats.sampling.layouts import all_pairs
from bvpo_stats.store.tables import Source, read_records

_CHECKED_SEQUENCES = 4  # of the first microbatch, whose scores are compared with autograd
_ROW_BYTES = 1 << 30  # memory for the gradients of one microbatch


@dataclass(frozen=True)
class GradientBatch:
    """Gradients of some prompts, one row each.

    Attributes:
        prompt_ids: Prompt of each row.
        keys: Example of each row.
        rows: Member (``t``, ``e``; ``m`` unless the method needs none; ``m1``, ``m2`` on request) to parameter block
            (decoder layer) to gradients ``[rows, parameters of the block]``, on the model's device.
        second: Block to g_t on a second, independent trace draw, for all rows or (None) for none of them.
        diagnostics: Trace weights of both sides of each row; empty where the method uses no bank.
    """

    prompt_ids: list[str]
    keys: list[str]
    rows: dict[str, dict[str, Float[Tensor, "rows parameters"]]]
    second: dict[str, Float[Tensor, "rows parameters"]] | None
    diagnostics: list[SideDiagnostics]

    @cached_property
    def vectors(self) -> dict[str, dict[str, Float[np.ndarray, "rows parameters"]]]:
        """``rows`` as arrays in main memory."""
        return {member: _arrays(blocks) for member, blocks in self.rows.items()}

    @cached_property
    def trace2(self) -> dict[str, Float[np.ndarray, "rows parameters"]] | None:
        """``second`` likewise."""
        return None if self.second is None else _arrays(self.second)


def _arrays(blocks: Mapping[str, Tensor]) -> dict[str, Float[np.ndarray, "rows parameters"]]:
    return {block: values.cpu().numpy() for block, values in blocks.items()}


def gradient_batches(
    policy: Policy,
    subset: Subset,
    examples: Sequence[Example],
    options: StreamOptions,
    done: Collection[str] = frozenset(),
    groups: Mapping[str, Hashable] | None = None,
) -> Iterator[GradientBatch]:
    """Streams the gradients of all examples, longest first; those of one prompt share a batch.

    An example's gradients do not depend on the batch it is in, up to rounding, and its batch not on what is done
    already. On the first batch captured scores are compared with autograd.

    Args:
        policy: The policy at theta, dropout off.
        subset: The parameters theta.
        examples: What `join` made of D_t, D_e and the trace bank.
        options: How. With the method ``auto`` the ladder decides first (see `choose_marginal`), on the given records;
            where it finds mu not estimable no m is formed. Processes that share the prompts should name the method.
        done: Prompts to leave out because an earlier run has them.
        groups: Prompt to its group, where groups shall come one after the other.

    Yields:
        Batches; every prompt is in exactly one of them.

    Raises:
        UserError: Records of another model or template, or whose stored log-probabilities are not the reference's; a
            method that the data or the objective rules out; NaN log-probabilities. The record is named.
        ScoreMismatchError: The captured scores are not autograd's.
    """
    if not options.allow_mismatch:
        check_identity(policy, examples)
    if options.reference == "record":
        check_stored_log_probs(policy, examples, options.checked_records)
    rules = row_rules(policy, examples, options)
    passes = Passes(reference_of(policy, options), subset, BlockLayout.of(subset))
    done, check = frozenset(done), True
    for members in _microbatches(examples, rules, passes, groups or {}):
        some = [examples[i] for i in members]
        if all(example.prompt_id in done for example in some):
            continue
        with in_hand(len({example.prompt_id for example in some})):
            found = list(_microbatch(some, rules, passes, done, check=check))
        check = False
        yield from found


def row_rules(policy: Policy, examples: Sequence[Example], options: StreamOptions) -> RowRules:
    """Which gradients are formed: the ladder decides for ``auto``; a method that is named is run as it is.

    Raises:
        UserError: A method that the data or the objective rules out.
    """
    method = options.method
    if method == "auto":
        choice = choose_marginal(policy, examples, options)
        method = choice.method if choice.estimable else "none"
    else:
        check_method(policy, examples, options)
    return RowRules(
        objective=options.objective,
        method=method,
        at_reference=policy.at_reference,
        traces_per_answer=options.traces_per_answer,
        second_traces=options.second_traces,
        half_splits=options.half_splits,
        seed=options.seed,
    )


def _microbatches(
    examples: Sequence[Example], rules: RowRules, passes: Passes, groups: Mapping[str, Hashable]
) -> Iterator[list[int]]:
    """Examples whose gradients are formed together, longest first: as many as the budget of tokens holds.

    Groups follow each other, that of the longest example first, and may meet in one microbatch.

    The moments need all examples of a prompt in one batch, so a prompt is not split. Sequences need not share a
    rectangle (`Passes.run` sorts them by length), so padding is no concern here; the memory for the gradients is.
    """
    per_prompt = (len(rules.members) + 1) * passes.layout.size * np.dtype(passes.layout.dtype).itemsize
    most = max(1, _ROW_BYTES // per_prompt)
    prompts: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        prompts.setdefault(example.prompt_id, []).append(number)
    units = []
    for members in prompts.values():
        planner = Planner(rules)
        for number in members:
            planner.add(examples[number])
        units.append((members, [len(sequence) for sequence in planner.sequences().sequences]))
    batch: list[int] = []
    tokens = 0
    longest: dict[Hashable, tuple[int, list[int]]] = {}  # of each group: where it stands
    where = [groups.get(examples[members[0]].prompt_id) for members, _ in units]
    for group, (members, lengths) in zip(where, units, strict=True):
        longest[group] = min(longest.get(group, (1, members)), (-max(lengths), members))
    order = sorted(range(len(units)), key=lambda i: (longest[where[i]], -max(units[i][1]), units[i][0]))
    for members, lengths in (units[i] for i in order):
        if batch and (len(batch) + len(members) > most or tokens + sum(lengths) > passes.reference.max_tokens):
            yield batch
            batch, tokens = [], 0
        batch += members
        tokens += sum(lengths)
    if batch:
        yield batch


def _microbatch(
    examples: Sequence[Example], rules: RowRules, passes: Passes, done: frozenset[str], *, check: bool
) -> Iterator[GradientBatch]:
    reference, planner = passes.reference, Planner(rules)
    plans = [planner.add(example) for example in examples]
    sequences = planner.sequences()
    if check:
        shortest = sorted(range(len(sequences.sequences)), key=lambda i: len(sequences.sequences[i]))
        few = shortest[:_CHECKED_SEQUENCES]
        batch = batch_of(reference.policy, [sequences.sequences[i] for i in few], [sequences.names[i] for i in few])
        check_scores(reference.policy.model, passes.subset, batch)
        check_alone(reference.policy, sequences.sequences)
    # A member's rows lie together, so that they can be given out without a copy.
    places: list[tuple[int, str]] = [
        (number, member)
        for member in (*rules.members, "t2")
        for number, plan in enumerate(plans)
        if member != "t2" or plan.second is not None
    ]
    diagnostics: list[list[SideDiagnostics]] = []

    def mixing(logps: LogProbs) -> list[Row]:
        rows, found = sparse_rows(plans, logps, sequences, rules)
        diagnostics.extend(found)
        return [rows[number][member] for number, member in places]

    unknown = np.isnan(sequences.stored) & ~np.isnan(sequences.temperature)
    known = None
    if not rules.weights_need_model and reference.stored and not unknown.any():
        known = stored_log_probs(reference, sequences)
    gradients = BlockRows(passes.layout, len(places), reference.policy.device)
    passes.run(sequences, mixing, gradients, known)
    row_of = {place: row for row, place in enumerate(places)}
    lacking = {plan.example.prompt_id for plan in plans if plan.second is None}
    for has_second in (True, False):  # prompts whose examples all have a second trace draw, and the others
        some = [
            number
            for number, plan in enumerate(plans)
            if (plan.example.prompt_id in lacking) != has_second and plan.example.prompt_id not in done
        ]
        if some:
            yield GradientBatch(
                prompt_ids=[plans[number].example.prompt_id for number in some],
                keys=[plans[number].example.key for number in some],
                rows={m: gradients.take([row_of[number, m] for number in some]) for m in rules.members},
                second=gradients.take([row_of[number, "t2"] for number in some]) if has_second else None,
                diagnostics=[found for number in some for found in diagnostics[number]],
            )


@dataclass(frozen=True)
class PairGradients:
    """Gradients of examples, all in memory.

    Attributes:
        t: g_t of every example, ``[examples, parameters]``, in float32 (float64 for a float64 policy).
        e: g_e of the same examples.
        m: Their marginal gradients; None where the ladder found that none are needed (mu = E g_t) or can be had.
        prompt_ids: Prompt of each row: the cluster of every statistic.
        blocks: Decoder layer to its columns, for per-layer weights.
        marginal: The rung of the ladder, and why.
    """

    t: Float[np.ndarray, "examples parameters"]
    e: Float[np.ndarray, "examples parameters"]
    m: Float[np.ndarray, "examples parameters"] | None
    prompt_ids: tuple[str, ...]
    blocks: dict[str, slice]
    marginal: MarginalChoice


def pair_gradients(
    policy: Policy,
    pairs: Source | Joined,
    traces: Iterable[TraceRecord] = (),
    *,
    objective: Objective | None = None,
    theta: str = "lora",
    probe_rank: int = 8,
    subset: Subset | None = None,
    unmatched: Unmatched = "drop",
    options: StreamOptions | None = None,
) -> PairGradients:
    """g_t, g_e and, where it is needed and can be had, the marginal gradient m of every example, as matrices.

    Memory is ``3 * examples * parameters`` numbers; `gradient_batches` streams the same gradients.

    Args:
        policy: The policy at theta, dropout off (`bvpo_stats.model.policy.load_policy`).
        pairs: D_t and D_e together, told apart by their ``mode``, in any layout that `alpha_star` takes; or what `join`
            made of them.
        traces: Trace bank of the D_t pairs, where theta is not theta_ref.
        objective: The loss; None for that of ``options`` (DPO with beta 0.1).
        theta: ``lora`` for the policy's LoRA adapter; ``probe`` for every Linear weight of the model, each gradient
            times a Gaussian A' drawn by ``options.seed``: inner products keep their mean; else a pattern of layers.
        probe_rank: Rows of A.
        subset: The parameters theta; None for what ``theta`` says.
        unmatched: What to do about pairs without a partner in the other set: ``drop`` or ``error``.
        options: Estimator of m, budgets, where log pi_ref comes from.

    Returns:
        Rows in the order of D_t.

    Raises:
        UserError: A policy without an adapter where no ``subset`` is given; and as in `join` and `gradient_batches`.

    Example:
        >>> from bvpo_stats.statistics import alpha_from_gradients
        >>> g = pair_gradients(policy, pairs)  # doctest: +SKIP
        >>> print(alpha_from_gradients(g.t, g.e, g.m, batch_size=128, clusters=g.prompt_ids))  # doctest: +SKIP
    """
    policy = as_policy(policy)
    options = StreamOptions() if options is None else options
    check_kind("options", options, StreamOptions, "StreamOptions")
    if objective is not None:
        options = replace(options, objective=objective)
    if subset is None and theta == "probe":
        subset = probe_subset(policy.model, Probe(probe_rank, options.seed))
    elif subset is None and theta != "lora":
        subset = linear_subset(policy.model, [theta])
    subset = lora_subset(policy.model) if subset is None else subset
    check_kind("subset", subset, Subset, "a Subset")
    if not isinstance(pairs, Joined):
        bank = read_records(traces, TraceRecord, name="traces", vocabulary=policy.template.vocabulary)
        pairs = join(all_pairs(pairs, None, policy.template), bank, unmatched=unmatched)
    examples = pairs.examples
    choice = MarginalChoice("none", "asked for", "No marginal gradient was asked for.", False)
    if options.method != "none":
        choice = choose_marginal(policy, examples, options)
    layout = BlockLayout.of(subset)
    ends = np.cumsum([0, *layout.sizes.values()]).tolist()
    blocks = {block: slice(*bounds) for block, bounds in zip(layout.sizes, itertools.pairwise(ends), strict=True)}
    row_of = {example.key: row for row, example in enumerate(examples)}
    found: dict[str, Float[np.ndarray, "examples parameters"]] = {}
    for batch in gradient_batches(
        policy, subset, examples, replace(options, method=choice.method, second_traces=False)
    ):
        rows = [row_of[key] for key in batch.keys]
        for member, vectors in batch.vectors.items():
            if member not in found:
                found[member] = np.empty((len(examples), layout.size), dtype=layout.dtype)
            for block, values in vectors.items():
                found[member][rows, blocks[block]] = values
    m = found.get("m") if choice.estimable else None
    prompt_ids = tuple(example.prompt_id for example in examples)
    return PairGradients(found["t"], found["e"], m, prompt_ids, blocks, choice)


PROJECTED_PROMPTS = 256
"""Most prompts, spread evenly, whose scores are projected: the bound needs variances, not means."""


@dataclass(frozen=True)
class TraceSides:
    """Chosen and rejected response of some D_t pairs, at most `PROJECTED_PROMPTS`, spread evenly.

    Attributes:
        prompt_ids: Prompt of each pair.
        logps: log pi_theta, in nats.
        references: log pi_ref; log pi_theta where theta is theta_ref or the loss has no reference.
        tokens: Lengths of the responses.
        projections: Scores along each direction.
    """

    prompt_ids: tuple[str, ...]
    logps: Float[np.ndarray, "pairs 2"]
    references: Float[np.ndarray, "pairs 2"]
    tokens: Float[np.ndarray, "pairs 2"]
    projections: Float[np.ndarray, "pairs 2 directions"]

    @property
    def log_ratios(self) -> Float[np.ndarray, "pairs 2"]:
        """Log pi_theta / pi_ref, in nats; 0 where there is no reference."""
        return self.logps - self.references

    def slopes(self, objective: Objective) -> Float[np.ndarray, "pairs directions"]:
        """``sqrt(l''(z)) dz`` along each direction, z what the loss is a function of: squares are Gauss-Newton's.

        z rises with the chosen log-probability and falls with the rejected one, in every loss here.
        """
        chosen, rejected = (self._moved(objective, side) for side in (0, 1))
        return chosen[:, None] * self.projections[:, 0] - rejected[:, None] * self.projections[:, 1]

    def _moved(self, objective: Objective, side: int) -> Float[np.ndarray, " pairs"]:
        """``sqrt(l''(z)) |dz|`` of one nat more for a response, by a step that is small beside 1 / beta."""
        step = 1e-4 / max(objective.beta, 1.0)

        def at(move: float) -> PairLogps[Any]:
            logps = self.logps.copy()
            logps[:, side] += move
            return PairLogps(*logps.T, *self.tokens.T, *self.references.T)

        curved = objective.curvature(at(-step / 2), at(step / 2)) / step**2
        return np.sqrt(np.maximum(curved, 0.0))


class Along:
    """A sink: every row's inner products with some vectors, in float64."""

    def __init__(
        self, layout: BlockLayout, directions: Mapping[str, Float[np.ndarray, "directions parameters"]]
    ) -> None:
        self._layout = layout
        self._directions = directions
        self.products: Tensor | float = 0.0

    def __call__(self, name: str, scores: Float[Tensor, "rows ..."]) -> None:
        """Adds one weight's part."""
        block, offset, size = self._layout.places[name]
        part = torch.as_tensor(self._directions[block][:, offset : offset + size], device=scores.device)
        self.products = self.products + scores.flatten(1).double() @ part.double().T


def project_sides(
    policy: Policy,
    subset: Subset,
    examples: Sequence[Example],
    directions: Mapping[str, Float[np.ndarray, "directions parameters"]],
    options: StreamOptions,
    said: str = "Bounding g_t's bias",
) -> TraceSides:
    """Log-probabilities and scores along some directions of both responses of D_t pairs, one backward per batch.

    Args:
        policy: The policy at theta.
        subset: The parameters theta.
        examples: What `join` made of D_t and D_e.
        directions: Parameter block to its part of the vectors.
        options: Loss and budgets.
        said: What it is for, on the progress bar.

    Raises:
        UserError: As in :func:`~bvpo_stats.gradients.stream.gradient_batches`.
    """
    places = np.unique(np.linspace(0, len(examples) - 1, min(PROJECTED_PROMPTS, len(examples))).round().astype(int))
    some = [examples[place] for place in places]
    sequences = _sides(some, options)
    layout, n_directions = BlockLayout.of(subset), len(next(iter(directions.values())))
    reference = reference_of(policy, options).of_sequences(sequences.sequences, sequences.names, sequences.stored)
    count = len(sequences.sequences)
    logps, projections = np.zeros(count), np.zeros((count, n_directions))
    lengths = [len(sequence) for sequence in sequences.sequences]
    with progress(said, count, "responses") as advance:
        for part in length_batches(lengths, max_tokens=options.max_tokens, max_padding=options.max_padding):
            sink = Along(layout, directions)
            names = [sequences.names[i] for i in part]
            batch = batch_of(policy, [sequences.sequences[i] for i in part], names)
            found = score_pass(policy.model, subset, batch, [sink], ScoreOptions(names=names))
            logps[part] = to_numpy(sequence_logprobs(found))
            projections[part] = torch.as_tensor(sink.products).cpu().numpy()
            advance(len(part))
    return TraceSides(
        tuple(example.prompt_id for example in some),
        logps.reshape(-1, 2),
        (logps if reference is None else np.asarray(reference)).reshape(-1, 2),
        np.array([float(len(sequence.completion_ids)) for sequence in sequences.sequences]).reshape(-1, 2),
        projections.reshape(-1, 2, n_directions),
    )


def _sides(examples: Sequence[Example], options: StreamOptions) -> Sequences:
    """Both D_t responses of every example, chosen and rejected in turn."""
    planner = Planner(RowRules(options.objective, "none", at_reference=False, second_traces=False))
    rows = [row for example in examples for row in planner.add(example).trace]
    every = planner.sequences()
    return Sequences(
        [every.sequences[row] for row in rows],
        [every.names[row] for row in rows],
        every.stored[rows],
        every.temperature[rows],
    )
