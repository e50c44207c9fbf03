"""The formulas of page "What a run needs" against what small runs take."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scale import PAGE, SHAPES, SMALL, page
from bvpo_stats.gradients.engine import BlockLayout
from bvpo_stats.gradients.moments import DeviceMoments, MomentPlan
from bvpo_stats.gradients.stream import GradientBatch
from bvpo_stats.model import needs
from bvpo_stats.model.batching import TokenSequence, collate
from bvpo_stats.model.needs import ModelShape, spared
from bvpo_stats.model.policy import load_policy
from bvpo_stats.model.scores import score_pass
from bvpo_stats.model.subset import LoraOptions, Probe, create_lora, lora_subset, probe_subset

SHAPE = ModelShape(128, 320, 64, 3, 96, tied=True)


def model_of(shape: ModelShape, dtype: torch.dtype = torch.float32) -> Any:
    config = LlamaConfig(hidden_size=shape.hidden, intermediate_size=shape.width, num_hidden_layers=shape.layers,
                         num_attention_heads=4, num_key_value_heads=4 * shape.keys // shape.hidden,
                         vocab_size=shape.words, tie_word_embeddings=shape.tied)  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def test_parameters_adapters_and_probes() -> None:
    model = model_of(SHAPE)
    assert ModelShape.of(model.config) == SHAPE
    assert sum(weight.numel() for weight in model.parameters()) == SHAPE.parameters
    adapted = lora_subset(create_lora(model, LoraOptions(r=4)))
    assert (adapted.size, adapted.carried.size) == (SHAPE.lora(4), SHAPE.moving(4))
    assert BlockLayout.of(probe_subset(model, Probe(4))).size == SHAPE.probed(4)
    assert 134e6 < SMALL.parameters < 135e6
    billions = [round(shape.parameters / 1e9, 1) for shape in SHAPES.values()]
    assert billions == [1.5, 7.6, 8.0, 32.8, 70.6]  # what their makers say


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_that_backward_keeps(dtype: torch.dtype) -> None:
    model = create_lora(model_of(SHAPE, dtype), LoraOptions(r=16))
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = collate([TokenSequence((1,), tuple(2 + k % 60 for k in range(64))) for _ in range(2)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        score_pass(model, lora_subset(model).carried, batch, [lambda name, scores: None])
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert found == pytest.approx(SHAPE.activations(2 * 64, dtype, 16), rel=0.1)


def test_adam_takes_two_numbers_a_weight() -> None:
    weights = list(create_lora(model_of(SHAPE), LoraOptions(r=4)).parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if x.dim())
    both = sum(weight.nbytes + weight.grad.nbytes for weight in trained)
    assert state + both == 16 * SHAPE.lora(4)


def test_the_file_of_moments(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bvpo_stats.gradients.moments.NARROW", 1)
    layout = BlockLayout.of(lora_subset(create_lora(model_of(SHAPE), LoraOptions(r=4))).carried)
    prompts = [f"q{k}" for k in range(300)]
    plan = MomentPlan(("t", "e", "m"), False, dict.fromkeys(prompts, 1), 20, layout, layout)
    moments = DeviceMoments(plan, prompts, tmp_path / "moments.bin")
    rows = {block: torch.ones(300, size) for block, size in layout.sizes.items()}
    moments.add(GradientBatch(prompts, prompts, dict.fromkeys(("t", "e", "m"), rows), None, []))
    on_disk = (tmp_path / "moments.bin").stat().st_size
    assert on_disk + plan.open_bytes == pytest.approx(SHAPE.closed(SHAPE.moving(4)), rel=1e-3)
    small = sum(x.nbytes for name, x in moments.to_arrays().items() if not name.startswith("open"))
    assert plan.file_bytes(prompts) == pytest.approx(on_disk + plan.open_bytes + small, rel=0.1)


def test_layers_are_computed_again_where_they_outweigh_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("embedded", lora=2, device="cpu")
    shape = ModelShape.of(policy.model.config)
    assert shape is not None
    with spared(policy, 16_384) as again:
        assert not again
    monkeypatch.setattr(needs, "ROOM", shape.activations(1000, torch.float32))
    with spared(policy, 999) as again:
        assert not again
    with spared(policy, 1001) as again:
        assert again
        assert any(getattr(module, "gradient_checkpointing", False) for module in policy.model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in policy.model.modules())


def test_the_page_is_what_the_formulas_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
