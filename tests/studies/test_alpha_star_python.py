"""`alpha_star` as a Python user calls it: the command's numbers, whatever form pairs have; the policy is left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, load_policy
from bvpo_stats.records import PreferencePair
from bvpo_stats.studies.alpha_star.config import AlphaConfig, AlphaInputs
from bvpo_stats.studies.alpha_star.report import AlphaReport
from bvpo_stats.studies.alpha_star.run import alpha_star, load_examples, run_alpha_star

PROMPTS = 6


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    return [pair for example in load_examples(AlphaInputs(limit=PROMPTS)).examples for pair in example.pairs]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("embedded", device="cpu")


@pytest.fixture(scope="module")
def report(policy: Policy, pairs: list[PreferencePair]) -> AlphaReport:
    return alpha_star(policy, pairs, lora=2)


def test_it_gives_the_numbers_of_the_command(report: AlphaReport, tmp_path: Path) -> None:
    written = run_alpha_star(AlphaConfig(inputs=AlphaInputs(limit=PROMPTS), lora_r=2), tmp_path)
    assert written is not None
    assert report.to_dict() == written.to_dict()
    assert report.n_prompts == PROMPTS
    assert report.subset.startswith("fresh LoRA adapter, rank 2")


def test_the_policy_stays_as_it_is(policy: Policy, pairs: list[PreferencePair]) -> None:
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    alpha_star(policy, pairs, lora=2, batch_size=1)
    assert not hasattr(policy.model, "disable_adapter")
    after = dict(policy.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_sets_apart_and_rows_give_the_same(policy: Policy, pairs: list[PreferencePair], report: AlphaReport) -> None:
    thinking, nothinking = ([pair for pair in pairs if pair.mode == mode] for mode in ("thinking", "nothinking"))
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "prompt_id")
    rows = [[{name: getattr(pair, name) for name in names} for pair in side] for side in (thinking, nothinking)]
    assert alpha_star(policy, thinking, nothinking, lora=2).to_dict() == report.to_dict()
    found = alpha_star(policy, *rows, lora=2, marginal="none")
    assert found.variance == report.variance


def test_a_policy_with_an_adapter_and_other_settings(pairs: list[PreferencePair], report: AlphaReport) -> None:
    policy = load_policy("embedded", lora=2, device="cpu")
    found = alpha_star(policy, pairs, batch_size=4, eta_l=0.5, level=0.9)
    assert (found.batch_size, found.eta_l, found.level) == (4, 0.5, 0.9)
    assert found.subset.startswith("loaded adapter")
    assert found.variance == report.variance  # the same adapter, by the same seed


def test_it_prints_and_shows_the_answer(report: AlphaReport, capsys: pytest.CaptureFixture[str]) -> None:
    print(report)
    printed = capsys.readouterr().out
    assert printed.startswith(report.answer)
    assert len(printed.splitlines()) == 1 + len(report.warnings)
    assert "<table>" in report._repr_html_()
    report.print()
    printed = capsys.readouterr().out
    assert "bias-only limit" in printed
    assert "Written" not in printed


def test_bad_input_is_told_in_fields(policy: Policy, pairs: list[PreferencePair]) -> None:
    with pytest.raises(UserError, match="batch size"):
        alpha_star(policy, pairs, batch_size=0)
    thinking = [pair for pair in pairs if pair.mode == "thinking"]
    others = [replace(pair, prompt_id=f"x{pair.prompt_id}") for pair in pairs if pair.mode == "nothinking"]
    with pytest.raises(UserError, match="share no prompts"):
        alpha_star(policy, thinking, others)
    with pytest.raises(UserError, match=f"{PROMPTS} prompts .* fewer than the 20"):
        alpha_star(policy, pairs, groups=20)
