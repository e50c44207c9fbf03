"""A TRL user's script and datasets: text, messages and ids, with and without a prompt column."""

from __future__ import annotations

import ast
import functools
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, load_policy
from bvpo_stats.training import BVPOTrainer
from tests.training.records import settings

SCRIPT = Path(__file__).parents[2] / "examples" / "trl_user.py"
SIZE = 8


def test_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(SCRIPT))["trainer"]
    text, messages = (
        ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{'eval_rewards")
    )
    assert text == messages  # the layouts say the same, so they train the same
    assert text["eval_trace/rewards/margins"] > 0.005
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 4]


def texts(trace: bool) -> list[dict[str, Any]]:
    """Prompt, chosen and rejected as text; prompts of a user, not rendered ones."""
    found = []
    for n in range(SIZE):
        sides = {"chosen": 2 * n, "rejected": 2 * n + 1}
        row = {side: (f"{n}+{n}={v}</think>" if trace else "") + f"It is {v}." for side, v in sides.items()}
        found.append({"prompt": f"What is {n}+{n}?"} | row)
    return found


def messages(row: dict[str, Any]) -> dict[str, Any]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}


def implicit(row: dict[str, Any]) -> dict[str, Any]:
    found = messages(row)
    return {side: found["prompt"] + found[side] for side in ("chosen", "rejected")} | {"score": 1.0}


def ids(row: dict[str, Any]) -> dict[str, Any]:
    """What TRL's own tokenisation of the rendered prompt and the completion gives."""
    tokenizer = load_policy_once().tokenizer
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
    )
    encoded = {"prompt_ids": tokenizer.encode(prompt, add_special_tokens=False)}
    for side in ("chosen", "rejected"):
        encoded[f"{side}_ids"] = tokenizer.encode(row[side] + tokenizer.eos_token, add_special_tokens=False)
    return encoded


@functools.cache
def load_policy_once() -> Policy:
    return load_policy(device="cpu")


@pytest.mark.parametrize("layout", [messages, implicit, ids])
def test_layouts_say_the_same(tmp_path: Path, layout: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    args = settings(tmp_path)
    known = BVPOTrainer(load_policy_once(), args, texts(trace=True), texts(trace=False))
    d_e = texts(trace=False)
    d_t = datasets.Dataset.from_list([layout(row) for row in texts(trace=True)])
    found = BVPOTrainer(load_policy_once(), args, d_t, d_e)
    for ours, theirs in zip(found.selection.train, known.selection.train, strict=True):
        assert ours.prompt_id == theirs.prompt_id
        for one, other in zip(ours.pairs, theirs.pairs, strict=True):
            assert (one.prompt_ids, one.chosen_ids, one.rejected_ids) == (
                other.prompt_ids,
                other.chosen_ids,
                other.rejected_ids,
            )
    trace, empty = known.selection.train[0].pairs
    assert trace.prompt_ids == empty.prompt_ids
    assert (trace.mode, empty.mode) == ("thinking", "nothinking")
    assert empty.chosen.startswith("</think>")


def test_trl_tokenises_to_the_same_ids(tmp_path: Path) -> None:
    """TRL's DPOTrainer on the rendered prompts, against this trainer's pairs of the same rows."""
    trl = pytest.importorskip("trl")
    policy = load_policy_once()
    known = BVPOTrainer(policy, settings(tmp_path, alpha=1.0), texts(trace=True))
    rendered = [row | {"prompt": policy.template.prompt_text(row["prompt"], "thinking")} for row in texts(trace=True)]
    args = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False)
    theirs = trl.DPOTrainer(
        model=policy.model, args=args, train_dataset=datasets.Dataset.from_list(rendered),
        processing_class=policy.tokenizer,
    )  # fmt: skip
    bos = policy.tokenizer.bos_token_id
    for row, example in zip(theirs.train_dataset, known.selection.train, strict=True):
        pair = example.trace_pair
        assert pair.prompt_ids[0] == bos
        assert (tuple(row["chosen_ids"]), tuple(row["rejected_ids"])) == (pair.chosen_ids, pair.rejected_ids)
        assert tuple(row["prompt_ids"]) == pair.prompt_ids


def test_rows_that_are_no_pairs(tmp_path: Path) -> None:
    for changed, words in (
        ({"rejected": None}, "train_dataset, row 3: no column `rejected`"),
        ({"chosen": "<think>1</think>2</think>3"}, "train_dataset, row 3: `chosen` has a doubled think tag"),
    ):
        rows = texts(trace=True)
        rows[2] |= changed
        with pytest.raises(UserError, match=words):
            BVPOTrainer(load_policy_once(), settings(tmp_path), rows, texts(trace=False))
