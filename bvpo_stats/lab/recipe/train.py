"""Trains the embedded reasoning model from scratch on a CPU.

The model is an ordinary ``Qwen2ForCausalLM``. Examples are drawn as training goes on, some with a trace and some with
the empty trace, and the loss is the mean negative log-likelihood of the completion tokens. Everything is a function of
the options: the examples of step s are drawn from (seed, s) alone, so a run that was killed goes on from its last
checkpoint with the very batches it would have seen.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bvpo_stats.embedded.task import Difficulty, Example, draw_example
from bvpo_stats.embedded.tokenizer import EOS, THINK_CLOSE, build_tokenizer, prompt_text
from bvpo_stats.errors import UserError

CHECKPOINT = "checkpoint.pt"
RECORD = "recipe.json"
MAX_NEW_TOKENS = 192
IGNORED = -100
Encoded = tuple[list[int], list[int]]
"""Token ids of a generation prompt and of its completion."""
TRAINING_MIX = Difficulty(operand_weights=((2, 0.15), (3, 0.35), (4, 0.35), (5, 0.15)))
"""What the model is trained on: 2 to 5 operands like the default prompts, with more short questions."""


@dataclass(frozen=True)
class Shape:
    """Size of the model: about 0.73 M parameters, 2.9 MB as float32."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    feed_forward: int = 320
    initial_std: float = 0.08


@dataclass(frozen=True)
class Recipe:
    """Options of a training run; with the number of threads they decide every weight.

    Attributes:
        seed: Seed of the initial weights and of the examples.
        steps: Optimizer steps.
        batch_size: Sequences per step.
        bucket: Steps whose examples are drawn together, sorted by length and cut into batches.
        learning_rate: Peak of AdamW's learning rate.
        warmup: Steps of linear warm-up, followed by a cosine down to a tenth of the peak.
        weight_decay: Decoupled decay of the matrices.
        empty_share: Share of examples with the empty trace.
        curriculum: Share of the steps over which the greatest number of operands grows from the least to the full mix.
        checkpoint_every: Steps between checkpoints.
        difficulty: Mix of questions.
        shape: Size of the model.
    """

    seed: int = 0
    steps: int = 7000
    batch_size: int = 32
    bucket: int = 16
    learning_rate: float = 1.5e-3
    warmup: int = 200
    weight_decay: float = 0.01
    empty_share: float = 0.35
    curriculum: float = 0.15
    checkpoint_every: int = 500
    difficulty: Difficulty = TRAINING_MIX
    shape: Shape = field(default_factory=Shape)


def difficulty_at(step: int, recipe: Recipe) -> Difficulty:
    """The mix of questions at a step: short ones first, which teaches the single steps before their order."""
    weights = recipe.difficulty.operand_weights
    share = step / (recipe.curriculum * recipe.steps) if recipe.curriculum else 1.0
    kept = min(len(weights), 1 + int(share * len(weights)))
    return replace(recipe.difficulty, operand_weights=weights[:kept])


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from the peak down to a tenth of it at the last step."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def encode_example(example: Example, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Token ids of the generation prompt and of the completion, end-of-sequence included."""
    empty = example.trace is None
    completion = (example.answer if empty else f"{example.trace}{THINK_CLOSE}{example.answer}") + EOS
    prompt_ids = tokenizer(prompt_text(example.question, empty_trace=empty), add_special_tokens=False)["input_ids"]
    return prompt_ids, tokenizer(completion, add_special_tokens=False)["input_ids"]


def draw_bucket(recipe: Recipe, index: int, tokenizer: PreTrainedTokenizerFast) -> list[list[Encoded]]:
    """The batches of steps ``index * bucket`` onwards, each of sequences of similar length, in drawn order."""
    rng = random.Random(f"examples/{recipe.seed}/{index}")
    size = recipe.batch_size
    difficulty = difficulty_at(index * recipe.bucket, recipe)
    examples = [
        encode_example(draw_example(rng, difficulty, recipe.empty_share), tokenizer)
        for _ in range(recipe.bucket * size)
    ]
    examples.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    rng.shuffle(batches)
    return batches


def collate(
    batch: list[Encoded], pad_id: int
) -> tuple[Int[Tensor, "sequences tokens"], Int[Tensor, "sequences tokens"]]:
    """Input ids and next-token labels, padded on the right; prompt and padding positions carry ``IGNORED``.

    No attention mask is needed: with causal attention no real token sees padding on its right.
    """
    length = max(len(prompt) + len(completion) for prompt, completion in batch) - 1
    inputs = torch.full((len(batch), length), pad_id)
    labels = torch.full((len(batch), length), IGNORED)
    for row, (prompt, completion) in enumerate(batch):
        ids = prompt + completion
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, len(prompt) - 1 : len(ids) - 1] = torch.tensor(completion)
    return inputs, labels


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
    if recipe.seed < 0:
        raise UserError(f"`seed={recipe.seed}`: must be at least 0.")
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
