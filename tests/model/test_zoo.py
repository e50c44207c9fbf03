"""One model of each kind in the zoo (`make zoo` has all 67): exact, or refused by name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.policy import Policy, load_policy
from bvpo_stats.model.scores import check_alone, completion_logprobs


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    """The benchmark's script, as a module."""
    spec = importlib.util.spec_from_file_location("zoo", Path(__file__).parents[2] / "benchmarks" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


KINDS = {
    "gpt2": "learned positions, transposed weights",
    "mistral_sliding": "a window of attention",
    "bloom": "padding that spoils its neighbours in float64",
    "minimax": "a mixture of experts, and a state that padding enters",
    "deepseek_v3": "heads between sequences and tokens",
    "phi3_longrope": "positions that would depend on the longest sequence of the batch",
    "cohere_scaled": "logits that are changed behind the head",
    "minicpm3": "a model that transformers cannot sample from",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_each_kind_is_exact_or_refused_by_name(name: str, zoo: ModuleType, tmp_path: Path) -> None:
    zoo.build(name, tmp_path)
    outcome = zoo.examine(name, tmp_path)
    assert outcome.expected, outcome


def test_the_zoo_notices_what_is_wrong(zoo: ModuleType) -> None:
    for wrong in ({"draws": "WRONG: by batch"}, {"scores": "FAILED: KeyError"}, {"scores": "refused: why"},
                  {"positions": 8}, {"attention": "WRONG"}):  # fmt: skip
        fields = {"draws": "exact", "scores": "exact", "attention": None, "positions": None} | wrong
        assert not zoo.Outcome("qwen3", logp_error=0.0, score_error=0.0, seconds=0.0, **fields).expected


def test_a_model_that_depends_on_its_batch_is_refused(
    zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LongRoPE beyond the positions at which its frequencies change: each batch agrees with itself, and is wrong."""
    zoo.build("phi3_longrope", tmp_path)
    policy = load_policy(str(tmp_path), device="cpu")
    short, long = TokenSequence((5, 6, 7), (8, 9, 3)), TokenSequence((5, 6, 7), tuple(range(10, 70)))
    with pytest.raises(UserError, match=r"b: 63 tokens, .* for 40 \(where the frequencies of its longrope"):
        completion_logprobs(policy, [short, long], ["a", "b"])
    monkeypatch.setattr(Policy, "max_positions", 512)
    with pytest.raises(UserError, match="Phi3ForCausalLM gives a sequence of 6 tokens other log-probabilities beside"):
        check_alone(policy, [short, long])
    check_alone(policy, [short, TokenSequence((5, 6, 7), tuple(range(10, 40)))])


def test_a_mixture_of_experts_works_in_float64_however_it_is_loaded(zoo: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    zoo.build("qwen3_moe", tmp_path)
    model, tokenizer = (kind.from_pretrained(tmp_path) for kind in (AutoModelForCausalLM, AutoTokenizer))
    sequence = TokenSequence((5, 6, 7), (8, 9, 3))
    (single,) = completion_logprobs(load_policy(str(tmp_path), device="cpu"), [sequence], ["it"])
    for policy in (
        load_policy(str(tmp_path), dtype="float64", device="cpu"),
        load_policy(model, tokenizer, dtype="float64"),
    ):
        assert policy.model.dtype == torch.float64
        (double,) = completion_logprobs(policy, [sequence], ["it"])
        assert double == pytest.approx(single, abs=1e-4)
