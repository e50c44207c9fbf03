"""alpha-star runs on files: two processes against one, the same folder again, and input that is wrong."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from bvpo_stats.cli.main import app

from bvpo_stats.errors import UserError
from bvpo_stats.model.metric import UnreadableMetricError, read_second_moments
from bvpo_stats.model.policy import PolicyOptions, load_policy
from bvpo_stats.model.subset import LoraOptions
from bvpo_stats.records import PreferencePair
from bvpo_stats.studies.alpha_star.config import AlphaConfig, AlphaInputs
from bvpo_stats.studies.alpha_star.run import prepare_subset, run_alpha_star
from tests.processes import start
from tests.studies.alpha_inputs import write_rows

N_PROMPTS = 24
LORA = LoraOptions(r=2, targets=("q_proj", "v_proj"))


def make_pair(policy, number: int, mode: str) -> PreferencePair:
    """A made-up pair of a real policy: any token ids will do for gradients."""
    rng = np.random.default_rng([number, mode == "thinking"])
    question = f"{number} + {number % 7}"
    prompt_ids = policy.template.prompt_ids(question, "thinking")
    closing = tuple(policy.template.empty_trace_ids(question)[1])
    sides = []
    for _ in range(2):
        answer = (*rng.integers(10, 40, size=3).tolist(), policy.eos_ids[0])
        trace = tuple(rng.integers(10, 40, size=int(rng.integers(2, 9))).tolist()) if mode == "thinking" else ()
        sides.append(((*trace, *closing, *answer), len(trace) + len(closing)))
    (chosen, first), (rejected, second) = sides
    return PreferencePair(
        prompt_id=f"q{number}",
        mode=mode,
        prompt=question,
        chosen="a",
        rejected="b",
        prompt_ids=tuple(prompt_ids),
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_answer_start=first,
        rejected_answer_start=second,
        chosen_answer="a",
        rejected_answer="b",
        chosen_reward=1.0,
        rejected_reward=0.0,
        chosen_index=0,
        rejected_index=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        cut_share=0.0,
        unclosed_share=0.0,
        model=policy.identity,
        template=policy.template.name,
    )


@pytest.fixture(scope="module")
def files(random_model, tmp_path_factory) -> dict[str, Path]:
    """A model folder and a pairs folder of 24 prompts."""
    policy = load_policy(PolicyOptions(model=str(random_model), dtype="float64"))
    folder = tmp_path_factory.mktemp("pairs")
    for mode in ("thinking", "nothinking"):
        write_rows(folder / f"{mode}.jsonl", [make_pair(policy, n, mode) for n in range(N_PROMPTS)])
    return {"model": random_model, "pairs": folder}


def config(files, **settings) -> AlphaConfig:
    return AlphaConfig(
        policy=PolicyOptions(model=str(files["model"]), dtype="float64"),
        inputs=AlphaInputs(pairs=str(files["pairs"])),
        lora_r=LORA.r,
        target_modules=LORA.targets,
        max_tokens=600,
        groups=10,
        **settings,
    )


@pytest.fixture(scope="module")
def single(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "single"
    return run_alpha_star(config(files), folder), folder


WORKER = """
import sys
from pathlib import Path
from bvpo_stats.model.policy import PolicyOptions
from bvpo_stats.studies.alpha_star.config import AlphaConfig, AlphaInputs
from bvpo_stats.studies.alpha_star.run import run_alpha_star

model, pairs, output = sys.argv[1:]
report = run_alpha_star(
    AlphaConfig(
        policy=PolicyOptions(model=model, dtype="float64"),
        inputs=AlphaInputs(pairs=pairs),
        lora_r=2,
        target_modules=("q_proj", "v_proj"),
        max_tokens=600,
        groups=10,
    ),
    Path(output),
)
print("led" if report is not None else "followed")
"""


@pytest.mark.slow
def test_two_gloo_processes_give_the_report_of_one(files, single, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    words, output = ("-c", WORKER, files["model"], files["pairs"]), tmp_path / "double"
    workers = [start(*words, output, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    said = [worker.wait() for worker in workers]
    assert [worker.returncode for worker in said] == [0, 0], said
    assert [worker.stdout.strip().splitlines()[-1] for worker in said] == ["led", "followed"]
    expected, found = (json.loads((folder / "report.json").read_text()) for folder in (single[1], output))
    assert found["n_prompts"] == N_PROMPTS
    assert_close(found, expected)
    assert len(list(output.glob("moments-*-of-00002.npz"))) == 2


def assert_close(found, expected, where="report"):
    """Equal, numbers to 1e-9."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert abs(found - expected) <= 1e-9 * max(1.0, abs(expected)), (where, found, expected)
    else:
        assert found == expected, where


