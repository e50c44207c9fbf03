"""bfloat16 arithmetic on float32 weights: close to float32, the reference through the same path, no step lost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Joined, join
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.reference import Reference
from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.head import arithmetic, token_logprobs
from bvpo_stats.model.policy import Policy, load_policy
from bvpo_stats.model.scores import batch_of, log_probabilities, score_pass
from bvpo_stats.model.subset import lora_subset
from bvpo_stats.sampling.layouts import all_pairs
from bvpo_stats.studies.train.config import TrainConfig
from bvpo_stats.training import BVPOConfig, BVPOTrainer
from bvpo_stats.training.gradient import PairModel, curvature_along
from bvpo_stats.training.presets import METHODS, PAPER_MODELS, preset
from bvpo_stats.training.trainer import weights_dtype
from tests.training.records import step_of

_RATE = 7e-7  # the paper's


def examples(policy: Policy, prompts: int = 8) -> Joined:
    return join(all_pairs("embedded", None, policy.template), unmatched="drop", limit=prompts)


def trainer(policy: Policy, folder: Path, data: Joined | None = None, **changes: Any) -> BVPOTrainer:
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": _RATE}
    settings |= {"bf16": True, "use_cpu": True, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
    settings |= {"lr_scheduler_type": "constant", "disable_tqdm": True, "output_dir": str(folder)}
    return BVPOTrainer(policy, BVPOConfig(**settings | changes), data or examples(policy))


def test_stored_values_of_another_arithmetic_are_not_taken(tmp_path: Path) -> None:
    policy = load_policy("embedded", lora=2, device="cpu")
    stored = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    joined = examples(policy)
    pairs = [replace(pair, **stored) for example in joined.examples for pair in example.both]
    found = trainer(policy, tmp_path, join(pairs), precompute_ref_log_probs=True)
    after = [pair for example in found._examples for pair in example.both]
    taken = {value for pair in after for value in (pair.ref_chosen_logps, pair.ref_rejected_logps)}
    assert not taken & {None, -1.0, -2.0}
    assert found.same_pairs()["trace/loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_with_an_adapter_the_loss_begins_at_log_2(tmp_path: Path) -> None:
    found = trainer(load_policy("embedded", lora=4, device="cpu"), tmp_path)
    found.train()
    (entry,) = (entry for entry in found.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert entry["rewards/margins"] == 0
    assert found.before is not None
    assert found.before["trace/loss"] == found.before["empty/loss"] == math.log(2)
    assert found.identity["arithmetic"] == "bfloat16"


def test_all_weights_stay_float32_and_move_at_the_papers_rate(tmp_path: Path) -> None:
    policy = load_policy("embedded", device="cpu")
    found = trainer(policy, tmp_path)
    before = [weight.detach().clone() for weight in found.policy.model.parameters()]
    found.train()
    after = list(found.policy.model.parameters())
    assert {weight.dtype for weight in after} == {torch.float32}
    moved = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
    assert moved > 0.99 * sum(weight.numel() for weight in before)
    (entry,) = (entry for entry in found.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-3)  # the reference was taken in other batches


def test_bfloat16_weights_at_that_rate_are_refused(tmp_path: Path) -> None:
    policy = load_policy("embedded", device="cpu", dtype="bfloat16")
    with pytest.raises(UserError, match=r"would move only 0\.\d+% of them .*`bf16=True` still computes in bfloat16"):
        trainer(policy, tmp_path, bf16=False)
    with pytest.raises(UserError, match="keeps the trained weights in float32, but they are bfloat16"):
        trainer(policy, tmp_path)
    with pytest.raises(UserError, match="`fp16=True`: not supported"):
        trainer(load_policy("embedded", lora=2, device="cpu"), tmp_path, bf16=False, fp16=True)


@pytest.fixture(scope="module")
def moved() -> Policy:
    """An adapter away from the reference, so that losses and curvature are not those of the start."""
    policy = load_policy("embedded", lora=4, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
            weight.requires_grad_("lora_" in name)
    return policy


def test_close_to_float32(moved: Policy, tmp_path: Path) -> None:
    found = [step_of(trainer(moved, tmp_path, bf16=bf16), 8) for bf16 in (False, True)]
    (exact, truth), (rounded, ours) = found
    assert rounded == pytest.approx(exact, abs=2e-3)  # measured: 5e-4, the gradient 2%
    assert rounded != exact
    flat = [np.concatenate([g.ravel() for g in gradient.values()]) for gradient in (truth, ours)]
    assert {weight.grad.dtype for weight in moved.model.parameters() if weight.grad is not None} == {torch.float32}
    assert np.linalg.norm(flat[1] - flat[0]) < 0.05 * np.linalg.norm(flat[0])


def test_curvature_is_taken_in_float32(moved: Policy) -> None:
    pairs = [example.both[0] for example in examples(moved, 4).examples]
    plain = PairModel(moved, Objective("dpo", 0.1), Reference(moved, stored=False), 16_384)
    direction = torch.cat([torch.ones_like(weight).flatten() for weight in plain.weights])
    found = []
    for model in (plain, replace(plain, precision=torch.bfloat16)):
        passes = [(micro, model.forward(micro)[0]) for micro in model.plan(pairs)[0]]
        found.append(curvature_along(model, passes, direction, 1e-3)[0])
    assert found[1] == pytest.approx(found[0], rel=0.02)  # the reference's rounding is left


def test_autocast_of_others_and_scores_under_any_are_refused(moved: Policy) -> None:
    batch = batch_of(moved, [TokenSequence((5, 6), (7, 8))], ["it"])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="autocast"):
        log_probabilities(moved.model, batch)
    with arithmetic(torch.bfloat16, moved.device):
        rounded = log_probabilities(moved.model, batch)
        with pytest.raises(UserError, match="autocast"):
            score_pass(moved.model, lora_subset(moved.model), batch, [])
        with arithmetic(None, moved.device):
            assert torch.equal(token_logprobs(moved.model, batch), log_probabilities(moved.model, batch))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, log_probabilities(moved.model, batch))


def test_presets_and_the_dtype_of_weights() -> None:
    for method in METHODS:
        assert all(preset(name, method).settings()["bf16"] for name in PAPER_MODELS)
        assert not preset("embedded", method).bf16
    assert preset("r1-qwen-7b", "bvpo").settings(bf16=False)["bf16"] is False
    assert TrainConfig().trains_all_weights is False
    assert TrainConfig(lora_r=0).trains_all_weights
    assert [weights_dtype(*asked) for asked in (("auto", True), ("auto", False), ("bfloat16", True))] == [
        "float32",
        "auto",
        "bfloat16",
    ]
