"""TRL trains on D_t and D_e as they are: the pinned DPOTrainer, one step, the very tokens the sampler wrote."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from bvpo_stats.model.policy import PolicyOptions
from bvpo_stats.records import PreferencePair
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.pairs.run import PairsConfig, run_pairs
from tests.sampling.samples import write_samples
from tests.studies.test_pairs_run import synthetic


@pytest.mark.parametrize("mode", ["thinking", "nothinking"])
def test_dpo_trainer_takes_one_step_on_the_produced_pairs(tmp_path: Path, random_model: Path, mode: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    samples = write_samples(tmp_path / "s", synthetic(6))
    run_pairs(PairsConfig(samples, "embedded", PolicyOptions(device="cpu")), tmp_path / "o")
    table = datasets.load_dataset(str(tmp_path / "o"), mode, split="train", cache_dir=str(tmp_path / "cache"))
    trl_columns = table.select_columns(["prompt", "chosen", "rejected"])
    model = AutoModelForCausalLM.from_pretrained(random_model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            bf16=False,
        ),
        train_dataset=trl_columns,
        processing_class=AutoTokenizer.from_pretrained(random_model),
    )
    pairs = list(read_records(tmp_path / "o" / f"{mode}.jsonl", PreferencePair))
    assert len(trainer.train_dataset) == len(pairs)
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        assert tuple(row["prompt_ids"]) == pair.prompt_ids
        assert tuple(row["chosen_ids"]) == pair.chosen_ids
        assert tuple(row["rejected_ids"]) == pair.rejected_ids
    result = trainer.train()
    assert result.global_step == 1
    assert result.training_loss == pytest.approx(0.6931, abs=1e-3)  # -log sigmoid(0): policy and reference are equal
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert any(moved)


def test_the_whole_table_is_accepted_too(tmp_path: Path, random_model: Path) -> None:
    """With the exact-id columns left in: whatever TRL does with them, it must not change the tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    samples = write_samples(tmp_path / "s", synthetic(4))
    run_pairs(PairsConfig(samples, "embedded", PolicyOptions(device="cpu")), tmp_path / "o")
    table = datasets.load_dataset(str(tmp_path / "o"), "thinking", split="train", cache_dir=str(tmp_path / "cache"))
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(random_model),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", bf16=False
        ),
        train_dataset=table,
        processing_class=AutoTokenizer.from_pretrained(random_model),
    )
    pairs = list(read_records(tmp_path / "o" / "thinking.jsonl", PreferencePair))
    assert [tuple(row["chosen_ids"]) for row in trainer.train_dataset] == [pair.chosen_ids for pair in pairs]
    assert trainer.train().global_step == 1
