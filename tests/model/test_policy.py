"""Loading policies from names and from loaded models, and adapters that leave what they are put on as it was."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.options import PolicyOptions
from bvpo_stats.model.policy import (
    Policy,
    content_identity,
    load_policy,
    load_template,
    loaded_identity,
    model_source,
    with_lora,
    with_tokenizer,
)
from bvpo_stats.model.scores import completion_logprobs
from bvpo_stats.model.subset import LoraOptions, lora_subset
from bvpo_stats.records import content_of
from bvpo_stats.sampling.engines.transformers_engine import TransformersEngine
from bvpo_stats.sampling.layouts import read_pairs
from bvpo_stats.training import BVPOConfig, BVPOTrainer


def logp(policy: Policy) -> float:
    """Of a made-up completion."""
    return float(completion_logprobs(policy, [TokenSequence((5, 6, 7), (8, 9, 10))], ["it"])[0].sum())


def disturb(policy: Policy) -> None:
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            weight.data += 0.5


def test_a_policy_goes_on_after_an_adapter_was_put_on_it(random_model: Path) -> None:
    base = load_policy(str(random_model), device="cpu")
    before = logp(base)
    tuned = with_lora(base, LoraOptions(r=2))
    assert tuned.at_reference
    assert logp(tuned) == pytest.approx(before, rel=1e-6)
    disturb(tuned)
    assert not tuned.at_reference
    assert abs(logp(tuned) - before) > 1e-3
    assert logp(base) == before
    with tuned.reference():
        assert logp(tuned) == pytest.approx(before, rel=1e-6)
    TransformersEngine(base)
    another = with_lora(base, LoraOptions(r=3))  # the base takes a second adapter, which knows nothing of the first
    assert logp(another) == pytest.approx(before, rel=1e-6)
    ours, theirs = (dict(policy.model.named_parameters()) for policy in (base, tuned))
    shared = [name for name in ours if name.endswith("mlp.up_proj.weight")]
    assert all(ours[n] is theirs["base_model.model." + n.replace(".weight", ".base_layer.weight")] for n in shared)
    with pytest.raises(UserError, match="adapter already"):
        with_lora(tuned)


def test_one_call_loads_names_options_and_models(random_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    by_name = load_policy(str(random_model), lora=2, dtype="float64", device="cpu")
    by_options = load_policy(PolicyOptions(str(random_model), dtype="float64", device="cpu"), lora=LoraOptions(r=2))
    model, tokenizer = (kind.from_pretrained(random_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    around = load_policy(model, tokenizer, lora=2, dtype="float64")
    assert by_name.identity == by_options.identity == around.identity
    assert {p.model.dtype for p in (by_name, by_options, around)} == {torch.float64}
    assert len({lora_subset(p.model).size for p in (by_name, by_options, around)}) == 1
    assert logp(by_name) == pytest.approx(logp(around), rel=1e-12) == logp(by_options)
    with pytest.raises(UserError, match="needs its tokenizer"):
        load_policy(model)
    with pytest.raises(UserError, match="rank 0"):
        load_policy(model, tokenizer, lora=0)


def test_a_stored_adapter_on_a_loaded_model_leaves_the_model_alone(random_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = load_policy(str(random_model), lora=2, device="cpu")
    disturb(tuned)
    tuned.model.save_pretrained(tmp_path)
    model, tokenizer = (kind.from_pretrained(random_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    base = load_policy(model, tokenizer)
    adapted = load_policy(model, tokenizer, adapter=str(tmp_path))
    assert logp(adapted) == pytest.approx(logp(tuned), rel=1e-6)
    assert abs(logp(base) - logp(adapted)) > 1e-3
    assert logp(load_policy(str(random_model), adapter=str(tmp_path), device="cpu")) == pytest.approx(logp(tuned))


def test_a_model_is_its_content(random_model: Path, tmp_path: Path) -> None:
    """Identity: weights, tokenizer and template decide; where the folder lies, and what it is called, does not."""
    first, moved = tmp_path / "first", tmp_path / "else" / "where+now"
    shutil.copytree(random_model, first)
    shutil.copytree(first, moved)
    (moved / "README.md").write_text("notes")
    identity = content_identity(str(first), str(first), None)
    assert identity.startswith("first@")
    assert content_of(identity) == content_of(content_identity(str(moved), str(moved), None))
    edited = {
        "chat_template.jinja": lambda text: text + " ",
        "tokenizer_config.json": lambda text: text.replace("}", " }"),
        "generation_config.json": lambda text: text + "\n",
    }
    known = {content_of(identity)}
    for name, edit in edited.items():
        path = first / name
        path.write_text(edit(path.read_text() if path.exists() else "{}"))
        known.add(content_of(content_identity(str(first), str(first), None)))
    weights = first / "model.safetensors"
    middle = bytearray(weights.read_bytes())
    middle[len(middle) // 2] ^= 1
    weights.write_bytes(middle)
    known.add(content_of(content_identity(str(first), str(first), None)))
    assert len(known) == 5


def test_the_embedded_model_is_the_one_its_pairs_name() -> None:
    identity = content_identity("embedded", model_source("embedded"), None)
    assert {pair.model for pair in read_pairs("embedded", load_template(PolicyOptions()), "thinking")} == {identity}


def edited(source: Path, folder: Path, weights: Callable[[dict[str, torch.Tensor]], object], **config: object) -> Path:
    """A copy of a model's folder with other weights or settings."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    weights(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


