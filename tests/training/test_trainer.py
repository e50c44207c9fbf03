"""Training with a fixed alpha: what a step is, what is saved, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import DTYPES, Policy, PolicyOptions, load_policy
from bvpo_stats.training.config import BVPOConfig, check_distribution, check_zero
from bvpo_stats.training.gradient import moving_share
from bvpo_stats.training.trainer import BVPOTrainer
from tests.training.records import adapted, both_sets, settings, step_of

PROMPTS = 12


def first_step(policy: Policy, folder: Path, **changes: object) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient of the first eight prompts."""
    return step_of(BVPOTrainer(policy, settings(folder, **changes), both_sets(policy, PROMPTS)), 8)


def test_the_step_is_linear_in_alpha_and_does_not_depend_on_the_microbatches(
    random_model: Path, tmp_path: Path
) -> None:
    ends = [first_step(adapted(random_model, "float64"), tmp_path, alpha=alpha) for alpha in (0.0, 1.0)]
    for max_tokens in (60, 400, 16_384):
        loss, gradient = first_step(adapted(random_model, "float64"), tmp_path, alpha=0.3, max_tokens=max_tokens)
        assert loss == pytest.approx(0.7 * ends[0][0] + 0.3 * ends[1][0], rel=1e-6)
        for name, value in gradient.items():
            np.testing.assert_allclose(value, 0.7 * ends[0][1][name] + 0.3 * ends[1][1][name], rtol=1e-9, atol=1e-12)


def test_stored_reference_gives_the_same_step(random_model: Path, tmp_path: Path) -> None:
    live = first_step(adapted(random_model, "float64"), tmp_path)
    stored = first_step(adapted(random_model, "float64"), tmp_path, precompute_ref_log_probs=True)
    assert stored[0] == pytest.approx(live[0], rel=1e-6)
    for name, value in stored[1].items():
        np.testing.assert_allclose(value, live[1][name], rtol=1e-9, atol=1e-12)


def test_stored_values_of_another_model_are_refused(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    pairs = both_sets(policy, PROMPTS)
    pairs[0] = replace(pairs[0], ref_chosen_logps=-1.0, ref_rejected_logps=-1.0)
    with pytest.raises(UserError, match="ref_chosen_logps of the thinking pair of prompt q0"):
        BVPOTrainer(policy, settings(tmp_path, precompute_ref_log_probs=True), pairs)


def test_checkpointing_changes_nothing(random_model: Path, tmp_path: Path) -> None:
    plain = first_step(adapted(random_model, "float64"), tmp_path)
    checkpointed = first_step(adapted(random_model, "float64"), tmp_path, gradient_checkpointing=True)
    for name, value in checkpointed[1].items():
        np.testing.assert_allclose(value, plain[1][name], rtol=1e-12, atol=1e-15)


def test_accumulated_batches_are_one_batch(random_model: Path, tmp_path: Path) -> None:
    """Two batches of four give the weights that one batch of eight gives."""
    found = []
    for size, accumulated in ((8, 1), (4, 2)):
        policy = adapted(random_model, "float64")
        args = settings(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=3
        )
        trainer = BVPOTrainer(policy, args, both_sets(policy, 16))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, {n: p.detach().clone() for n, p in policy.model.named_parameters() if "lora_" in n}))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-6, atol=1e-9)


