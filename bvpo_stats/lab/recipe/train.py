"""Trains the embedded reasoning model from scratch on a CPU.

The model is an ordinary ``Qwen2ForCausalLM``. Examples are drawn as training goes on, some with a trace and some with
the empty trace, and the loss is the mean negative log-likelihood of the completion tokens. Everything is a function of
the options: the examples of step s are drawn from (seed, s) alone, so a run that was killed goes on from its last
checkpoint with the very batches it would have seen.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bvpo_stats.embedded.tokenizer import build_tokenizer
from bvpo_stats.errors import UserError
from bvpo_stats.lab.recipe.batches import IGNORED, Encoded, collate, draw_bucket
from bvpo_stats.lab.recipe.options import Recipe, Shape, learning_rate_at

CHECKPOINT = "checkpoint.pt"
RECORD = "recipe.json"
MAX_NEW_TOKENS = 192


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised model in float32; the global torch generator is left as it was."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        initializer_range=shape.initial_std,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).float()


def completion_loss(
    model: Qwen2ForCausalLM, inputs: Int[Tensor, "sequences tokens"], labels: Int[Tensor, "sequences tokens"]
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the completion tokens, in nats; the head runs on those positions only."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    counted = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), labels[counted])


def _optimizer(model: Qwen2ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def _save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _load_checkpoint(output: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run of this recipe, or None when the folder is new or empty."""
    if output.exists() and not output.is_dir():
        raise UserError(f"`output={str(output)!r}` is a file; name a folder.")
    path = output / CHECKPOINT
    if not path.exists():
        names = [p.name for p in output.iterdir()] if output.exists() else []
        if set(names) - {path.with_suffix(".partial").name}:
            raise UserError(f"`output={str(output)!r}` is not empty; name a new folder, nothing was overwritten.")
        return None
    state = torch.load(path, weights_only=True)
    if state["recipe"] != json.dumps(asdict(recipe)):
        raise UserError(f"`output={str(output)!r}` holds an interrupted run with other options; name a new folder.")
    return state


def _write_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _checkpoint_of(
    step: int, seconds: float, recipe: Recipe, model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    return {
        "recipe": json.dumps(asdict(recipe)),
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def _run_steps(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    output: Path,
    state: dict[str, Any] | None,
    progress: Progress,
) -> float:
    """Runs the steps that ``state`` leaves; returns the seconds spent, earlier sittings included."""
    optimizer = _optimizer(model, recipe)
    first, earlier = 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, earlier = state["step"], state["seconds"]
    bar = progress.add_task("train", total=recipe.steps, completed=first, rate=0.0, loss=float("nan"))
    began = time.perf_counter()
    batches: list[list[Encoded]] = []
    loss_shown: float | None = None
    for step in range(first, recipe.steps):
        if not batches or step % recipe.bucket == 0:
            batches = draw_bucket(recipe, step // recipe.bucket, tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        loss = completion_loss(model, *collate(batches[step % recipe.bucket], int(tokenizer.pad_token_id)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_shown = loss.item() if loss_shown is None else 0.98 * loss_shown + 0.02 * loss.item()
        elapsed = time.perf_counter() - began
        progress.update(bar, advance=1, rate=(step + 1 - first) / elapsed, loss=loss_shown)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            state = _checkpoint_of(step + 1, earlier + elapsed, recipe, model, optimizer)
            _save_checkpoint(output / CHECKPOINT, state)
    return earlier + time.perf_counter() - began


def train(output: Path, recipe: Recipe | None = None, *, show_progress: bool = True) -> Path:
    """Trains the embedded model and writes model, tokenizer and generation configuration into ``output``.

    A run that was killed resumes from its checkpoint when called again with the same options, and ends in the weights
    of an uninterrupted run.

    Args:
        output: A new or empty folder, or one that holds an interrupted run of the same recipe.
        recipe: Options; the committed recipe when None.
        show_progress: Whether to draw a progress bar on the terminal.

    Returns:
        ``output``, which then loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Raises:
        UserError: ``output`` holds something else, or the options are impossible.
    """
    recipe = recipe or Recipe()
    if recipe.steps < 1:
        raise UserError(f"`steps={recipe.steps}` is too few; use at least 1.")
    state = _load_checkpoint(output, recipe)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(recipe.shape, tokenizer, recipe.seed).train()
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} steps/s, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show_progress) as progress:
        seconds = _run_steps(model, tokenizer, recipe, output, state, progress)
    _write_model(model.eval(), tokenizer, output)
    record = {"recipe": asdict(recipe), "seconds": round(seconds, 1), "torch": torch.__version__}
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # Last, so that a run killed while it wrote the model can be given again.
    (output / CHECKPOINT).unlink()
    return output
