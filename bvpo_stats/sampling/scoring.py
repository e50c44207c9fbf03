"""Re-scoring of completions by the policy itself: samplers' own log-probabilities are not trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import TokenSequence, length_batches
from bvpo_stats.model.head import token_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import batch_of
from bvpo_stats.progress import progress
from bvpo_stats.records import Completion
from bvpo_stats.store.jsonl import append_jsonl, mend, read_jsonl

LOGPROBS_FILE = "logprobs.jsonl"
_DECIMALS = 7  # of a nat: beyond float32's own precision at the size of one token's log-probability


def score_into(path: Path, completions: Sequence[Completion], policy: Policy, *, max_tokens: int | None = None) -> None:
    """Appends the per-token log-probabilities of every completion that has none on record yet.

    log pi(token | before) at temperature 1, log-softmax in float32 or better, whatever temperature the completion was
    sampled at. As in sampling, batches are planned from all completions and redone whole, so a resumed run gives the
    numbers of an uninterrupted one.

    Args:
        path: JSONL file of rows ``{"key": ..., "logprobs": [...]}``.
        completions: What to score.
        policy: Who scores.
        max_tokens: Padded tokens per batch; None for 8k on a CPU and 32k on an accelerator.

    Raises:
        UserError: A log-probability is NaN or infinite; the completion is named.
    """
    mend(path)
    finished = {key for key, _ in read_logprobs(path)} if path.exists() else set()
    sequences = [TokenSequence(c.prompt_ids, c.completion_ids) for c in completions]
    budget = max_tokens or (8_192 if policy.device.type == "cpu" else 32_768)
    batches = length_batches([len(sequence) for sequence in sequences], max_tokens=budget)
    with progress("Scoring", len(completions), "responses", done=len(finished)) as advance:
        for batch in batches:
            missing = [index for index in batch if completions[index].key not in finished]
            if not missing:
                continue
            values = _batch_logprobs([sequences[i] for i in batch], [completions[i].key for i in batch], policy)
            rows = dict(zip(batch, values, strict=True))
            append_jsonl(path, ({"key": completions[i].key, "logprobs": rows[i]} for i in missing))
            advance(len(missing))


@torch.inference_mode()
def _batch_logprobs(sequences: list[TokenSequence], names: list[str], policy: Policy) -> list[list[float]]:
    batch = batch_of(policy, sequences, [f"Response {name}" for name in names])
    logps = token_logprobs(policy.model, batch)
    rows = [row[mask].double().tolist() for row, mask in zip(logps.cpu(), batch.completion_mask.cpu(), strict=True)]
    for name, row in zip(names, rows, strict=True):
        if not all(map(_finite, row)):
            raise UserError(
                f"The model gives a NaN or infinite log-probability to response {name}. Check its weights, or load it "
                "in a wider type (`dtype='float32'`)."
            )
    return [[round(value, _DECIMALS) for value in row] for row in rows]


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def read_logprobs(path: Path) -> Iterator[tuple[str, list[float]]]:
    """Streams (completion key, per-token log-probabilities in nats)."""
    for _, row in read_jsonl(path):
        yield row["key"], row["logprobs"]
