"""Evaluation as a TRL user knows it: evaluate(), predict(), eval_strategy, the best model at the end."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from peft import LoraConfig

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy
from bvpo_stats.records import PreferencePair
from bvpo_stats.training import BVPOConfig, BVPOTrainer
from tests.studies.test_alpha_star_runs import make_pair
from tests.training.records import adapted, both_sets, settings, step_of

PROMPTS, HELD_OUT = 12, 11
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")


def held_out(policy: Policy, mode: str) -> list[PreferencePair]:
    """Pairs of other prompts than the training's, a number that no batch size divides."""
    return [make_pair(policy, number, mode) for number in range(100, 100 + HELD_OUT)]


def trainer_of(policy: Policy, folder: Path, eval_dataset: object, **changes: object) -> BVPOTrainer:
    args = settings(folder, per_device_eval_batch_size=4, **changes)
    return BVPOTrainer(policy, args, both_sets(policy, PROMPTS), eval_dataset=eval_dataset)


def test_both_sets_are_weighed_by_alpha_and_shown_apart(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    sets = {"trace": held_out(policy, "thinking"), "empty": held_out(policy, "nothinking")}
    trainer = trainer_of(policy, tmp_path, sets, alpha=0.25)
    found = trainer.evaluate()
    for name in METRICS:
        weighed = 0.25 * found[f"eval_trace/{name}"] + 0.75 * found[f"eval_empty/{name}"]
        assert found[f"eval_{name}"] == pytest.approx(weighed, rel=1e-9), name
    # Each set's own numbers are those of a training step on it, of all of its pairs at once.
    for alpha, name in ((1.0, "trace"), (0.0, "empty")):
        args = settings(tmp_path, alpha=alpha, per_device_train_batch_size=HELD_OUT)
        step = BVPOTrainer(policy, args, sets["trace"], sets["empty"])
        loss, _ = step_of(step, HELD_OUT)
        assert found[f"eval_{name}/loss"] == pytest.approx(loss, rel=1e-6)
        metrics = step._metrics.take(lambda sums: sums)
        for metric in METRICS[1:]:
            assert found[f"eval_{name}/{metric}"] == pytest.approx(metrics[metric], rel=1e-6, abs=1e-9), metric


def test_d_t_alone_has_all_the_weight(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    trainer = trainer_of(policy, tmp_path, None, alpha=0.25)
    found = trainer.evaluate(held_out(policy, "thinking"))
    for name in METRICS:
        assert found[f"eval_{name}"] == found[f"eval_trace/{name}"]
    assert not any(name.startswith("eval_empty") for name in found)
    assert len(trainer._examples) == PROMPTS  # nothing is left behind


def test_predictions_are_the_values_behind_the_means(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    trainer = trainer_of(policy, tmp_path, None)
    pairs = held_out(policy, "thinking")
    found = trainer.predict(pairs)
    assert {len(values) for values in found.predictions.values()} == {HELD_OUT}
    margins = found.predictions["trace/rewards/margins"]
    assert found.metrics["test_rewards/margins"] == pytest.approx(margins.mean())
    assert found.metrics["test_rewards/accuracies"] == np.mean(margins > 0)
    alone = [trainer.predict([pair]).predictions["trace/rewards/margins"][0] for pair in pairs[:3]]
    np.testing.assert_allclose(alone, margins[:3], rtol=1e-5)


def test_several_datasets_are_evaluated_under_their_names(random_model: Path, tmp_path: Path) -> None:
    policy = adapted(random_model)
    thinking = held_out(policy, "thinking")
    trainer = trainer_of(policy, tmp_path, {"easy": thinking[:5], "hard": {"trace": thinking[5:]}})
    found = trainer.evaluate()
    assert found["eval_easy_rewards/margins"] != found["eval_hard_rewards/margins"]
    again = trainer.evaluate({"hard": thinking[5:]})
    assert again["eval_hard_loss"] == pytest.approx(found["eval_hard_loss"], rel=1e-6)


def test_the_best_model_comes_back_at_the_end(random_model: Path, tmp_path: Path) -> None:
    """A learning rate that first helps and then destroys: what is kept is the step with the best margin."""
    policy = adapted(random_model, drift=0.0)
    trainer = trainer_of(
        policy,
        tmp_path,
        held_out(policy, "thinking"),
        max_steps=6,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    margins = [entry["eval_rewards/margins"] for entry in entries]
    assert len(margins) == 6
    assert min(margins) != margins[-1]  # the last step is not the best, or nothing is shown
    assert trainer.state.best_metric == pytest.approx(min(margins))
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(min(margins), rel=1e-5)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 6
    assert all("rewards/margins" in entry and "eval_loss" not in entry for entry in steps)
    assert not any("alpha" in entry for entry in entries)


def test_full_fine_tuning_evaluates_against_its_first_weights(random_model: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicyOptions(model=str(random_model)))
    pairs = held_out(policy, "thinking")
    trainer = trainer_of(policy, tmp_path, pairs, learning_rate=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert trainer.evaluate(pairs[:3])["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    trainer.train()
    assert abs(trainer.evaluate()["eval_rewards/margins"]) > 1e-3
    with pytest.raises(UserError, match="the reference is gone"):
        trainer.evaluate(pairs[:3])


def test_trl_evaluates_to_the_same_numbers(random_model: Path, tmp_path: Path) -> None:
    """TRL's DPOTrainer on D_t, an adapter off the reference, against alpha = 1."""
    trl = pytest.importorskip("trl")
    policy = adapted(random_model)
    pairs = held_out(policy, "thinking")[:8]  # batches of one size: TRL averages over batches
    drifted = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    ours = trainer_of(policy, tmp_path, pairs, alpha=1.0).evaluate()
    for name, weight in policy.model.named_parameters():  # TRL copies the adapter it is given as the reference
        if "lora_B" in name:
            weight.data.zero_()
    rows = datasets.Dataset.from_list([{"prompt": "1", "chosen": "2", "rejected": "3"}])
    args = trl.DPOConfig(output_dir=str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, bf16=False,
                         report_to=[], gradient_checkpointing=False, beta=0.1)  # fmt: skip
    theirs = trl.DPOTrainer(model=policy.model, args=args, train_dataset=rows, processing_class=policy.tokenizer)
    for name, weight in theirs.model.named_parameters():
        if name in drifted:
            weight.data.copy_(drifted[name])
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    theirs.eval_dataset = datasets.Dataset.from_list([{n: list(getattr(pair, n)) for n in names} for pair in pairs])
    theirs.evaluate()
    found = theirs.state.log_history[-1]
    assert abs(found["eval_rewards/margins"]) > 1e-3
    for name in METRICS:
        assert ours[f"eval_{name}"] == pytest.approx(found[f"eval_{name}"], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"args": "fast"}, "`args` must be a BVPOConfig"),
        ({"model": 3}, "`model` must be a name"),
        ({"train_dataset": None}, "nothing to train on"),
        ({"args": BVPOConfig(use_cpu=True, eval_strategy="steps", eval_steps=1)}, "needs an `eval_dataset`"),
        ({"eval_dataset": []}, "`eval_dataset` holds no pairs"),
        ({"train_dataset": 3}, "`train_dataset` must be"),
        ({"peft_config": LoraConfig(r=2)}, "has an adapter already"),
        ({"model": "embedded", "peft_config": 16}, "`peft_config` must be a PEFT configuration, not a int"),
        ({"model": "embedded", "peft_config": LoraConfig(target_modules=["nowhere"])}, "`peft_config`: Target modules"),
    ],
)
def test_arguments_that_cannot_be(random_model: Path, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    policy = adapted(random_model)
    given = {"model": policy, "args": settings(tmp_path), "train_dataset": both_sets(policy, PROMPTS)} | changes
    with pytest.raises(UserError, match=words):
        BVPOTrainer(**given)
    if changes == {"train_dataset": None}:
        with pytest.raises(UserError, match="give `eval_dataset`"):
            trainer_of(policy, tmp_path, None).evaluate()