def test_adapters_are_saved_in_pefts_format(random_model: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig

    policy = load_policy(PolicyOptions(model=str(random_model)))
    pairs = both_sets(policy, PROMPTS)
    args = settings(tmp_path, save_strategy="steps", save_steps=2)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = BVPOTrainer(
        str(random_model),
        args,
        [pair for pair in pairs if pair.mode == "thinking"],
        [pair for pair in pairs if pair.mode == "nothinking"],
        peft_config=adapter,
    )
    history = trainer.train()
    assert history.global_step == 4
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    trained = dict(trainer.policy.model.named_parameters())
    moved = 0.0
    for name, weight in loaded.named_parameters():
        torch.testing.assert_close(weight, trained[name])
        moved += float(weight.detach().abs().sum()) if "lora_B" in name else 0.0
    assert moved > 0
    again = load_policy(PolicyOptions(model=str(random_model), adapter=str(tmp_path / "checkpoint-4")))
    assert "+" in again.identity


def test_full_fine_tuning_keeps_its_first_weights_as_the_reference(random_model: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicyOptions(model=str(random_model)))
    trainer = BVPOTrainer(policy, settings(tmp_path, learning_rate=1e-3), both_sets(policy, PROMPTS))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # all rewards are 0 before the first step
    assert entries[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert entries[-1]["rewards/margins"] > 0.02
    assert all(weight.requires_grad for weight in policy.model.parameters())


def test_a_model_and_its_tokenizer_as_trl_takes_them(random_model: Path, tmp_path: Path) -> None:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bvpo_stats.records import to_dict

    policy = load_policy(PolicyOptions(model=str(random_model)))
    rows = [to_dict(pair) for pair in both_sets(policy, PROMPTS)]
    tables = [
        datasets.Dataset.from_list([row for row in rows if row["mode"] == mode]) for mode in ("thinking", "nothinking")
    ]
    trainer = BVPOTrainer(
        AutoModelForCausalLM.from_pretrained(random_model),
        settings(tmp_path, max_steps=1),
        *tables,
        processing_class=AutoTokenizer.from_pretrained(random_model),
    )
    assert trainer.train().global_step == 1
    with pytest.raises(UserError, match="processing_class"):
        BVPOTrainer(AutoModelForCausalLM.from_pretrained(random_model), settings(tmp_path), *tables)


def test_datasets_on_disk(random_model: Path, tmp_path: Path) -> None:
    """A run's folder with both sets, one file of each, and the pairs that ship with the package."""
    from bvpo_stats.store.tables import write_records

    policy = adapted(random_model)
    pairs = both_sets(policy, PROMPTS)
    known = BVPOTrainer(policy, settings(tmp_path), pairs)
    for mode in ("thinking", "nothinking"):
        for suffix in ("jsonl.gz", "parquet"):
            (tmp_path / suffix).mkdir(exist_ok=True)
            write_records(tmp_path / suffix / f"{mode}.{suffix}", [pair for pair in pairs if pair.mode == mode])
    both = BVPOTrainer(policy, settings(tmp_path), tmp_path / "jsonl.gz")
    files = [str(tmp_path / "parquet" / f"{mode}.parquet") for mode in ("thinking", "nothinking")]
    apart = BVPOTrainer(policy, settings(tmp_path), *files, eval_dataset=files[0])
    assert both.selection == apart.selection == known.selection
    assert len(apart.eval_dataset) == PROMPTS
    embedded = BVPOTrainer("embedded", settings(tmp_path, unmatched_prompts="drop"), "embedded")
    assert len(embedded.selection.train) > 100
    with pytest.raises(UserError, match="`train_dataset='nowhere'`"):
        BVPOTrainer(policy, settings(tmp_path), "nowhere")


def test_nan_names_the_batch_and_takes_no_step(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    trainer = BVPOTrainer(policy, settings(tmp_path), both_sets(policy, PROMPTS))
    weight = next(weight for name, weight in policy.model.named_parameters() if "lora_A" in name)
    weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"NaN or infinite log-probability in pair q\d+ \(thinking, chosen\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_gradient_that_is_not_finite_names_the_batch(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    trainer = BVPOTrainer(policy, settings(tmp_path), both_sets(policy, PROMPTS))
    weight = next(weight for name, weight in policy.model.named_parameters() if "lora_B" in name)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match=r"gradient of the batch with prompts q\d+, .* is NaN or infinite"):
        trainer.train()


def test_prompts_in_one_set_only(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    pairs = [p for p in both_sets(policy, PROMPTS) if not (p.prompt_id == "q3" and p.mode == "nothinking")]
    with pytest.raises(UserError, match=r"Prompt q3 is in D_t only \(1 in D_t alone and 0 in D_e alone\)"):
        BVPOTrainer(policy, settings(tmp_path), pairs)
    dropped = BVPOTrainer(policy, settings(tmp_path, unmatched_prompts="drop"), pairs)
    assert (len(dropped.selection.train), dropped.selection.unmatched) == (PROMPTS - 1, 1)
    alone = BVPOTrainer(policy, settings(tmp_path, alpha=1.0), pairs)  # DPO on D_t does not ask for D_e
    assert len(alone.selection.train) == PROMPTS


def test_long_pairs_are_set_aside_whole(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    pairs = both_sets(policy, PROMPTS)
    lengths = sorted(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs[:PROMPTS])
    trainer = BVPOTrainer(policy, settings(tmp_path, max_length=lengths[-4]), pairs)
    assert trainer.selection.too_long == sum(length > lengths[-4] for length in lengths)
    with pytest.raises(UserError, match="`max_length`"):
        BVPOTrainer(policy, settings(tmp_path, max_length=5), pairs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 1.5}, "`alpha=1.5`: must lie between 0"),
        ({"alpha": "-0.1"}, "`alpha=-0.1`: must lie between 0"),
        ({"alpha": "best"}, "`alpha='best'`: give a number"),
        ({"alpha_prior": 2.0, "alpha": "adaptive"}, "`alpha=2.0`: must lie between 0"),
        ({"alpha_rule": "best", "alpha": "adaptive"}, "`alpha_rule='best'`: choose one of rising, theorem4"),
        ({"alpha_level": 1.0, "alpha": "adaptive"}, "confidence levels lie between"),
        ({"eta_l": 0}, "`eta_l=0`"),
        ({"loss_type": "hinge"}, "sigmoid, simpo, ipo"),
        ({"loss_type": ["sigmoid", "ipo"]}, "sigmoid, simpo, ipo"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"unmatched_prompts": "keep"}, "`unmatched_prompts='keep'`: choose one of error, drop"),
        ({"max_tokens": 0}, "`max_tokens=0`"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BVPOConfig(output_dir=str(tmp_path), use_cpu=True, **changes)  # type: ignore[arg-type]


def test_a_single_loss_in_trls_spelling(tmp_path: Path) -> None:
    assert BVPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_type=["ipo"]).objective().name == "ipo"  # type: ignore[arg-type]


def test_fewer_prompts_than_a_batch(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    with pytest.raises(UserError, match="12 prompts to train on, fewer than one batch of 64"):
        BVPOTrainer(policy, settings(tmp_path, per_device_train_batch_size=64), both_sets(policy, PROMPTS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lora", [None, 2])
def test_16_bit_weights_at_a_rate_that_rounds_away_are_refused(
    dtype: str, lora: int | None, random_model: Path, tmp_path: Path
) -> None:
    policy = load_policy(str(random_model), lora=lora, device="cpu")
    policy.model.to(DTYPES[dtype])
    pairs = both_sets(policy, PROMPTS)
    words = rf"`learning_rate=7e-07` rounds away: the trained weights are {dtype}.*would move only .*% of them"
    with pytest.raises(UserError, match=words + r".*`dtype='float32'`"):
        BVPOTrainer(policy, settings(tmp_path, learning_rate=7e-7), pairs)
    BVPOTrainer(policy, settings(tmp_path, learning_rate=1e-2), pairs)
    sgd = torch.optim.SGD([w for w in policy.model.parameters() if w.requires_grad], lr=7e-7)
    with pytest.raises(UserError, match="rounds away"):  # an optimizer that brings a rate of its own
        BVPOTrainer(policy, settings(tmp_path, learning_rate=1e-2), pairs, optimizers=(sgd, None))
    policy.model.float()
    BVPOTrainer(policy, settings(tmp_path, learning_rate=7e-7), pairs)


def test_the_share_that_moves_is_that_of_an_adam_step() -> None:
    """Truth: Adam's first step, learning rate times the gradient's sign, on weights of a language model's size."""
    torch.manual_seed(0)
    for dtype, rate in ((torch.bfloat16, 7e-7), (torch.bfloat16, 3e-5), (torch.float16, 3e-6)):
        weight = torch.nn.Parameter((0.02 * torch.randn(200, 300)).to(dtype))
        before = weight.detach().clone()
        share = moving_share([weight], rate)
        weight.grad = torch.randn(200, 300).sign().to(dtype)
        torch.optim.SGD([weight], lr=rate).step()  # lr * sign(g), which is Adam's first step
        assert share == pytest.approx(float((weight != before).double().mean()), abs=0.01)
        assert 0.001 < share < 0.9
    wide = torch.nn.Parameter(torch.randn(5))
    assert moving_share([wide], 1e-12) == 1.0
    assert moving_share([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], 1e-12) == 1.0
    large = torch.nn.Parameter((0.02 * torch.randn(3, 1_000_003)).to(torch.bfloat16))
    assert moving_share([large], 3e-5) == pytest.approx(moving_share([large[0]], 3e-5), abs=0.01)


@pytest.mark.parametrize(
    ("variables", "changes", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP1 is not supported in training: set `fsdp_version: 2`"),
        ({}, {"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {}, "FSDP was asked for, but accelerate makes NO of it"),
        ({}, {"fsdp": True, "fsdp_config": {"version": 2}}, "FSDP2 was asked for in a single process"),
        ({}, {"fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": True}}, "offloaded to the CPU"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed was asked for"),  # and is not installed here, or NO of it
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM is not supported in training"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "tensor and context parallelism is not supported"),
    ],
)
def test_ways_to_shard_that_are_not_ours_are_refused_by_name(
    variables: dict[str, str],
    changes: dict[str, Any],
    words: str,
    random_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = adapted(random_model)
    pairs = both_sets(policy, PROMPTS)
    for variable in ("FSDP_CPU_RAM_EFFICIENT_LOADING", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(variable, "false")  # transformers and accelerate set them for good
    args = settings(tmp_path, **changes)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        BVPOTrainer(policy, args, pairs)


def test_distributed_types_that_are_not_ours_are_refused() -> None:
    args = BVPOConfig(use_cpu=True)
    for kind in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "FSDP"):
        check_distribution(args, kind)
    for kind in ("MEGATRON_LM", "XLA", "TP"):
        with pytest.raises(UserError, match=f"{kind} is not supported"):
            check_distribution(args, kind)


@pytest.mark.parametrize(
    ("zero", "changes", "words"),
    [
        (
            {"zero_optimization": {"stage": 1}},
            {},
            "ZeRO stage 1 is not supported .* to 2 or 3",
        ),
        ({}, {}, "ZeRO stage 0 is not supported"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}, "`offload_optimizer` is not"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, {}, "own `optimizer` is not supported"),
        ({"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}, {}, "own `scheduler` is not"),
        ({"zero_optimization": {"stage": 2}}, {"bf16": True}, "`bf16=True` is not supported under DeepSpeed"),
        ({"zero_optimization": {"stage": 3}}, {}, "no model could be saved: set `zero3_save_16bit_model: true`"),
        (
            {"zero_optimization": {"stage": 2}},
            {"alpha": "adaptive"},
            "`alpha='adaptive'` is not supported",
        ),
    ],
)
def test_what_deepspeed_would_do_to_the_weights_or_keep_from_us_is_refused(
    zero: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check_zero(BVPOConfig(use_cpu=True, **changes), zero)
    saves = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "offload_param": {"device": "none"}}
    for fine in ({"stage": 2}, saves):
        check_zero(BVPOConfig(use_cpu=True, alpha="0:0.2,5:0.7"), {"zero_optimization": fine})


def test_quantised_bases_and_optimizers_that_step_in_backward_are_refused(random_model: Path, tmp_path: Path) -> None:
    policy = load_policy(str(random_model), device="cpu")
    pairs = both_sets(policy, PROMPTS)
    policy.model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UserError, match="The model is quantised, so its weights cannot be trained"):
        BVPOTrainer(policy, settings(tmp_path), pairs)
    policy = adapted(random_model)
    with pytest.raises(UserError, match="`optim='adalomo'`: not supported"):
        BVPOTrainer(policy, settings(tmp_path, optim="adalomo"), pairs)


def test_what_was_frozen_in_an_adapter_stays_frozen(random_model: Path, tmp_path: Path) -> None:
    """PEFT marks all of an adapter as trained when it is enabled again behind the reference."""
    policy = adapted(random_model)
    trainer = BVPOTrainer(policy, settings(tmp_path, max_steps=2), both_sets(policy, PROMPTS))
    frozen = [weight for name, weight in policy.model.named_parameters() if "lora_A" in name]
    for weight in frozen:
        weight.requires_grad_(False)
    before = [weight.detach().clone() for weight in frozen]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    assert not any(weight.requires_grad for weight in frozen)


def test_a_step_without_any_gradient_is_an_error(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    pairs = both_sets(policy, PROMPTS)
    trainer = BVPOTrainer(policy, settings(tmp_path), pairs)
    stray = torch.nn.Parameter(torch.zeros(3))
    for weight in policy.model.parameters():
        weight.requires_grad_(False)
    policy.model.register_parameter("stray", stray)  # trainable, and no part of what is computed
    with pytest.raises(UserError, match="No trained weight has a gradient"):
        step_of(trainer, 4)
