"""The estimators g_t and g_e: preference gradients per pair or per prompt, streamed from records.

    g = chosen_weight * s(chosen) + rejected_weight * s(rejected)          (DPO: weights -+ beta sigmoid(-m))

g_t takes the pairs in ``thinking`` mode (D_t), g_e those in ``nothinking`` mode (D_e). The weights depend on the pair's
log-probabilities, which the forward pass knows before backward begins, so one forward and one backward give the
gradients; sinks receive them weight by weight and nothing of a pair is kept after its microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective, PairLogps, PairTerms
from bvpo_stats.model.batching import Batch, TokenSequence, check_sequence, collate, length_batches
from bvpo_stats.model.head import causal_lm_of, sequence_logprobs
from bvpo_stats.model.scores import ScoreOptions, check_scores, log_probabilities, score_pass
from bvpo_stats.model.sinks import Keep, Sink
from bvpo_stats.model.subset import Subset
from bvpo_stats.records import MODES, Mode, PreferencePair

ReferenceSource = Literal["adapter", "record", "policy"]
RowUnit = Literal["pair", "prompt"]


@dataclass(frozen=True)
class GradientOptions:
    """How pairs become gradients.

    Attributes:
        objective: The loss.
        reference: Where log pi_ref comes from: ``adapter`` (the model with its adapter disabled), ``record`` (the
            pair's stored values, which must come from the same dtype and code path), or ``policy`` (theta = theta_ref:
            all margins are 0 and no reference pass is made).
        rows: One gradient per ``pair``, or per ``prompt`` and mode (the mean over the prompt's pairs).
        max_tokens: Budget of padded tokens per forward.
        max_padding: Largest share of padding. A microbatch whose sequences differ more in length is run in several
            forwards, and its scores are kept until the last; otherwise only one weight's scores are alive.
        check: Compares the scores of the shortest pair with autograd's gradient before the run.
    """

    objective: Objective = field(default_factory=Objective)
    reference: ReferenceSource = "adapter"
    rows: RowUnit = "pair"
    max_tokens: int = 16_384
    max_padding: float = 0.05
    check: bool = True


@dataclass(frozen=True)
class GradientRow:
    """What one row of gradients is of.

    Attributes:
        prompt_id: The prompt: the cluster of every statistic.
        mode: ``thinking`` (g_t) or ``nothinking`` (g_e).
        pairs: Indices of the averaged pairs in the caller's list.
    """

    prompt_id: str
    mode: Mode
    pairs: tuple[int, ...]


@dataclass(frozen=True)
class PairResult:
    """Scalars of one microbatch, beside the gradients that its sinks received.

    Attributes:
        rows: The rows of the gradients.
        pairs: Indices of the microbatch's pairs in the caller's list; the order of the scalars.
        logps: Log-probabilities of policy and reference.
        terms: Loss, score weights and rewards.
    """

    rows: tuple[GradientRow, ...]
    pairs: tuple[int, ...]
    logps: PairLogps
    terms: PairTerms


MakeSinks = Callable[[tuple[GradientRow, ...]], Sequence[Sink]]


def stream_pair_gradients(
    model: nn.Module,
    subset: Subset,
    pairs: Sequence[PreferencePair],
    make_sinks: MakeSinks,
    options: GradientOptions | None = None,
) -> Iterator[PairResult]:
    """Hands every pair's (or prompt's) gradient to sinks, one microbatch at a time; memory is flat in the pairs.

    All pairs of a prompt, both modes included, share a microbatch, so that a sink sees g_t and g_e of a prompt side by
    side and can form their inner products weight by weight.

    Args:
        model: The policy, dropout off.
        subset: The parameters theta.
        pairs: The records, in any order.
        make_sinks: Called with a microbatch's rows before its backward; returns the sinks, which then receive
            ``(name, gradients [rows, *weight shape])`` once per weight.
        options: How.

    Yields:
        The scalars of each microbatch, after its sinks have received everything.

    Raises:
        UserError: No pairs; an empty or too long sequence; missing reference values; NaN or infinite log-probabilities.
            The pair is named.
        ScoreMismatchError: The check failed: this model is not supported.
    """
    options = options or GradientOptions()
    if not pairs:
        raise UserError("There are no preference pairs; give at least one record.")
    sequences, names = pair_sequences(pairs)
    limit = getattr(causal_lm_of(model).config, "max_position_embeddings", None)
    for sequence, name in zip(sequences, names, strict=True):
        check_sequence(sequence, name, limit)
    _check_reference(model, pairs, options)
    prompts = [pair.prompt_id for pair in pairs for _ in range(2)]
    lengths = [len(sequence) for sequence in sequences]
    if options.check:
        shortest = min(range(len(pairs)), key=lambda i: lengths[2 * i] + lengths[2 * i + 1])
        device = next(model.parameters()).device
        check_scores(model, subset, collate(sequences[2 * shortest : 2 * shortest + 2], device=device))
    for members in length_batches(lengths, max_tokens=options.max_tokens, groups=prompts):
        chosen = sorted({index // 2 for index in members})
        micro = _Microbatch(model, subset, [pairs[i] for i in chosen], chosen, options)
        rows = _rows(micro.pairs, chosen, options.rows)
        yield micro.run(rows, make_sinks(rows))


def pair_gradients(
    model: nn.Module, subset: Subset, pairs: Sequence[PreferencePair], options: GradientOptions | None = None
) -> tuple[tuple[GradientRow, ...], Float[Tensor, "rows parameters"]]:
    """All gradients as one matrix: rows x parameters numbers of memory. For small populations and tests.

    Args:
        model: The policy, dropout off.
        subset: The parameters theta; their order is the order of the columns.
        pairs: The records.
        options: How.

    Returns:
        The rows, in the order of their first pair, and their gradients.

    Raises:
        UserError: As in :func:`stream_pair_gradients`.
    """
    kept: list[tuple[tuple[GradientRow, ...], Keep]] = []

    def make_sinks(rows: tuple[GradientRow, ...]) -> Sequence[Sink]:
        kept.append((rows, Keep()))
        return [kept[-1][1]]

    for _ in stream_pair_gradients(model, subset, pairs, make_sinks, options):
        pass
    found = [
        (row, vector) for rows, keep in kept for row, vector in zip(rows, keep.flat(subset, len(rows)), strict=True)
    ]
    found.sort(key=lambda item: item[0].pairs)
    return tuple(row for row, _ in found), torch.stack([vector for _, vector in found])


def pair_sequences(pairs: Sequence[PreferencePair]) -> tuple[list[TokenSequence], list[str]]:
    """Token sequences of pairs, chosen and rejected in turn, and how errors name them.

    Args:
        pairs: The records.
    """
    sequences, names = [], []
    for pair in pairs:
        for side, completion in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            sequences.append(TokenSequence(tuple(pair.prompt_ids), tuple(completion)))
            names.append(f"pair {pair.prompt_id} ({pair.mode}, {side})")
    return sequences, names


def _check_reference(model: nn.Module, pairs: Sequence[PreferencePair], options: GradientOptions) -> None:
    if not options.objective.needs_reference:
        return
    if options.reference == "adapter" and not hasattr(model, "disable_adapter"):
        raise UserError(
            "The reference is the model with its adapter disabled, but the model has no adapter; store reference "
            "log-probabilities in the records and use reference='record', or reference='policy' at theta = theta_ref."
        )
    if options.reference == "record":
        for pair in pairs:
            if pair.ref_chosen_logps is None or pair.ref_rejected_logps is None:
                raise UserError(
                    f"pair {pair.prompt_id} ({pair.mode}): no stored reference log-probabilities "
                    "(ref_chosen_logps, ref_rejected_logps); use reference='adapter'."
                )


def _rows(pairs: Sequence[PreferencePair], indices: Sequence[int], unit: RowUnit) -> tuple[GradientRow, ...]:
    if unit == "pair":
        return tuple(GradientRow(p.prompt_id, p.mode, (i,)) for p, i in zip(pairs, indices, strict=True))
    members: dict[tuple[str, Mode], list[int]] = {}
    for pair, index in zip(pairs, indices, strict=True):
        members.setdefault((pair.prompt_id, pair.mode), []).append(index)
    ordered = sorted(members.items(), key=lambda item: (item[1][0], MODES.index(item[0][1])))
    return tuple(GradientRow(prompt, mode, tuple(found)) for (prompt, mode), found in ordered)


@dataclass(frozen=True)
class _Microbatch:
    """Some prompts' pairs on the way through the model."""

    model: nn.Module
    subset: Subset
    pairs: Sequence[PreferencePair]
    indices: Sequence[int]
    options: GradientOptions

    def run(self, rows: tuple[GradientRow, ...], sinks: Sequence[Sink]) -> PairResult:
        sequences, names = pair_sequences(self.pairs)
        device = next(self.model.parameters()).device
        parts = length_batches(
            [len(sequence) for sequence in sequences],
            max_tokens=self.options.max_tokens,
            max_padding=self.options.max_padding,
        )
        batches = [collate([sequences[i] for i in part], device=device) for part in parts]
        part_names = [[names[i] for i in part] for part in parts]
        order = torch.tensor([index for part in parts for index in part], device=device)
        reference = self._reference_logps(order, batches, part_names)
        computed: list[tuple[PairLogps, PairTerms]] = []

        def mix(found: Tensor) -> Tensor:
            policy = _scatter(found, order)
            logps = self._pair_logps(policy, policy if self.options.reference == "policy" else reference)
            computed.append((logps, self.options.objective(logps)))
            return self._mixing(rows, computed[-1][1])[:, order]

        if len(parts) == 1:
            score_pass(self.model, self.subset, batches[0], sinks, ScoreOptions(mix=mix, names=part_names[0]))
        else:
            self._in_parts(batches, part_names, mix, sinks)
        return PairResult(rows, tuple(self.indices), *computed[0])

    def _in_parts(
        self,
        batches: list[Batch],
        names: list[list[str]],
        mix: Callable[[Tensor], Tensor],
        sinks: Sequence[Sink],
    ) -> None:
        """Several forwards for one microbatch: keeps the scores, then combines them weight by weight."""
        keeps = [Keep() for _ in batches]
        found = [
            sequence_logprobs(score_pass(self.model, self.subset, batch, [keep], ScoreOptions(names=part_names)))
            for batch, keep, part_names in zip(batches, keeps, names, strict=True)
        ]
        weights = mix(torch.cat(found))
        for name in self.subset.parameters:
            if name in keeps[0].scores:
                scores = torch.cat([keep.scores.pop(name) for keep in keeps])
                mixed = weights.to(scores.dtype) @ scores.flatten(1)
                for sink in sinks:
                    sink(name, mixed.unflatten(1, scores.shape[1:]))

    def _reference_logps(
        self, order: Tensor, batches: list[Batch], names: list[list[str]]
    ) -> Float[Tensor, " sequences"] | None:
        """Reference log-probabilities of the sequences, chosen and rejected in turn; None where not used."""
        if not self.options.objective.needs_reference or self.options.reference == "policy":
            return None
        if self.options.reference == "record":
            stored = [value for pair in self.pairs for value in (pair.ref_chosen_logps, pair.ref_rejected_logps)]
            return torch.tensor(stored, dtype=torch.float64, device=batches[0].input_ids.device)
        model: Any = self.model
        with model.disable_adapter():
            found = [
                sequence_logprobs(log_probabilities(model, batch, names=part_names))
                for batch, part_names in zip(batches, names, strict=True)
            ]
        return _scatter(torch.cat(found), order)

    def _pair_logps(self, policy: Tensor, reference: Tensor | None) -> PairLogps:
        tokens = [float(n) for pair in self.pairs for n in (len(pair.chosen_ids), len(pair.rejected_ids))]
        counts = torch.tensor(tokens, dtype=policy.dtype, device=policy.device)
        contrast = (None, None) if reference is None else (reference[0::2], reference[1::2])
        return PairLogps(policy[0::2], policy[1::2], counts[0::2], counts[1::2], *contrast)

    def _mixing(self, rows: tuple[GradientRow, ...], terms: PairTerms) -> Float[Tensor, "rows sequences"]:
        """Row by row, the weight of every sequence's score: the mean over the row's pairs."""
        place = {index: position for position, index in enumerate(self.indices)}
        mixing = terms.loss.new_zeros(len(rows), 2 * len(self.pairs))
        for number, row in enumerate(rows):
            for index in row.pairs:
                mixing[number, 2 * place[index]] = terms.chosen_weight[place[index]] / len(row.pairs)
                mixing[number, 2 * place[index] + 1] = terms.rejected_weight[place[index]] / len(row.pairs)
        return mixing


def _scatter(values: Tensor, order: Tensor) -> Tensor:
    """Undoes a reordering: result[order[i]] = values[i]."""
    return torch.empty_like(values).scatter_(0, order, values)
