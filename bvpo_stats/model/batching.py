"""Token sequences in, padded batches out: token-budget batching by length with a bound on padding."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bvpo_stats.errors import UserError


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and one completion as exact token ids; only completion tokens are scored.

    Attributes:
        prompt_ids: Token ids the policy was conditioned on.
        completion_ids: Token ids it wrote.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Batch:
    """Right-padded token sequences. *Targets* are the tokens 1 .. tokens-1, each predicted from the one before.

    Padding sits on the right of a causal model, so no real token ever attends to it: the model is run without an
    attention mask (which keeps the fast attention kernels) and padding carries exactly zero gradient.

    Attributes:
        input_ids: Token ids.
        attention_mask: 1 on real tokens, 0 on padding.
        position_ids: 0, 1, 2, ... in every row.
        completion_mask: True where target j, i.e. token j + 1, is a completion token.
    """

    input_ids: Int[Tensor, "sequences tokens"]
    attention_mask: Int[Tensor, "sequences tokens"]
    position_ids: Int[Tensor, "sequences tokens"]
    completion_mask: Bool[Tensor, "sequences targets"]

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.completion_mask.to(device),
        )


def collate(
    sequences: Sequence[TokenSequence],
    *,
    pad_id: int = 0,
    max_positions: int | None = None,
    positions_end: str = "",
    names: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """Pads sequences on the right into one batch.

    Args:
        sequences: What to score, in the order of the rows.
        pad_id: Any word of the vocabulary; its value cannot change a result.
        max_positions: Longest sequence the model has positions for; None for no limit.
        positions_end: Why they end there, for the error.
        names: How to name the records in errors; their index where not given.
        device: Where the tensors go.

    Raises:
        UserError: No sequences, an empty prompt or completion, or a sequence longer than ``max_positions``.
    """
    if not sequences:
        raise UserError("There are no sequences to score; give at least one record.")
    for index, sequence in enumerate(sequences):
        check_sequence(sequence, _name(index, names), max_positions, positions_end)
    width = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    completion_mask = torch.zeros((len(sequences), width - 1), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        end, start = len(sequence), len(sequence.prompt_ids)
        input_ids[row, :end] = torch.tensor(sequence.prompt_ids + sequence.completion_ids, dtype=torch.long)
        attention_mask[row, :end] = 1
        completion_mask[row, start - 1 : end - 1] = True
    position_ids = torch.arange(width).expand(len(sequences), width).contiguous()
    return Batch(input_ids, attention_mask, position_ids, completion_mask).to(device)


def check_sequence(
    sequence: TokenSequence, name: str, max_positions: int | None = None, positions_end: str = ""
) -> None:
    """Refuses what cannot be scored.

    Args:
        sequence: The sequence.
        name: How the error names it, e.g. ``record 3`` or ``pair p17 (chosen)``.
        max_positions: Longest sequence the model has positions for; None for no limit.
        positions_end: Why they end there.

    Raises:
        UserError: Empty prompt, empty completion, or longer than the model's positions.
    """
    if not sequence.completion_ids:
        raise UserError(f"{name}: the completion is empty, so it has no log-probability; remove the record.")
    if not sequence.prompt_ids:
        raise UserError(f"{name}: the prompt is empty, so its first token has no log-probability; add a BOS token.")
    if max_positions is not None and len(sequence) > max_positions:
        raise UserError(
            f"{name}: {len(sequence)} tokens, but the model has positions for {max_positions}"
            f"{f' ({positions_end})' if positions_end else ''}; leave the record out, or sample with a smaller limit "
            "on new tokens."
        )


def length_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    max_sequences: int | None = None,
    groups: Sequence[Hashable] | None = None,
    max_padding: float = 0.05,
) -> list[list[int]]:
    """Splits sequences into batches of similar length under a budget of padded tokens. Deterministic, longest first.

    A batch is closed when the next sequence would exceed the token budget, the number of sequences, or the bound on
    padding: 1 - sum(lengths) / (sequences * longest) <= ``max_padding`` holds in every batch and so in total.
    Sequences of one group always share a batch; a group whose own lengths differ more than the bound allows makes the
    bound give way to the group's own padding, and no further. (Split such a batch again without ``groups`` where the
    rows need not share a rectangle.)

    Args:
        lengths: Tokens per sequence.
        max_tokens: Budget of tokens per batch, padding included. A sequence or group over it gets a batch of its own.
        max_sequences: Most sequences per batch.
        groups: A key per sequence; equal keys stay together (the chosen and the rejected response of a pair).
        max_padding: Largest share of padding among a batch's tokens.

    Returns:
        Indices into ``lengths``, one list per batch.

    >>> length_batches([8, 98, 100, 11], max_tokens=1000)
    [[2, 1], [3], [0]]
    >>> length_batches([8, 98, 100, 11], max_tokens=1000, groups=["a", "b", "b", "a"], max_padding=0.1)
    [[1, 2], [0, 3]]
    """
    units: dict[Hashable, list[int]] = {}
    for index in range(len(lengths)):
        units.setdefault(index if groups is None else groups[index], []).append(index)
    ordered = sorted(units.values(), key=lambda unit: (-max(lengths[i] for i in unit), unit))

    batches: list[list[int]] = []
    for unit in ordered:
        joined = [*batches[-1], *unit] if batches else []
        bound = max(max_padding, padding_share([lengths[i] for i in unit]))
        if batches:
            bound = max(bound, padding_share([lengths[i] for i in batches[-1]]))
        if joined and (
            len(joined) * max(lengths[i] for i in joined) <= max_tokens
            and (max_sequences is None or len(joined) <= max_sequences)
            and padding_share([lengths[i] for i in joined]) <= bound
        ):
            batches[-1] = joined
        else:
            batches.append(unit)
    return batches


def padding_share(lengths: Sequence[int]) -> float:
    """Share of padding among the tokens of one padded batch: 1 - sum(lengths) / (sequences * longest)."""
    return 1.0 - sum(lengths) / (len(lengths) * max(lengths))


def _name(index: int, names: Sequence[str] | None) -> str:
    return f"record {index}" if names is None else names[index]