NAME = "model.layers.1.mlp.up_proj.weight"
DAMAGED = {
    "missing": (lambda t: t.pop(NAME), {}, f"without weights for {re.escape(NAME)} \\("),
    "left over": (lambda t: t.update({"model.layers.1.odd.weight": torch.zeros(2)}), {}, "no place for: .*odd.weight"),
    "of another shape": (lambda t: t.update({NAME: torch.zeros(3, 4)}), {}, f"other shapes .* {re.escape(NAME)}"),
    "of another family": (lambda t: None, {"model_type": "llama"}, "no place for: .*k_proj.bias.* and .* more"),
    "all of another family": (lambda t: None, {"model_type": "gpt2"}, "without weights for .*; with weights that"),
    "called by two names": (
        lambda t: None,
        {"architectures": ["LlamaForCausalLM"]},
        "calls it LlamaForCausalLM, but `model_type='qwen2'` is Qwen2ForCausalLM",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_random_numbers_never_stand_for_weights(case: str, random_model: Path, tmp_path: Path) -> None:
    weights, config, words = DAMAGED[case]
    folder = edited(random_model, tmp_path / "model", weights, **config)
    with pytest.raises(UserError, match=words):
        load_policy(str(folder), device="cpu")


def test_buffers_of_older_checkpoints_are_no_weights(random_model: Path, tmp_path: Path) -> None:
    old = edited(
        random_model,
        tmp_path / "model",
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
    )
    assert logp(load_policy(str(old), device="cpu")) == logp(load_policy(str(random_model), device="cpu"))


@pytest.mark.parametrize("device", ["meta", "cuda:77", "gpu", "cpu:x", "", "vulkan"])
def test_a_device_without_numbers_is_refused(device: str, random_model: Path) -> None:
    with pytest.raises(UserError, match=r"`device=.*not available here|`device"):
        load_policy(str(random_model), device=device)


def adapters() -> dict[str, tuple[object, str | None]]:
    """PEFT configurations, and why each is refused; None where it scores exactly."""
    import peft

    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    lora: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], **task}
    return {
        "prompt": (peft.PromptTuningConfig(num_virtual_tokens=3, **task), "kind PROMPT_TUNING"),
        "prefix": (peft.PrefixTuningConfig(num_virtual_tokens=3, **task), "kind PREFIX_TUNING"),
        "p-tuning": (peft.PromptEncoderConfig(num_virtual_tokens=3, **task), "kind P_TUNING"),
        "ia3": (peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], **task), "kind IA3"),
        "loha": (peft.LoHaConfig(r=2, target_modules=["q_proj"], **task), "kind LOHA"),
        "bias": (peft.LoraConfig(bias="lora_only", **lora), "trains biases"),
        "all biases": (peft.LoraConfig(bias="all", **lora), "trains biases"),
        "dora": (peft.LoraConfig(use_dora=True, **lora), None),
        "rslora": (peft.LoraConfig(use_rslora=True, **lora), None),
        "lora bias": (peft.LoraConfig(lora_bias=True, **lora), None),
        "saved modules": (peft.LoraConfig(modules_to_save=["embed_tokens"], **lora), None),
        "plain": (peft.LoraConfig(**lora), None),
    }


