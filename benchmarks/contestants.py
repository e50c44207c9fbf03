"""Ways to get per-sequence gradients, each as a function without arguments that does one full pass.

A pass is one forward and one backward over the same batch, with the same chunked head where the engine allows it. Every
contestant forms all per-sequence gradients and lets go of them; ``gradients()`` of each is checked before it is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bvpo_stats.lab.reference_engine import reference_scores
from bvpo_stats.model import capture
from bvpo_stats.model.batching import Batch
from bvpo_stats.model.head import sequence_logprobs, token_logprobs
from bvpo_stats.model.scores import score_pass
from bvpo_stats.model.sinks import Keep
from bvpo_stats.model.subset import Subset


@dataclass(frozen=True)
class Setting:
    """What every contestant is given.

    Attributes:
        build: Makes the model, always with the same weights.
        subset_of: The LoRA weights of a model.
        batch: The sequences.
    """

    build: Callable[[], Any]
    subset_of: Callable[[Any], Subset]
    batch: Batch


@dataclass(frozen=True)
class Contestant:
    """One engine, ready to run.

    Attributes:
        run: One full pass.
        gradients: Per-sequence gradients [sequences, parameters] of one pass, or their sum [1, parameters].
    """

    run: Callable[[], Any]
    gradients: Callable[[], Tensor]


def plain(setting: Setting) -> Contestant:
    """The yardstick: PEFT's LoRA layers and autograd's summed gradients."""
    model, subset = _model(setting)
    weights = list(subset.parameters.values())

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(_objective(model, setting.batch), weights))

    return Contestant(run, lambda: torch.cat([g.flatten() for g in run()])[None])


def plain_fused(setting: Setting) -> Contestant:
    """Summed gradients through this package's fused LoRA node: what the scores alone cost is ours / this."""
    model, subset = _model(setting)

    def summed(left: Tensor, right: Tensor) -> Tensor:
        return (left.flatten(0, 1).T @ right.flatten(0, 1))[None]

    @contextmanager
    def summing() -> Any:
        original = capture.per_sequence_product
        capture.per_sequence_product = summed
        try:
            yield
        finally:
            capture.per_sequence_product = original

    def run(*sinks: Any) -> None:
        with summing():
            score_pass(model, subset, setting.batch, sinks)

    def gradients() -> Tensor:
        keep = Keep()
        run(keep)
        return keep.flat(subset, 1)

    return Contestant(run, gradients)


def bvpo_stats(setting: Setting) -> Contestant:
    """This package."""
    model, subset = _model(setting)

    def gradients() -> Tensor:
        keep = Keep()
        score_pass(model, subset, setting.batch, [keep])
        return keep.flat(subset, len(setting.batch))

    return Contestant(lambda: score_pass(model, subset, setting.batch, []), gradients)


def torch_func(setting: Setting) -> Contestant:
    """vmap(grad(functional_call)) with eager attention and full logits: vmap has no rule for the chunked head."""
    model, subset = _model(setting)
    names = list(subset.parameters)

    def gradients() -> Tensor:
        found = reference_scores(model, names, setting.batch)
        return torch.cat([found[name].flatten(1) for name in names], 1)

    return Contestant(lambda: reference_scores(model, names, setting.batch), gradients)


def opacus(setting: Setting) -> Contestant:
    """Opacus' hooks; they add to the ordinary weight gradient."""
    from opacus import GradSampleModule

    model, subset = _model(setting)
    weights: list[Any] = list(subset.parameters.values())
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")  # its hooks sleep in eval mode; there is no dropout

    def run() -> list[Tensor]:
        # The decoder is called as in every other contestant; the hooks sit on its layers.
        _objective(model, setting.batch).backward()
        found = [weight.grad_sample for weight in weights]
        wrapped.zero_grad(set_to_none=True)
        for weight in weights:
            weight.grad_sample = None
        return found

    return Contestant(run, lambda: torch.cat([g.flatten(1) for g in run()], 1))


def bergson(setting: Setting) -> Contestant:
    """Bergson's in-training collector: hooks on A and B, gradients kept on the CPU."""
    from bergson.collector.gradient_collectors import StreamingGradientCollector

    model, subset = _model(setting)
    weights: list[Any] = list(subset.parameters.values())
    layers = {name.removesuffix(".weight") for name in subset.parameters}
    collector = StreamingGradientCollector(model=model, target_modules=layers, dtype=weights[0].dtype)

    def run() -> dict[str, Tensor]:
        with collector:
            _objective(model, setting.batch).backward()
        for weight in weights:
            weight.grad = None
        found = dict(collector.mod_grads)
        collector.mod_grads.clear()
        return found

    def gradients() -> Tensor:
        found = run()
        return torch.cat([found[name.removesuffix(".weight")].flatten(1) for name in subset.parameters], 1)

    return Contestant(run, gradients)


def single_sequences(setting: Setting) -> Contestant:
    """A loop of plain backward passes, one sequence each."""
    model, subset = _model(setting)
    weights = list(subset.parameters.values())
    b = setting.batch
    rows = [
        Batch(
            b.input_ids[i : i + 1], b.attention_mask[i : i + 1], b.position_ids[i : i + 1], b.completion_mask[i : i + 1]
        )
        for i in range(len(b))
    ]

    def run() -> list[tuple[Tensor, ...]]:
        return [torch.autograd.grad(_objective(model, row), weights) for row in rows]

    return Contestant(run, lambda: torch.stack([torch.cat([g.flatten() for g in row]) for row in run()]))


def available() -> dict[str, Callable[[Setting], Contestant]]:
    """The contestants that can run here, the yardstick first."""
    found = {
        "plain": plain,
        "bvpo_stats": bvpo_stats,
        "plain_fused": plain_fused,
        "torch.func": torch_func,
        "opacus": opacus,
        "bergson": bergson,
        "single_sequences": single_sequences,
    }
    missing = [name for name in ("opacus", "bergson") if importlib.util.find_spec(name) is None]
    return {name: make for name, make in found.items() if name not in missing}


def _model(setting: Setting) -> tuple[Any, Subset]:
    model = setting.build()
    subset = setting.subset_of(model)
    model.requires_grad_(False)
    for weight in subset.parameters.values():
        weight.requires_grad_(True)
    return model, subset


def _objective(model: Any, batch: Batch) -> Tensor:
    return sequence_logprobs(token_logprobs(model, batch)).sum()
