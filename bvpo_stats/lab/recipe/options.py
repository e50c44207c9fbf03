"""Options of the training recipe, and the two schedules they define."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from bvpo_stats.embedded.task import Difficulty

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
