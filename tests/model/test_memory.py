import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from bvpo_stats.model.batching import collate
from bvpo_stats.model.head import sequence_logprobs, token_logprobs
from bvpo_stats.model.scores import score_pass
from bvpo_stats.model.sinks import Keep
from bvpo_stats.model.subset import LoraOptions, create_lora, linear_subset, lora_subset
from tests.model.shapes import sequences_of, tiny_model

# The benchmark's own account of memory, from the folder of benchmarks, which is no package.
peak_bytes = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "measure.py"))["peak_bytes"]


@pytest.mark.parametrize("kind", ["lora", "linear"])
def test_peak_is_at_most_the_plain_backwards_and_one_weights_scores(kind: str) -> None:
    model: Any = tiny_model("qwen2", dtype=torch.float32)
    subset = linear_subset(model, ["mlp.*"])
    if kind == "lora":
        model = create_lora(model, LoraOptions(r=32))
        subset = lora_subset(model)
    batch = collate(sequences_of([(2, 3)] * 16))  # short: scores outweigh activations
    weights = list(subset.parameters.values())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)

    def plain() -> Any:
        return torch.autograd.grad(sequence_logprobs(token_logprobs(model, batch)).sum(), weights)

    keep = Keep()
    ours, kept = (peak_bytes(lambda s=sinks: score_pass(model, subset, batch, s)) for sinks in ([], [keep]))
    allowed = peak_bytes(plain) + 16 * max(weight.numel() for weight in weights) * 4
    assert 0 < ours <= allowed
    # The account sees scores at all: kept ones break the bound.
    assert kept > allowed
