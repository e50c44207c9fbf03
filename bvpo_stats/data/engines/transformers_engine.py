"""Sampling with transformers' own ``generate``, with randomness that belongs to the draw and not to the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bvpo_stats.data.engines.base import Draw, Outcome, Request, SamplingOptions
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy


def uniforms(key: str, seed: int, count: int) -> Float[np.ndarray, " count"]:
    """Uniform numbers that belong to one draw, whatever batch it is generated in.

    Args:
        key: Name of the draw (prompt id / mode / sample index).
        seed: Seed of the run.
        count: How many; the first n of a longer call are those of a shorter one.
    """
    digest = hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)


class InverseCdfSampler(LogitsProcessor):
    """Turns greedy ``generate`` into exact sampling with given uniform numbers.

    At step t row i takes the token at which the cumulative distribution of softmax(logits / temperature), cut to the
    nucleus ``top_p``, passes u[i, t]. The distribution is computed in float64, so a draw changes with the batch it is
    generated in only where rounding of the logits moves a boundary across u.

    Args:
        uniform: Numbers in [0, 1), shape [rows, max_new_tokens].
        prompt_length: Padded length of the prompts.
        options: Temperature and nucleus.
    """

    def __init__(self, uniform: Float[Tensor, "rows steps"], prompt_length: int, options: SamplingOptions) -> None:
        self._uniform = uniform
        self._prompt_length = prompt_length
        self._options = options

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Leaves one token per row possible."""
        chosen = self.choose(scores, self._uniform[:, input_ids.shape[1] - self._prompt_length])
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(1, chosen[:, None], 0.0)

    def choose(self, scores: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Inverse-CDF draw of one token per row."""
        if torch.isnan(scores).any():
            raise UserError(
                "The model returns NaN logits. Check its weights, or load it in a wider type (--dtype float32)."
            )
        probabilities = torch.softmax(scores.to(torch.float64) / self._options.temperature, dim=-1)
        if self._options.top_p < 1:
            probabilities = _nucleus(probabilities, self._options.top_p)
        cumulative = probabilities.cumsum(-1)
        target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=scores.shape[1] - 1)


def _nucleus(probabilities: Float[Tensor, "rows vocabulary"], top_p: float) -> Float[Tensor, "rows vocabulary"]:
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = torch.where(before < top_p, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter_(1, order, ordered)


class TransformersEngine:
    """Draws completions with a loaded policy.

    Args:
        policy: Who draws.
        stop_ids: Tokens that end a draw besides the policy's end-of-sequence tokens, e.g. the closing tag of a trace.
    """

    name = "transformers"
    whole_batches = True

    def __init__(self, policy: Policy, stop_ids: Sequence[int] = ()) -> None:
        self._policy = policy
        self._stop_ids = [*policy.eos_ids, *stop_ids]

    def draw(
        self, batches: Iterable[Sequence[Request]], options: SamplingOptions
    ) -> Iterator[list[tuple[Request, Outcome]]]:
        """Draws batch by batch."""
        for batch in batches:
            yield list(zip(batch, self.generate(batch, options), strict=True))

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], options: SamplingOptions) -> list[Draw]:
        """Draws one batch; halves it and tries again where memory runs out."""
        try:
            return self._generate(requests, options)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise UserError(
                    f"Out of memory on a single response of {options.max_new_tokens} tokens. "
                    "Lower --max-new-tokens, or use a smaller --dtype."
                ) from None
        torch.cuda.empty_cache()
        half = len(requests) // 2
        return [*self.generate(requests[:half], options), *self.generate(requests[half:], options)]

    def _generate(self, requests: Sequence[Request], options: SamplingOptions) -> list[Draw]:
        policy = self._policy
        width = max(len(request.prompt_ids) for request in requests)
        if policy.max_positions is not None and width >= policy.max_positions:
            raise UserError(
                f"A prompt of {width} tokens leaves no room in the model's {policy.max_positions} positions. "
                "Remove the longest prompts."
            )
        room = options.max_new_tokens if policy.max_positions is None else policy.max_positions - width
        steps = min(options.max_new_tokens, room)
        input_ids = torch.full((len(requests), width), policy.pad_id)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(requests):  # left padding: every row's next token is at the same place
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        numbers = np.stack([uniforms(request.key, options.seed, steps) for request in requests])
        sampler = InverseCdfSampler(torch.from_numpy(numbers).to(policy.device), width, options)
        output = policy.model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(policy.device),
            attention_mask=mask.to(policy.device),
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=steps,
                eos_token_id=self._stop_ids,
                pad_token_id=policy.pad_id,
            ),
        )
        return [self._draw(row) for row in output[:, width:].tolist()]

    def _draw(self, ids: list[int]) -> Draw:
        ends = [ids.index(stop) for stop in self._stop_ids if stop in ids]
        if not ends:
            return Draw(tuple(ids), "length")
        return Draw(tuple(ids[: min(ends) + 1]), "stop")
