"""Re-scoring of completions by the policy itself, and how far the policy is from the sampler that drew them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import TokenSequence, length_batches
from bvpo_stats.model.head import token_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import batch_of, completion_logprobs
from bvpo_stats.progress import progress
from bvpo_stats.records import Completion, PreferencePair
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


RATIO_PAIRS = 256
"""Most pairs, spread evenly, whose responses are compared with their sampler."""
FEWEST_EFFECTIVE = 0.8
"""Effective share of the responses below which a report says that the policy is not their sampler."""


@dataclass(frozen=True)
class SamplerRatio:
    """w = pi(policy) / q(sampler) over responses of D_t: whether the policy is what drew them.

    pi is the policy's at the temperature of the draw, so that w = 1 wherever policy and sampler are one model in one
    arithmetic: mu = E g_t, and every weight of a trace, takes that for granted.

    Attributes:
        responses: Responses compared.
        unknown: Responses whose q, or temperature, nucleus or top-k, is not on record or not that of plain sampling.
        mean: Mean of w; 1 in expectation under q. None without responses, or where it is beyond all numbers.
        spread: Standard deviation of log w, in nats.
        effective: Effective sample size as a share of the responses, ``(sum w)^2 / (n sum w^2)``.
    """

    responses: int
    unknown: int
    mean: float | None = None
    spread: float | None = None
    effective: float | None = None

    @classmethod
    def of(cls, log_ratios: Float[np.ndarray, " responses"], unknown: int = 0) -> SamplerRatio:
        """From log w of each response.

        >>> SamplerRatio.of(np.log([0.5, 1.5]))
        SamplerRatio(responses=2, unknown=0, mean=1.0, spread=0.54931, effective=0.8)
        """
        if not len(log_ratios):
            return cls(0, unknown)
        top = float(log_ratios.max())
        weights = np.exp(log_ratios - top)
        log_mean = top + float(np.log(weights.mean()))
        return cls(
            responses=len(log_ratios),
            unknown=unknown,
            mean=round(float(np.exp(log_mean)), _DIGITS) if log_mean < _LARGEST else None,
            spread=round(float(log_ratios.std()), _DIGITS),
            effective=round(float(weights.sum() ** 2 / (len(weights) * (weights**2).sum())), _DIGITS),
        )

    @property
    def words(self) -> str:
        """What is known, in a sentence."""
        if self.effective is None:
            return (
                "pi(policy) / q(sampler) is not known: the pairs do not hold with which probability their responses "
                "were drawn."
            )
        mean = "beyond all numbers" if self.mean is None else f"{self.mean:.3g}"
        rest = f"; {self.unknown} more are not known" if self.unknown else ""
        return (
            f"pi(policy) / q(sampler) over {self.responses} responses of D_t: mean {mean}, spread of its log "
            f"{self.spread:.2g} nats, effective sample size {self.effective:.0%}{rest}."
        )

    @property
    def cautions(self) -> list[str]:
        """What a reader should worry about."""
        if self.effective is None or self.effective >= FEWEST_EFFECTIVE:
            return []
        return [
            f"The policy is not the sampler: of {self.responses} responses {self.effective:.0%} count (effective "
            f"size of pi(policy) / q(sampler), below {FEWEST_EFFECTIVE:.0%}), and mu = E g_t takes both as one. "
            "Other weights, another precision or an engine's own arithmetic do that: sample again with the policy as "
            "it is scored here (`dtype`), or with `engine='transformers'` of `sample`."
        ]


_LARGEST = 700.0  # logarithm of the largest float
_DIGITS = 5  # of w: what lies behind them is rounding of the logits


def sampler_ratio(
    policy: Policy, pairs: Iterable[PreferencePair], *, reference: bool = False, max_tokens: int = 16_384
) -> SamplerRatio:
    """Compares the policy with the sampler of D_t pairs.

    Args:
        policy: The policy.
        pairs: The pairs; those of D_e do not count. At most :data:`RATIO_PAIRS` are scored, where log pi is not stored.
        reference: Compare its reference, with an adapter disabled.
        max_tokens: Padded tokens per forward.

    Raises:
        UserError: A log-probability is not finite; the pair is named.
    """
    known: list[PreferencePair] = []
    unknown = 0
    for pair in pairs:
        if pair.mode == "thinking":
            if _drawn_plainly(pair):
                known.append(pair)
            else:
                unknown += 2
    if not known:
        return SamplerRatio(0, unknown)
    places = np.unique(np.linspace(0, len(known) - 1, min(RATIO_PAIRS, len(known))).round().astype(int))
    some = [known[place] for place in places]
    with policy.reference() if reference else nullcontext():
        found = [_log_ratios(policy, alike, max_tokens) for alike in _by_law(some)]
    return SamplerRatio.of(np.concatenate(found), unknown)


def _drawn_plainly(pair: PreferencePair) -> bool:
    """Whether log q of both responses is known, and is that of the model at a temperature."""
    given = (pair.sampler_chosen_logps, pair.sampler_rejected_logps)
    return None not in given and bool(pair.temperature) and pair.top_p == 1 and pair.top_k == 0


def _by_law(pairs: Sequence[PreferencePair]) -> list[list[PreferencePair]]:
    """Pairs by temperature, and by whether log pi is stored."""
    found: dict[tuple[float | None, bool], list[PreferencePair]] = {}
    for pair in pairs:
        stored = pair.temperature == 1 and None not in (pair.ref_chosen_logps, pair.ref_rejected_logps)
        found.setdefault((pair.temperature, stored), []).append(pair)
    return list(found.values())


def _log_ratios(policy: Policy, pairs: Sequence[PreferencePair], max_tokens: int) -> Float[np.ndarray, " responses"]:
    """Log w of both responses of pairs of one law."""
    drawn = [q for pair in pairs for q in (pair.sampler_chosen_logps, pair.sampler_rejected_logps)]
    stored = [p for pair in pairs for p in (pair.ref_chosen_logps, pair.ref_rejected_logps)]
    if pairs[0].temperature != 1 or None in stored:
        sides = [(pair, side, ids) for pair in pairs
                 for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids))]  # fmt: skip
        found = completion_logprobs(
            policy,
            [TokenSequence(pair.prompt_ids, ids) for pair, _, ids in sides],
            [f"pair {pair.prompt_id} ({side})" for pair, side, _ in sides],
            temperatures=(pairs[0].temperature or 1.0,),
            max_tokens=max_tokens,
        )
        stored = [float(values.sum()) for values in found]
    return np.asarray(stored, dtype=np.float64) - np.asarray(drawn, dtype=np.float64)
