"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import pytest

import tests.checked

if TYPE_CHECKING:
    from tests.golden.cases import Runs

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests reach no network; a hub look-up fails at once instead of waiting
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Annotations are promises: shapes and types are checked at every call, from the first import of the package on.
jaxtyping.jaxtyped = tests.checked.jaxtyped
jaxtyping.install_import_hook("bvpo_stats", "tests.checked.checked")


def save_random_model(folder: Path) -> Path:
    """A small random-weight model with the embedded tokenizer, saved to a folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from bvpo_stats.embedded.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random-weight model with the embedded tokenizer, saved to a folder."""
    return save_random_model(tmp_path_factory.mktemp("random-model"))


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    """The golden runs of this session, one set for all workers of pytest-xdist, whose folders lie side by side."""
    from tests.golden.cases import Runs

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "golden"
    folder.mkdir(exist_ok=True)
    return Runs(folder)
