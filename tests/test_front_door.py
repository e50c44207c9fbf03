"""The front door: every name opens, and the programs that the issue promises run in ten lines each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bvpo_stats as bvpo
from tests.processes import python

ROOT = Path(__file__).parents[1]


def test_every_name_opens() -> None:
    assert sorted(bvpo._HOMES) == sorted(bvpo.__all__) == bvpo.__all__
    for name in bvpo.__all__:
        assert getattr(bvpo, name).__doc__, name
        assert name in dir(bvpo)
    with pytest.raises(AttributeError, match="no attribute 'alpha'"):
        _ = bvpo.alpha


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/from-python.md"])
def test_the_pages_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a page, in order, as a reader would paste them; what they promise in words is checked below."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in blocks(ROOT / name):
        exec(compile(block, name, "exec"), scope)
    report, star = scope["report"], bvpo.alpha_from_gradients(scope["g"].t, scope["g"].e, batch_size=128)
    assert isinstance(report, bvpo.AlphaReport)
    assert report.alpha_star is not None
    # "the same weight, the same interval"
    np.testing.assert_allclose(
        [star.value, star.low, star.high],
        [report.alpha_star.value, report.alpha_star.low, report.alpha_star.high],
        rtol=1e-5,
    )


def test_the_tasks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(ROOT / "docs/tasks.md"):
        exec(compile(block, "tasks.md", "exec"), {})


@pytest.fixture(scope="module")
def policy() -> bvpo.Policy:
    return bvpo.load_policy("embedded", lora=4)


@pytest.fixture(scope="module")
def samples(policy: bvpo.Policy) -> list[bvpo.Completion]:
    return bvpo.sample(policy, list(bvpo.read_records("embedded", bvpo.Prompt))[:8], n=3, temperature=1.0)


def test_rewards_of_ones_own(samples: list[bvpo.Completion]) -> None:
    pairs = bvpo.make_pairs(samples, reward=lambda prompt, answer: float(len(answer)))
    assert pairs
    assert all(len(pair.chosen_answer or "") > len(pair.rejected_answer or "") for pair in pairs)


@pytest.mark.parametrize(
    "reward", [lambda prompt, answer: float("nan"), lambda prompt, answer: None, lambda prompt, answer: [1.0, 2.0]]
)
def test_rewards_that_are_none(samples: list[bvpo.Completion], reward: Any) -> None:
    with pytest.raises(bvpo.UserError, match="reward"):
        bvpo.make_pairs(samples, reward=reward)


def test_a_policy_without_lora_is_told_so(samples: list[bvpo.Completion]) -> None:
    plain = bvpo.load_policy("embedded")
    pairs = bvpo.make_pairs(samples, reward="embedded")
    with pytest.raises(bvpo.UserError, match="lora"):
        bvpo.pair_gradients(plain, pairs)


def test_sets_without_common_prompts(policy: bvpo.Policy, samples: list[bvpo.Completion]) -> None:
    pairs = bvpo.make_pairs(samples, reward="embedded")
    first = pairs[0].prompt_id
    apart = [pair for pair in pairs if (pair.mode == "thinking") == (pair.prompt_id == first)]
    with pytest.raises(bvpo.UserError, match="share no prompts") as told:
        bvpo.alpha_star(policy, apart)
    assert "--" not in str(told.value)


def test_columns_are_named(policy: bvpo.Policy) -> None:
    with pytest.raises(bvpo.UserError, match="chosen"):
        bvpo.BVPOTrainer(policy, train_dataset=[{"question": "1 + 1?", "good": "2", "bad": "3"}])


@pytest.mark.parametrize(
    "call",
    [
        lambda: bvpo.load_policy(17),
        lambda: bvpo.sample(None, ["1 + 1?"]),
        lambda: list(bvpo.read_records("embedded", int)),
    ],
    ids=["model", "policy", "kind"],
)
def test_wrong_types_are_one_line(call: Any) -> None:
    with pytest.raises(bvpo.UserError) as told:
        call()
    assert "\n" not in str(told.value)


def test_bad_input_is_one_line_in_fields() -> None:
    """Several hundred wrong arguments, one at a time; in another process, where no type checker is in front of ours."""
    done = python("-m", "tests.front_door_bad_input")
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 900
    wrong = {
        name: outcome
        for name, outcome in outcomes.items()
        if outcome is None or outcome[0] != "UserError" or "\n" in outcome[1] or "--" in outcome[1] or not outcome[1]
    }
    assert not wrong
