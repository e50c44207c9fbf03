"""Batches of token ids for the training recipe, bucketed by length."""

from __future__ import annotations

import random

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bvpo_stats.embedded.task import Example, draw_example
from bvpo_stats.embedded.tokenizer import EOS, THINK_CLOSE, prompt_text
from bvpo_stats.lab.recipe.options import Recipe, difficulty_at

IGNORED = -100
Encoded = tuple[list[int], list[int]]
"""Token ids of a generation prompt and of its completion."""


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