@pytest.mark.parametrize("case", adapters())
def test_adapters_score_exactly_or_are_refused_by_name(case: str, random_model: Path, tmp_path: Path) -> None:
    """Truth: the adapted model's own call on the sequence, and the base model's for the reference."""
    from peft import get_peft_model

    config, words = adapters()[case]
    torch.manual_seed(0)
    base = load_policy(str(random_model), device="cpu", dtype="float64").model
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    untouched = truth(base, tokens)
    model = get_peft_model(base, config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    if words is not None:
        for attempt in (
            lambda: load_policy(str(random_model), adapter=str(tmp_path), device="cpu"),
            lambda: load_policy(model, load_policy(str(random_model)).tokenizer),
            lambda: BVPOTrainer(str(random_model), BVPOConfig(use_cpu=True), "embedded", peft_config=config),
        ):
            with pytest.raises(UserError, match=words):
                attempt()
        return
    policy = load_policy(str(random_model), adapter=str(tmp_path), device="cpu", dtype="float64")
    assert not policy.at_reference
    assert logp(policy) == pytest.approx(truth(model, tokens), rel=1e-9)
    assert abs(logp(policy) - untouched) > 1e-4
    with policy.reference():
        assert logp(policy) == pytest.approx(untouched, rel=1e-9)


def truth(model: Any, tokens: torch.Tensor) -> float:
    """Log-probability of the tokens from the fourth on, from the logits of the model's own call."""
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.double()
    logps = torch.log_softmax(logits[0, 2:-1], -1)
    return float(logps.gather(1, tokens[0, 3:, None]).sum())


def test_an_adapter_that_is_a_pickle_is_refused(random_model: Path, tmp_path: Path) -> None:
    tuned = load_policy(str(random_model), lora=2, device="cpu")
    tuned.model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors \(adapter_model\.bin is not read"):
        load_policy(str(random_model), adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_policy(str(random_model), adapter=str(tmp_path))


def test_an_adapter_is_its_content_wherever_its_base_lies(random_model: Path, tmp_path: Path) -> None:
    tuned = load_policy(str(random_model), lora=2, device="cpu")
    tuned.model.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    settings = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "elsewhere"
    (tmp_path / "two" / "adapter_config.json").write_text(json.dumps(settings))
    one, two = (content_of(content_identity(n, str(tmp_path / n), None)) for n in ("one", "two"))
    assert one == two
    settings["lora_alpha"] += 1
    (tmp_path / "two" / "adapter_config.json").write_text(json.dumps(settings))
    assert content_of(content_identity("two", str(tmp_path / "two"), None)) != one


def test_a_model_in_memory_goes_by_its_content(random_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(random_model, tmp_path / "moved")

    def loaded(folder: Path) -> tuple[Any, Any]:
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    known = content_of(load_policy(str(random_model), device="cpu").identity)
    model, tokenizer = loaded(tmp_path / "moved")
    assert content_of(load_policy(model, tokenizer).identity) == known
    half = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.bfloat16)
    assert content_of(load_policy(half, tokenizer).identity) == known  # the dtype stands beside the identity
    tuned = with_lora(load_policy(model, tokenizer), LoraOptions(r=2))
    assert content_of(loaded_identity(tuned.model, tokenizer)) == known  # B = 0
    with torch.no_grad():
        for name, weight in tuned.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    assert content_of(loaded_identity(tuned.model, tokenizer)).startswith(f"{known}+")
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] += 0.5
    changed = content_of(load_policy(model, tokenizer).identity)
    again, _ = loaded(random_model)
    with torch.no_grad():
        again.get_input_embeddings().weight[5, 0] += 0.5
    again.config._name_or_path = again.config.name_or_path = "elsewhere"
    assert content_of(load_policy(again, tokenizer).identity) == changed != known  # whatever it is called
    tokenizer.chat_template += " "
    again, _ = loaded(random_model)
    assert content_of(load_policy(again, tokenizer).identity) not in (known, changed)
    assert content_of(with_tokenizer(load_policy(str(random_model), device="cpu"), tokenizer).identity) != known