def test_the_same_folder_answers_for_another_batch_size_without_the_model(files, single, tmp_path, monkeypatch):
    report, _ = single
    folder = tmp_path / "run"
    first = run_alpha_star(config(files, batch_size=128), folder)
    assert first == report
    monkeypatch.setattr("bvpo_stats.studies.alpha_star.run.gradient_batches", None)
    again = run_alpha_star(config(files, batch_size=4, eta_l=0.5), folder)
    assert (again.batch_size, again.eta_l) == (4, 0.5)
    assert again.variance == first.variance
    written = (folder / "report.json").read_text()
    assert run_alpha_star(config(files, batch_size=4, eta_l=0.5), folder).to_json() == written
    assert "alpha" in (folder / "report.md").read_text()


def test_an_optimizer_s_metric_from_its_state_or_these_gradients_or_sgd_s(files, single, tmp_path, monkeypatch):
    """A state without second moments of single weights falls back to SGD's metric and says so, where one was named."""
    folder, state = tmp_path / "run", tmp_path / "optimizer.pt"
    torch.save({"state": {0: {"step": torch.tensor(3.0), "state1": torch.zeros(4)}}, "param_groups": []}, state)
    run_alpha_star(config(files), folder)
    monkeypatch.setattr("bvpo_stats.studies.alpha_star.run.gradient_batches", None)
    known = {"optimizer": "adamw", "learning_rate": 0.1}
    fallen = run_alpha_star(config(files, **known, optimizer_state=state), folder)
    assert fallen.optimizer.metric.startswith("that of SGD, for the state has none to read: `optimizer_state=")
    assert "state1" in fallen.optimizer.metric
    assert any(fallen.optimizer.metric in warning for warning in fallen.warnings)
    plain = run_alpha_star(config(files, optimizer="sgd", learning_rate=0.1, eta_l="auto"), folder)
    assert plain.optimizer.eta_l == plain.eta_l == fallen.optimizer.eta_l
    assert plain.curvature is None
    with pytest.raises(UserError, match="no Adam state"):
        run_alpha_star(config(files, optimizer_state=state), folder)


def test_another_loss_is_another_run(files, single):
    with pytest.raises(UserError, match="different run"):
        run_alpha_star(config(files, loss_type="simpo"), single[1])


def call(*arguments: object) -> None:
    """The command as typer calls it."""
    app(["alpha-star", *map(str, arguments)], standalone_mode=False)


