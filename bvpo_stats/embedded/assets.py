"""The weights, the questions and the records that ship with the package."""

from __future__ import annotations

from pathlib import Path

from bvpo_stats.embedded.task import generate_prompts
from bvpo_stats.errors import UserError
from bvpo_stats.records import Prompt

EMBEDDED = "embedded"
"""The word that stands for them wherever a model, prompts or records are asked for."""

N_PROMPTS = 200
PROMPT_SEED = 0


def embedded_model_path() -> Path:
    """The folder of the committed weights; loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Raises:
        UserError: The installation lacks them.
    """
    path = Path(__file__).parent / "weights"
    if not (path / "model.safetensors").is_file():
        raise UserError(f"the embedded model is missing from {path}; install the package again.")
    return path


def embedded_records() -> Path:
    """The folder of the embedded model's pairs (``thinking``, ``nothinking``) and ``traces``, gzipped JSONL."""
    return Path(__file__).parent / "data"


def embedded_prompts(limit: int | None = None) -> list[Prompt]:
    """The default questions: 200 of the held-out split, none of which the model was trained on.

    Args:
        limit: Only the first ``limit`` of them.

    Raises:
        UserError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"`limit={limit}` leaves no prompts; use at least 1.")
    return generate_prompts(N_PROMPTS, PROMPT_SEED, "held-out")[:limit]
