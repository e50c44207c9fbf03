"""Loading policies from names and from loaded models, and adapters that leave what they are put on as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.options import PolicyOptions
from bvpo_stats.model.policy import Policy, load_policy, with_lora
from bvpo_stats.model.scores import completion_logprobs
from bvpo_stats.model.subset import LoraOptions, lora_subset
from bvpo_stats.sampling.engines.transformers_engine import TransformersEngine


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
    assert by_name.identity == by_options.identity
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