def test_command_line(files, tmp_path, capsys):
    call("--model", files["model"], "--pairs", files["pairs"], "--lora-r", 2, "--target-modules", "q_proj,v_proj",
         "--groups", 10, "--batch-size", 16, "--eta-l", "auto", "--learning-rate", "0.01", "--loss", "ipo",
         "--beta", 0.5, "--limit", 20, "--output", tmp_path / "run")  # fmt: skip
    printed = capsys.readouterr().out
    assert "Which alpha?" in printed
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["n_prompts"] == 20
    assert report["objective"] == {"loss": "ipo", "beta": 0.5}
    measured = report["curvature"]
    assert report["eta_l"] == pytest.approx(0.01 * measured["largest_eigenvalue"])
    assert (tmp_path / "run" / "figures" / "error_over_alpha.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loss", "hinge"], "sigmoid, simpo, ipo"),
        (["--eta-l", "auto"], "--learning-rate"),
        (["--eta-l", "fast"], "--eta-l fast"),
        (["--optimizer", "adamw"], "--learning-rate"),
        (["--optimizer", "lion"], "adamw, sgd"),
        (["--optimizer", "sgd", "--learning-rate", "1", "--optimizer-state", "x"], "--optimizer-state"),
        (["--eta-l", "0"], "must be positive"),
        (["--batch-size", "0"], "--batch-size 0.0: must be positive"),
        (["--level", "1.5"], "--level 1.5: must lie between 0 and 1"),
        (["--marginal", "magic"], "--marginal magic"),
        (["--beta", "0"], "--beta 0.0: must be positive"),
        (["--pairs", "nowhere"], "no such file"),
    ],
)
def test_wrong_settings_are_named(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        call(*arguments, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_records_without_token_ids(files, tmp_path):
    rows = [json.loads(line) for line in (files["pairs"] / "thinking.jsonl").read_text().splitlines()]
    del rows[2]["chosen_ids"]
    broken = tmp_path / "thinking.jsonl"
    broken.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"thinking\.jsonl:3: .*chosen_ids"):
        call("--pairs", broken, "--empty-pairs", files["pairs"], "--output", tmp_path / "run")


def test_swapped_files_too_few_prompts_and_an_empty_folder(files, tmp_path):
    folder = files["pairs"]
    with pytest.raises(UserError, match="thinking pairs are needed"):
        call("--pairs", folder / "nothinking.jsonl", "--empty-pairs", folder / "thinking.jsonl", "--output", tmp_path)
    with pytest.raises(UserError, match="fewer than the 20 jackknife groups"):
        call("--pairs", folder, "--limit", 12, "--groups", 20, "--output", tmp_path / "run")
    with pytest.raises(UserError, match="holds no thinking"):
        call("--pairs", tmp_path, "--output", tmp_path / "run")


@pytest.fixture(scope="module")
def subset(files):
    policy = load_policy(PolicyOptions(model=str(files["model"])))
    return prepare_subset(policy, lora=LORA)[1]


def test_adam_state_from_torch_and_safetensors(subset, tmp_path):
    from safetensors.torch import save_file

    weights = [torch.nn.Parameter(torch.zeros_like(w)) for w in subset.parameters.values()]
    adam = torch.optim.AdamW(weights)
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, number + 1.0)
    adam.step()
    torch.save(adam.state_dict(), tmp_path / "optimizer.pt")
    found, epsilon = read_second_moments(tmp_path, subset)
    assert epsilon == 1e-8
    for number, name in enumerate(subset.parameters):
        np.testing.assert_allclose(found[name], (number + 1.0) ** 2, rtol=1e-4)  # freed of its start at 0
    shapes = {name: weight.shape for name, weight in subset.parameters.items()}
    named = {f"{name}.exp_avg_sq": torch.tensor(values).reshape(shapes[name]) for name, values in found.items()}
    save_file(named, tmp_path / "moments.safetensors")
    again, _ = read_second_moments(tmp_path / "moments.safetensors", subset)
    assert all(np.array_equal(again[name], found[name]) for name in found)


class Malice:
    """Runs code when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path(self.mark).touch, ()


def test_unsafe_and_foreign_optimizer_states_are_refused(subset, tmp_path):
    torch.save({"state": Malice(str(tmp_path / "ran"))}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refused"):
        read_second_moments(tmp_path / "evil.pt", subset)
    assert not (tmp_path / "ran").exists()
    torch.save({"state": {0: {"exp_avg_sq": torch.zeros(3)}}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="1 weights"):
        read_second_moments(tmp_path / "other.pt", subset)
    torch.save({"state": {n: {"exp_avg_sq": torch.zeros(3)} for n in range(len(subset.parameters))}}, tmp_path / "s.pt")
    with pytest.raises(UserError, match="has shape"):
        read_second_moments(tmp_path / "s.pt", subset)
    quantised = {n: {"step": torch.tensor(1.0), "state1": torch.zeros(3)} for n in range(len(subset.parameters))}
    for name, state in (("8bit.pt", quantised), ("new.pt", {})):
        torch.save({"state": state, "param_groups": []}, tmp_path / name)
        with pytest.raises(UnreadableMetricError, match=r"state1|no step was taken"):
            read_second_moments(tmp_path / name, subset)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"junk\.pt"):
        read_second_moments(tmp_path / "junk.pt", subset)
    with pytest.raises(UserError, match="no such file"):
        read_second_moments(tmp_path / "nothing.pt", subset)
