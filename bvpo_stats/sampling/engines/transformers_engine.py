"""Sampling with transformers' own ``generate``, with randomness that belongs to the draw and not to the batch."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bvpo_stats.errors import UserError
from bvpo_stats.model.head import causal_lm_of
from bvpo_stats.model.policy import Policy
from bvpo_stats.progress import in_hand, stages, within
from bvpo_stats.sampling.engines.base import Draw, Outcome, Request, SamplingOptions

_DECIMALS = 4  # of log q in nats: what rounding of the logits leaves of it
_LOOK = 3  # tokens of the comparison of a prompt alone with the same prompt in a batch
_PADS: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # looked at once for each model
_LAW_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-2}  # of probabilities, in the coarsest arithmetic on the way
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

    Attributes:
        logps: Log-probability of the token of each row, for every step so far.
    """

    def __init__(self, uniform: Float[Tensor, "rows steps"], prompt_length: int, options: SamplingOptions) -> None:
        self._uniform = uniform
        self._prompt_length = prompt_length
        self._options = options
        self.logps: list[Float[Tensor, " rows"]] = []

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
        chosen = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=scores.shape[1] - 1)
        share = probabilities.gather(1, chosen[:, None]) / cumulative[:, -1:]
        self.logps.append(share.squeeze(1).log())
        return chosen


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
    top_k = 0
    whole_batches = True

    def __init__(self, policy: Policy, stop_ids: Sequence[int] = ()) -> None:
        self._policy = policy
        self._stop_ids = [*policy.eos_ids, *stop_ids]

    def draw(
        self, batches: Iterable[Sequence[Request]], options: SamplingOptions
    ) -> Iterator[list[tuple[Request, Outcome]]]:
        """Draws batch by batch."""
        for batch in batches:
            # an adapter that changes nothing yet is passed by: the same numbers in half the time
            with in_hand(len(batch)), self._policy.reference() if self._policy.at_reference else nullcontext():
                draws = self.generate(batch, options)
            yield list(zip(batch, draws, strict=True))

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], options: SamplingOptions) -> list[Draw]:
        """Draws one batch; halves it and tries again where memory runs out.

        Where the model's draws would depend on the padding of its batch, prompts of one length are drawn together.

        Args:
            requests: What to draw.
            options: How.
        """
        lengths = [len(request.prompt_ids) for request in requests]
        try:
            if not self._padding_is_ignored(requests) and len(set(lengths)) > 1:
                found: dict[int, Draw] = {}
                for length in stages(list(dict.fromkeys(lengths))):
                    rows = [row for row, its in enumerate(lengths) if its == length]
                    found |= zip(rows, self.generate([requests[row] for row in rows], options), strict=True)
                return [found[row] for row in range(len(requests))]
            return self._generate(requests, options)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise UserError(
                    f"Out of memory on a single response of {options.max_new_tokens} tokens. "
                    "Lower `max_new_tokens`, or use a smaller `dtype`."
                ) from None
        torch.cuda.empty_cache()
        half = len(requests) // 2
        return [draw for part in stages([requests[:half], requests[half:]]) for draw in self.generate(part, options)]

    def _padding_is_ignored(self, requests: Sequence[Request]) -> bool:
        """Whether the shortest prompt is continued alike alone and padded to the length of the longest.

        Looked at once, over a few tokens, together with what the continuation should be: the model's own forward.

        Raises:
            UserError: What ``generate`` draws from is not what the model's forward computes, which scores take.
        """
        if self._policy.model not in _PADS:
            pair = [min(requests, key=lambda r: len(r.prompt_ids)), max(requests, key=lambda r: len(r.prompt_ids))]
            (ids, alone), (_, together) = self._greedy(pair[:1]), self._greedy(pair)
            logits = self._policy.model(input_ids=ids[:1], use_cache=False).logits[:, -len(alone[0]) - 1 : -1]
            truth = torch.softmax(logits.double(), dim=-1)
            model, tolerance = self._policy.model, _LAW_TOLERANCES.get(self._policy.model.dtype, 0.1)
            difference = float((alone - truth).abs().max())
            if not bool(torch.isnan(truth).any()) and not difference <= tolerance:
                raise UserError(
                    f"{type(causal_lm_of(model)).__name__} cannot be sampled from with transformers: with its cache it "
                    f"gives tokens other probabilities than without (by up to {difference:.1g}). Sample with another "
                    "engine or another version of transformers."
                )
            _PADS[model] = bool((together[0] - alone[0]).abs().max() <= tolerance)  # False where there is a NaN
        return _PADS[self._policy.model]

    def _greedy(
        self, requests: Sequence[Request]
    ) -> tuple[Int[Tensor, "rows length"], Float[Tensor, "rows steps vocabulary"]]:
        """The most probable continuation of left-padded prompts, and the law of each of its tokens."""
        width = max(len(request.prompt_ids) for request in requests)
        input_ids, mask = _left_padded(requests, width, self._policy.pad_id)
        most = self._policy.max_positions
        settings = self._settings(_LOOK if most is None else max(1, min(_LOOK, most - width)))
        settings.eos_token_id, settings.output_logits = None, True
        output = self._run(input_ids=input_ids, attention_mask=mask, generation_config=settings)
        return output.sequences, torch.softmax(torch.stack(output.logits, dim=1).double(), dim=-1)

    def _run(self, **inputs: Any) -> Any:
        """The model's own ``generate``.

        Raises:
            UserError: It fails, which is the model's affair.
        """
        model: Any = self._policy.model
        moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        try:
            return model.generate(**moved)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{type(causal_lm_of(model)).__name__} cannot be sampled from with transformers: its generate fails "
                f"with {type(error).__name__} ({reason}). Sample with another engine, or take another `dtype` or model."
            ) from error

    def _generate(self, requests: Sequence[Request], options: SamplingOptions) -> list[Draw]:
        # In stretches, leaving finished rows behind after each: plain `generate` computes every row until the longest
        # has ended.
        policy, width = self._policy, max(len(request.prompt_ids) for request in requests)
        limits = torch.tensor([self._room(len(request.prompt_ids), options) for request in requests])
        uniform = torch.from_numpy(np.stack([uniforms(r.key, options.seed, int(limits.max())) for r in requests]))
        input_ids, mask = _left_padded(requests, width, policy.pad_id)
        alive, cache = torch.arange(len(requests)), None
        logps = torch.zeros(len(requests), dtype=torch.float64)
        draws: dict[int, Draw] = {}
        while len(alive):
            done = input_ids.shape[1] - width
            sampler = InverseCdfSampler(uniform[alive].to(policy.device), width, options)
            output = self._run(
                input_ids=input_ids,
                attention_mask=mask,
                past_key_values=cache,
                logits_processor=LogitsProcessorList([sampler]),
                generation_config=self._settings(min(_STRETCH, int(limits[alive].min()) - done)),
            )
            sequences, steps = output.sequences.cpu(), torch.stack(sampler.logps, dim=1).cpu()
            running = torch.ones(len(alive), dtype=torch.bool)
            for place, row in enumerate(alive.tolist()):
                draw = self._draw(sequences[place, width:].tolist(), int(limits[row]))
                logps[row] += steps[place, : None if draw is None else len(draw.completion_ids) - done].sum()
                if draw is not None:
                    draws[row] = replace(draw, sampler_logp=min(0.0, round(float(logps[row]), _DECIMALS)))
                    running[place] = False
            cache = _selected(output.past_key_values, running)
            alive, input_ids = alive[running], sequences[running]
            mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], dim=1)[running]
            written = sequences.shape[1] - width
            within((len(draws) + sum(written / limit for limit in limits[alive].tolist())) / len(requests))
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
    layers = getattr(cache, "layers", [None])
    if not rows.any() or not all(_has_rows(layer) for layer in layers):
        return None
    cache.batch_select_indices(rows.nonzero().squeeze(1).to(cache.layers[0].keys.device))
    return cache


def _has_rows(layer: Any) -> bool:
    """Whether a layer's cache can be cut: layers of linear attention keep their state in other ways."""
    return hasattr(layer, "batch_select_indices") and getattr(layer, "keys", None) is not None
