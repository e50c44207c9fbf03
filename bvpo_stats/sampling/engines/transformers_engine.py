"""Sampling with transformers' own ``generate``, with randomness that belongs to the draw and not to the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy
from bvpo_stats.sampling.engines.base import Draw, Outcome, Request, SamplingOptions

_STRETCH = 32  # steps between two looks at which rows are finished


def uniforms(key: str, seed: int, count: int) -> Float[np.ndarray, " count"]:
    """Uniform numbers that belong to one draw, whatever batch it is generated in.

    Args:
        key: Name of the draw (prompt id / mode / sample index).
        seed: Seed of the run.
        count: How many; the first n of a longer call are those of a shorter one.
    """
    digest = hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)


def sampler_identity(policy: Policy) -> str:
    """The model's name in what is drawn here: not the reference's, where an adapter in memory has moved the policy."""
    moved = not policy.at_reference and "+" not in policy.identity
    return f"{policy.identity}+adapter" if moved else policy.identity


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
                "The model returns NaN logits. Check its weights, or load it in a wider type (`dtype='float32'`)."
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
                    "Lower `max_new_tokens`, or use a smaller `dtype`."
                ) from None
        torch.cuda.empty_cache()
        half = len(requests) // 2
        return [*self.generate(requests[:half], options), *self.generate(requests[half:], options)]

    def _generate(self, requests: Sequence[Request], options: SamplingOptions) -> list[Draw]:
        # In stretches, leaving finished rows behind after each: plain `generate` computes every row until the longest
        # has ended.
        policy, width = self._policy, max(len(request.prompt_ids) for request in requests)
        limits = torch.tensor([self._room(len(request.prompt_ids), options) for request in requests])
        uniform = torch.from_numpy(np.stack([uniforms(r.key, options.seed, int(limits.max())) for r in requests]))
        input_ids, mask = _left_padded(requests, width, policy.pad_id)
        alive, cache = torch.arange(len(requests)), None
        draws: dict[int, Draw] = {}
        while len(alive):
            done = input_ids.shape[1] - width
            sampler = InverseCdfSampler(uniform[alive].to(policy.device), width, options)
            output = policy.model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(policy.device),
                attention_mask=mask.to(policy.device),
                past_key_values=cache,
                logits_processor=LogitsProcessorList([sampler]),
                generation_config=self._settings(min(_STRETCH, int(limits[alive].min()) - done)),
            )
            sequences = output.sequences.cpu()
            running = torch.ones(len(alive), dtype=torch.bool)
            for place, row in enumerate(alive.tolist()):
                draw = self._draw(sequences[place, width:].tolist(), int(limits[row]))
                if draw is not None:
                    draws[row], running[place] = draw, False
            cache = _selected(output.past_key_values, running)
            alive, input_ids = alive[running], sequences[running]
            mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], dim=1)[running]
        return [draws[row] for row in range(len(requests))]

    def _room(self, prompt_length: int, options: SamplingOptions) -> int:
        """Tokens that a row may write; its own affair, whatever else is in the batch."""
        most = self._policy.max_positions
        if most is not None and prompt_length >= most:
            raise UserError(
                f"A prompt of {prompt_length} tokens leaves no room in the model's {most} positions. "
                "Remove the longest prompts."
            )
        return options.max_new_tokens if most is None else min(options.max_new_tokens, most - prompt_length)

    def _settings(self, steps: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=self._stop_ids,
            pad_token_id=self._policy.pad_id,
            use_cache=True,
            return_dict_in_generate=True,
        )

    def _draw(self, ids: list[int], limit: int) -> Draw | None:
        """The finished draw, None while there is more to write."""
        ends = [ids.index(stop) for stop in self._stop_ids if stop in ids]
        if ends:
            return Draw(tuple(ids[: min(ends) + 1]), "stop")
        return Draw(tuple(ids), "length") if len(ids) >= limit else None


def _left_padded(
    requests: Sequence[Request], width: int, pad_id: int
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """Prompts and their mask; padding on the left puts every row's next token at the same place."""
    input_ids = torch.full((len(requests), width), pad_id)
    mask = torch.zeros_like(input_ids)
    for row, request in enumerate(requests):
        input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, width - len(request.prompt_ids) :] = 1
    return input_ids, mask


def _selected(cache: Any, rows: Bool[Tensor, " rows"]) -> Any:
    """The cache of some of the rows; None, to be computed anew, where the model's kind of cache cannot be cut.

    A cache without rows is of no use either.
    """
    if rows.all():
        return cache
    if not rows.any() or not all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [None])):
        return None
    cache.batch_select_indices(rows.nonzero().squeeze(1).to(cache.layers[0].keys.device))
    return cache
