from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import _add_adapter
from bvpo_stats.model.subset import LoraOptions, create_lora, linear_subset, lora_subset
from tests.model.shapes import SHAPES, tiny_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(shape: str = "qwen2", **config: Any) -> PeftModel:
    return get_peft_model(tiny_model(shape), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **config}))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_linear_takes_every_layer_but_the_head_and_keeps_the_order_of_the_model(shape: str) -> None:
    model = create_lora(tiny_model(shape), LoraOptions(r=3))
    subset = lora_subset(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(subset.parameters) == list(trainable)
    assert all(subset.parameters[name] is parameter for name, parameter in trainable.items())
    assert len(subset.sites) == (8 if shape == "gpt2" else 14)
    assert subset.size == sum(p.numel() for p in trainable.values())


def test_patterns_select_layers_and_parameters() -> None:
    model = create_lora(tiny_model(), LoraOptions(r=2))
    assert len(lora_subset(model, ["q_proj"]).parameters) == 4
    assert len(lora_subset(model, ["layers.1.*"]).parameters) == 14
    assert len(lora_subset(model, ["*lora_B*"]).parameters) == 14
    assert len(lora_subset(model, ["layers.0.self_attn.[qk]_proj", "down_proj"]).parameters) == 8
    only_b = lora_subset(model, ["layers.0.mlp.up_proj.lora_B.*"])
    assert [site.name_a for site in only_b.sites] == [None]


def test_creation_is_decided_by_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = lora_subset(create_lora(tiny_model(seed=5), LoraOptions(r=2, seed=1))).parameters
    again = lora_subset(create_lora(tiny_model(seed=5), LoraOptions(r=2, seed=1))).parameters
    other = lora_subset(create_lora(tiny_model(seed=5), LoraOptions(r=2, seed=2))).parameters
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(5)
    model = tiny_model(seed=5)
    torch.manual_seed(5)
    create_lora(model, LoraOptions())
    assert torch.equal(torch.rand(1), expected)


def test_a_loaded_adapter(tmp_path: Any) -> None:
    create_lora(tiny_model(), LoraOptions(r=2, seed=3)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert lora_subset(loaded).size == lora_subset(create_lora(tiny_model(), LoraOptions(r=2))).size


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_of_a_base_of_other_depth_is_refused(tmp_path: Any, layers: int) -> None:
    """PEFT itself loads it without an error and leaves weights out."""
    peft_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"weights do not correspond, e\.g\. .*layers\..*another base\?"):
        _add_adapter(tiny_model("qwen2", num_hidden_layers=layers), str(tmp_path))
    assert lora_subset(_add_adapter(tiny_model("qwen2"), str(tmp_path))).size > 0


def test_linear_weights() -> None:
    model = tiny_model()
    assert list(linear_subset(model, ["layers.1.mlp.*"]).parameters) == [
        f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert len(linear_subset(tiny_model("gpt2"), ["c_attn"]).parameters) == 2
    adapted = create_lora(tiny_model(), LoraOptions(r=2))
    assert len(linear_subset(adapted, ["q_proj.base_layer"]).parameters) == 2
    with pytest.raises(UserError, match=r"q_proj: a layer under an adapter \(its weight is called base_layer\)"):
        linear_subset(adapted, ["q_proj"])


class Quantised(nn.Linear):
    """Stands for a quantised layer of another library: a subclass of Linear."""


class TestRefusals:
    """Everything the engine cannot score, by name."""

    def test_nothing_selected(self) -> None:
        with pytest.raises(UserError, match="No trainable parameters are selected: the model has no adapter"):
            lora_subset(tiny_model())
        with pytest.raises(UserError, match="No trainable parameters are selected"):
            linear_subset(tiny_model(), [])
        with pytest.raises(UserError, match="No trainable parameters are selected"):
            lora_subset(create_lora(tiny_model(), LoraOptions(r=2)), [])

    def test_a_pattern_without_a_match_lists_near_ones(self) -> None:
        model = create_lora(tiny_model(), LoraOptions(r=2))
        with pytest.raises(UserError, match=r"'qproj' matches no layer\. Near matches: .*q_proj"):
            lora_subset(model, ["qproj"])
        with pytest.raises(UserError, match=r"'k_prj' matches no layer\. Near matches: .*k_proj"):
            linear_subset(tiny_model(), ["q_proj", "k_prj"])
        with pytest.raises(UserError, match=r"LoRA targets q_prj: .*Near matches: .*q_proj"):
            create_lora(tiny_model(), LoraOptions(targets=("q_prj",)))

    def test_creation(self) -> None:
        with pytest.raises(UserError, match="rank 0"):
            create_lora(tiny_model(), LoraOptions(r=0))
        with pytest.raises(UserError, match="has an adapter already"):
            create_lora(peft_model(), LoraOptions())

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"use_dora": True}, r"q_proj: the LoRA variant Dora is not supported"),
            ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens: LoRA on an embedding is not supported"),
            ({"lora_bias": True}, r"q_proj: lora_bias=True is not supported"),
            ({"bias": "all"}, r"trains biases \(bias='all'\)"),
            ({"modules_to_save": ["norm"]}, r"modules_to_save=\['norm'\]"),
            ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ],
    )
    def test_lora_variants(self, config: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            lora_subset(peft_model(**config))

    def test_states_of_an_adapter(self) -> None:
        model = peft_model()
        model.merge_adapter()
        with pytest.raises(UserError, match="q_proj: the adapter is merged into the base weight"):
            lora_subset(model)
        model.unmerge_adapter()
        with model.disable_adapter(), pytest.raises(UserError, match="the adapter is disabled"):
            lora_subset(model)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        assert len(lora_subset(model).sites) == 4
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(UserError, match="adapters default, second are active at once"):
            lora_subset(model)
        model.set_adapter("second")
        assert [site.adapter for site in lora_subset(model).sites] == ["second", "second"]

    def test_other_methods(self) -> None:
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        with pytest.raises(UserError, match="kind IA3, which is not supported; only LoRA is"):
            lora_subset(get_peft_model(tiny_model(), config))

    def test_quantised_layers(self) -> None:
        model = tiny_model()
        model.model.layers[1].mlp.up_proj = Quantised(16, 24, bias=False)
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: .*Quantised is not supported"):
            linear_subset(model, ["up_proj"])
        layer = create_lora(model, LoraOptions(r=2, targets=("up_proj",)))
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: .*Quantised .* is not supported"):
            lora_subset(layer)

    def test_embeddings_norms_and_the_head(self) -> None:
        model = tiny_model()
        with pytest.raises(UserError, match=r"model\.embed_tokens: .*Embedding is not supported"):
            linear_subset(model, ["embed_tokens"])
        with pytest.raises(UserError, match=r"model\.norm: .*Norm is not supported"):
            linear_subset(model, ["model.norm"])
        with pytest.raises(UserError, match="lm_head: the output head is not supported"):
            linear_subset(model, ["lm_head"])
        with pytest.raises(UserError, match="lm_head: its weight is tied to an embedding"):
            linear_subset(tiny_model("qwen2-tied"), ["lm_head"])
