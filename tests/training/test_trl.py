"""The same numbers as TRL: DPO on D_t at alpha = 1, on D_e at alpha = 0, IPO, SimPO; loss, gradient, metrics."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from bvpo_stats.model.policy import Policy
from bvpo_stats.records import PreferencePair
from bvpo_stats.training.trainer import BVPOTrainer
from tests.training.records import adapted, both_sets, gradients, settings, step_of

trl = pytest.importorskip("trl")
PROMPTS = 6


ANYTHING = datasets.Dataset.from_list([{"prompt": "1", "chosen": "2", "rejected": "3"}] * PROMPTS)
"""TRL's trainers tokenise text again when they are made; batches are put together from token ids afterwards."""


def ids_of(pair: PreferencePair) -> dict[str, list[int]]:
    """A tokenised pair as TRL's collator takes it."""
    return {name: list(getattr(pair, name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def trl_step(policy: Policy, pairs: list[PreferencePair], folder: Path, **loss: object) -> tuple[float, dict, dict]:
    """Loss, gradients and metrics of TRL's DPOTrainer on all pairs at once; its reference is the bare base model."""
    options = {"output_dir": str(folder), "per_device_train_batch_size": len(pairs), "use_cpu": True, "bf16": False,
               "report_to": [], "gradient_checkpointing": False, "remove_unused_columns": False} | loss  # fmt: skip
    drifted = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    for name, weight in policy.model.named_parameters():  # TRL copies the adapter it is given as the reference
        if "lora_B" in name:
            weight.data.zero_()
    trainer = trl.DPOTrainer(
        model=policy.model,
        args=trl.DPOConfig(**options),
        train_dataset=ANYTHING,
        processing_class=policy.tokenizer,
    )
    for name, weight in trainer.model.named_parameters():
        if name in drifted:
            weight.data.copy_(drifted[name])
    trainer.model.eval()
    inputs = trainer.data_collator([ids_of(pair) for pair in pairs])
    loss_value = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))
    loss_value.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items() if values}
    return float(loss_value.detach()), gradients(trainer.model), metrics


def our_step(policy: Policy, pairs: list[PreferencePair], folder: Path, **loss: object) -> tuple[float, dict, dict]:
    """The same of our trainer."""
    trainer = BVPOTrainer(policy, settings(folder, per_device_train_batch_size=PROMPTS, **loss), pairs)
    return *step_of(trainer, PROMPTS), trainer._metrics.take(lambda sums: sums)


@pytest.mark.parametrize(("alpha", "mode"), [(1.0, "thinking"), (0.0, "nothinking")])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_trainer(random_model: Path, tmp_path: Path, alpha: float, mode: str, loss_type: str) -> None:
    pairs = both_sets(adapted(random_model), PROMPTS)
    ours = our_step(adapted(random_model), pairs, tmp_path, alpha=alpha, loss_type=loss_type, max_tokens=200)
    one_set = [pair for pair in pairs if pair.mode == mode]
    theirs = trl_step(adapted(random_model), one_set, tmp_path, loss_type=[loss_type], beta=0.1)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert abs(ours[2]["rewards/margins"]) > 1e-3  # off the reference point, or the test says nothing
    compare(ours[1], theirs[1])
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert ours[2][name] == pytest.approx(theirs[2][name], rel=1e-4, abs=1e-6), name


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    theirs = {name: value for name, value in theirs.items() if ".ref." not in name}
    assert set(ours) == set(theirs)
    scale = np.sqrt(sum((value**2).sum() for value in theirs.values()))
    assert scale > 0
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)
    difference = np.sqrt(sum(((ours[name] - theirs[name]) ** 2).sum() for name in ours))
    assert difference <= 1e-5 * scale


def test_simpo(random_model: Path, tmp_path: Path) -> None:
    """TRL's CPOTrainer with ``loss_type="simpo"`` and without its NLL term; gamma is not in units of beta."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    policy = adapted(random_model)
    pairs = both_sets(policy, PROMPTS)
    constants = {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.0}
    ours = our_step(adapted(random_model), pairs, tmp_path, alpha=1.0, max_tokens=200, **constants)
    options = CPOConfig(output_dir=str(tmp_path), cpo_alpha=0.0, use_cpu=True, bf16=False, report_to=[],
                        gradient_checkpointing=False, remove_unused_columns=False, **constants)  # fmt: skip
    trainer = CPOTrainer(
        model=policy.model, args=options, train_dataset=ANYTHING, processing_class=policy.tokenizer, peft_config=None
    )
    trainer.model.eval()
    inputs = cpo_batch([pair for pair in pairs if pair.mode == "thinking"], policy.pad_id)
    value, metrics = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    value.backward()
    assert ours[0] == pytest.approx(float(value.detach()), rel=1e-5)
    compare(ours[1], gradients(trainer.model))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert ours[2][name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


def cpo_batch(pairs: list[PreferencePair], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch in CPOTrainer's layout; labels are -100 on prompts and padding."""
    batch = {}
    for side in ("chosen", "rejected"):
        completions = [getattr(pair, f"{side}_ids") for pair in pairs]
        width = max(len(pair.prompt_ids) + len(ids) for pair, ids in zip(pairs, completions, strict=True))
        found = {"input_ids": [], "attention_mask": [], "labels": []}
        for pair, ids in zip(pairs, completions, strict=True):
            start, padding = len(pair.prompt_ids), width - len(pair.prompt_ids) - len(ids)
            found["input_ids"].append([*pair.prompt_ids, *ids, *([pad_id] * padding)])
            found["attention_mask"].append([1] * (width - padding) + [0] * padding)
            found["labels"].append([-100] * start + list(ids) + [-100] * padding)
        batch |= {f"{side}_{name}": torch.tensor(rows) for name, rows in found.items()}
    return batch
