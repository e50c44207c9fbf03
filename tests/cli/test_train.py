"""``bvpo-stats train`` as a user types it: what it writes, and one clear line for input that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bvpo_stats.training.presets import PAPER_MODELS, preset
from tests.cli.running import failed_politely, run, run_process
from tests.training.records import write_run


@pytest.fixture(scope="module")
def pairs(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(random_model, tmp_path_factory.mktemp("cli-train") / "pairs", 24)


def arguments(model: Path, pairs: Path, output: Path) -> list[object]:
    return ["train", "--model", model, "--pairs", pairs, "--batch-size", 8, "--max-steps", 2, "--lora-r", 2,
            "--learning-rate", 1e-2, "--device", "cpu", "--output", output]  # fmt: skip


def test_config_file_tensorboard_and_the_report(random_model: Path, pairs: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("alpha: 0.25\nbeta: 0.2\nreport-to: tensorboard\nmax_steps: 3\n", encoding="utf-8")
    done = run(*arguments(random_model, pairs, tmp_path / "run"), "--config", config)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["study"], report["method"], report["steps"]) == ("train", "bvpo", 2)  # the command line wins
    assert report["loss"] == {"loss_type": "sigmoid", "beta": 0.2}
    assert [point["alpha"] for point in report["alpha"]["trajectory"]] == [0.25, 0.25]
    assert "took the loss, that of D_t from 0.6931 to 0.6" in done.stdout
    assert "Reward margin" in (tmp_path / "run" / "report.md").read_text()
    for name in ("loss", "reward_margins"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 5_000
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert events
    assert "rewards/margins" in tags(events[0].parent)


def tags(folder: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return [tag.removeprefix("train/") for tag in found.Tags()["scalars"]]


@pytest.mark.parametrize(("method", "loss"), [("dpo", "sigmoid"), ("simpo", "simpo")])
def test_baselines_train_on_traces_alone(
    random_model: Path, pairs: Path, tmp_path: Path, method: str, loss: str
) -> None:
    done = run(*arguments(random_model, pairs / "thinking.jsonl", tmp_path / "run"), "--method", method)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["loss"]["loss_type"] == loss
    assert "empty/loss" not in report["history"][0]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--alpha", "1.5"], "alpha 1.5"),
        (["--alpha", "best"], "give a number"),
        (["--alpha", "0.5", "--method", "dpo"], "--method dpo trains on D_t alone"),
        (["--method", "ppo"], "Choose one of dpo, simpo, bvpo"),
        (["--preset", "gpt"], "r1-qwen-7b"),
        (["--loss", "hinge"], "sigmoid, simpo, ipo"),
        (["--eta-l", "fast"], "--eta-l fast"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--batch-size", "64"], "fewer than one batch of 64"),
        (["--report-to", "nobody"], "--report-to nobody"),
        (["--scheduler", "staircase"], "staircase"),
        (["--resume"], "no checkpoint to go on from"),
        (["--limit", "0"], "--limit 0"),
    ],
)
def test_wrong_settings(random_model: Path, pairs: Path, tmp_path: Path, extra: list[str], words: str) -> None:
    failed_politely(run(*arguments(random_model, pairs, tmp_path / "run"), *extra), words)


def test_a_prompt_in_one_set_only(random_model: Path, pairs: Path, tmp_path: Path) -> None:
    rows = (pairs / "nothinking.jsonl").read_text().splitlines()
    (tmp_path / "nothinking.jsonl").write_text("\n".join(rows[1:]) + "\n")
    command = [*arguments(random_model, pairs, tmp_path / "run"), "--empty-pairs", tmp_path / "nothinking.jsonl"]
    failed_politely(run(*command), "Prompt q0 is in D_t only", "--unmatched drop")
    done = run(*command, "--unmatched", "drop")
    assert done.returncode == 0, done.stderr
    assert "only one of D_t and D_e has them" in done.stdout


def test_without_traces_what_is_taken_for_granted_is_said(random_model: Path, pairs: Path, tmp_path: Path) -> None:
    done = run(*arguments(random_model, pairs, tmp_path / "bare"), "--alpha", "adaptive")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bare" / "report.json").read_text())
    assert report["alpha"]["mu"].startswith(
        "there is no trace bank: the trace gradient's bias E g_t - mu is taken as 0"
    )
    assert report["before"]["prompts"] == report["after"]["prompts"]


def test_the_sentence_on_alpha_quotes_no_step_that_moves_nothing(
    random_model: Path, pairs: Path, tmp_path: Path
) -> None:
    """A few steps: nothing is known while the learning rate is above 0, and eta L could not be measured."""
    adaptive = ("--alpha", "adaptive", "--batch-size", 1, "--max-steps")
    result = run(*arguments(random_model, pairs, tmp_path / "few"), *adaptive, 2)
    assert result.returncode == 0, result.stderr
    words = (tmp_path / "few" / "report.md").read_text()
    assert "had nothing to estimate from" in words
    assert "2 steps of 1 prompt took the loss" in words
    assert "eta L 1 at the peak learning rate (assumed: too few steps to measure it)" in words
    assert run(*arguments(random_model, pairs, tmp_path / "more"), *adaptive, 8).returncode == 0
    report = json.loads((tmp_path / "more" / "report.json").read_text())
    assert report["alpha"]["trajectory"][-1]["eta_l"] == 0  # the schedule is over
    words = (tmp_path / "more" / "report.md").read_text()
    assert "at the largest steps" in words
    assert "eta L = 0)" not in words
    assert "if the trace gradient's bias is 0, at which no trace bank looked" in words


def test_nan_weights_are_named(random_model: Path, pairs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(random_model)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(random_model).save_pretrained(tmp_path / "broken")
    failed_politely(run(*arguments(tmp_path / "broken", pairs, tmp_path / "run")), "NaN or infinite", "pair q")


def test_another_configuration_in_the_same_folder(random_model: Path, pairs: Path, tmp_path: Path) -> None:
    command = arguments(random_model, pairs, tmp_path / "run")
    assert run(*command).returncode == 0
    failed_politely(run(*command, "--seed", 1), "different run", "seed: 0 there, 1 now")
    assert run(*command).returncode == 0  # the finished run is shown again


def test_presets_are_the_papers_tables() -> None:
    for name in PAPER_MODELS:
        dpo, simpo, bvpo = (preset(name, method) for method in ("dpo", "simpo", "bvpo"))
        for found in (dpo, simpo, bvpo):
            assert (found.learning_rate, found.batch_size, found.epochs, found.max_length) == (7e-7, 128, 1.0, 4096)
            assert (found.scheduler, found.warmup, found.lora_r) == ("cosine", 0.1, 0)
        assert (dpo.beta, dpo.alpha) == (0.01, 1.0)
        assert (simpo.loss, simpo.beta, simpo.gamma) == ("simpo", 2.5, 1.0)
        assert (bvpo.beta, bvpo.alpha) == (0.1 if name == "r1-0528-qwen3-8b" else 0.01, 0.5)


def test_help_has_examples() -> None:
    done = run("train", "--help")
    assert done.returncode == 0
    assert "--alpha adaptive" in done.stdout


def test_in_a_process_of_its_own_there_is_no_traceback(tmp_path: Path) -> None:
    failed_politely(run_process("train", "--alpha", "2", "--output", tmp_path / "run"), "alpha 2")
