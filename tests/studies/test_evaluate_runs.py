"""``evaluate`` as a whole on models in memory: before and after training, kills, shards, and what a user gets wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from bvpo_stats.embedded.assets import embedded_model_path, embedded_prompts
from bvpo_stats.embedded.tokenizer import THINK_CLOSE
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import PolicyOptions, load_policy, with_adapter
from bvpo_stats.sampling.engines.server import ServerOptions
from bvpo_stats.store.run_folder import Shard
from bvpo_stats.studies.evaluate.config import contestants
from bvpo_stats.studies.evaluate.run import EvaluateConfig, evaluate
from tests.processes import python
from tests.sampling.fake_server import Call, Reply, completion, serve
from tests.sampling.samples import template
from tests.studies import killed_evaluations
from tests.studies.adapters import save_adapter, train_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapter(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(random_model, tmp_path_factory.mktemp("adapters") / "tuned", scale=0.3)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(f'{{"id": "q{n}", "problem": "{n}+1=?", "answer": {n % 10}}}\n' for n in range(48)))
    return path


@pytest.fixture(scope="module")
def config(random_model: Path, adapter: Path, problems: Path) -> EvaluateConfig:
    return killed_evaluations.config(str(random_model), str(adapter), str(problems))


@pytest.fixture(scope="module")
def uninterrupted(config: EvaluateConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    evaluate(config, folder)
    return folder


def test_before_and_after_training(tmp_path: Path) -> None:
    """Answers learnt by heart: NoThinking accuracy rises beyond doubt, base and adapter compared in one run."""
    trained = train_adapter(embedded_model_path(), tmp_path / "trained", embedded_prompts(24), steps=40)
    report = evaluate(EvaluateConfig(adapters=(str(trained),), limit=24, samples=4), tmp_path / "run")
    assert report is not None
    for column in ("embedded", "embedded_reward"):
        change = report.differences["trained"]["nothinking"][column]
        assert change.value is not None
        assert change.low is not None
        assert change.value > change.low > 0.1
        before, after = (report.scores[label]["nothinking"][column].value for label in ("base", "trained"))
        assert before is not None
        assert after == pytest.approx(before + change.value)
    thinking = report.scores["base"]["thinking"]["embedded"]  # the model card: 85% over all 200 problems
    assert thinking.low is not None
    assert thinking.high is not None
    assert thinking.low < 0.85 < thinking.high
    assert report.counts["trained"]["thinking"]["embedded"].responses == 96


def test_three_kills_change_nothing(
    uninterrupted: Path, tmp_path: Path, random_model: Path, adapter: Path, problems: Path
) -> None:
    done = python("-m", "tests.studies.killed_evaluations", random_model, adapter, problems, tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [-signal.SIGKILL] * 3 + [0]
    for path in ("report.json", "verdicts-base-sums.jsonl", "verdicts-tuned-sums.jsonl", "run.json"):
        assert (tmp_path / "r" / path).read_bytes() == (uninterrupted / path).read_bytes(), path


def test_a_finished_run_answers_at_once_and_another_is_refused(
    uninterrupted: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".json", ".jsonl", ".md")}
    evaluate(config, run)
    changed = [path.relative_to(run) for path, content in before.items() if path.read_bytes() != content]
    # how long this call took
    assert all(path.parts[0] == "samples" and path.stem == "report" for path in changed)
    for other in (replace(config, seed=1), replace(config, samples=3), replace(config, adapters=())):
        with pytest.raises(UserError, match="different run"):
            evaluate(other, run)


def test_shards_draw_and_the_whole_reports(uninterrupted: Path, config: EvaluateConfig, tmp_path: Path) -> None:
    for index in (2, 1):
        assert evaluate(replace(config, shard=Shard(index, 2)), tmp_path / "run") is None
    report = evaluate(config, tmp_path / "run")
    assert report is not None
    whole = json.loads((uninterrupted / "report.json").read_text())
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == whole
    assert not (tmp_path / "run" / "samples" / "base" / "sums" / "samples.jsonl").exists()  # nothing left to draw


def test_an_adapter_put_on_and_taken_off_leaves_no_trace(random_model: Path, adapter: Path) -> None:
    import torch

    ids = torch.tensor([[5, 6, 7, 8]])
    alone = load_policy(PolicyOptions(model=str(random_model)))
    before = alone.model(input_ids=ids).logits
    loaded = load_policy(PolicyOptions(model=str(random_model), adapter=str(adapter)))
    with with_adapter(alone, str(adapter)) as tuned:
        assert tuned.identity == loaded.identity
        assert torch.equal(tuned.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits)
        assert not torch.equal(tuned.model(input_ids=ids).logits, before)
    assert torch.equal(alone.model(input_ids=ids).logits, before)


def test_a_fully_fine_tuned_model_takes_part(config: EvaluateConfig, random_model: Path, tmp_path: Path) -> None:
    tuned = shutil.copytree(random_model, tmp_path / "whole")
    report = evaluate(replace(config, adapters=(str(tuned),), limit=4), tmp_path / "run")
    assert report is not None
    for mode in ("thinking", "nothinking"):  # the same weights and the same random numbers
        assert report.differences["whole"][mode]["sums"].value == 0.0
    assert report.models["whole"].startswith("whole@")


def test_an_adapter_of_another_base_is_found_before_anything_is_drawn(
    config: EvaluateConfig, adapter: Path, tmp_path: Path
) -> None:
    other = save_adapter(embedded_model_path(), tmp_path / "other", scale=0.1)
    with pytest.raises(UserError, match=r"adapter='.*other'` on this model.*another base"):
        evaluate(replace(config, adapters=(str(adapter), str(other))), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("samples.jsonl"))


def test_names_of_models(tmp_path: Path, adapter: Path, random_model: Path) -> None:
    def labels(*adapters: object) -> list[str]:
        return [entrant.label for entrant in contestants(EvaluateConfig(adapters=tuple(map(str, adapters))))]

    twin = shutil.copytree(adapter, tmp_path / "dpo" / "tuned")
    assert labels(adapter, twin) == ["base", "tuned", "dpo-tuned"]
    first, second = (shutil.copytree(adapter, tmp_path / run / "model") for run in ("half", "adaptive"))
    assert labels(first, second) == ["base", "half", "adaptive"]  # what two runs of train left
    assert labels(f"a b={adapter}", "someone/bvpo-lora") == ["base", "a-b", "bvpo-lora"]
    with pytest.raises(UserError, match=r"Two models are called .*-tuned\. Name one of them"):
        labels(f"tuned={adapter}", f"{adapter.parent.name}-tuned={adapter}", adapter)
    with pytest.raises(UserError, match="no such folder"):
        labels(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither an adapter"):
        labels(tmp_path / "empty")


def served(call: Call, number: int) -> Reply:
    """A server of two models: ``base`` always says 3, ``tuned`` the gold answer of problems 0 to 4, then 9."""
    prompt = call.body["prompt"]
    text = prompt if isinstance(prompt, str) else str(template().tokenizer.decode(prompt))
    n = int(re.findall(r"(\d+)\+1=\?", text)[0])
    answer = "3" if call.body["model"] == "base" else f"{n if n < 5 else 9}"
    return completion(answer if text.endswith(THINK_CLOSE) else f"so{THINK_CLOSE}{answer}")


def test_a_server_and_its_adapters(problems: Path, random_model: Path, tmp_path: Path) -> None:
    models = Reply(body={"data": [{"id": "base"}, {"id": "tuned"}]})
    with serve(served, models) as server:
        config = EvaluateConfig(
            policy=PolicyOptions(model=str(random_model)),
            engine="openai",
            server=ServerOptions(server.url, served_model="base", endpoint="completions"),
            adapters=("tuned",),
            data=(str(problems),),
            limit=6,
            instruction="",
        )
        with pytest.raises(UserError, match="no model nobody; it offers base, tuned"):
            evaluate(replace(config, adapters=("tuned", "nobody")), tmp_path / "none")
        assert not server.calls
        report = evaluate(config, tmp_path / "run")
    assert report is not None
    assert report.models == {"base": "base@server", "tuned": "tuned@server"}
    for mode in ("thinking", "nothinking"):
        assert report.scores["base"][mode]["sums"].value == pytest.approx(1 / 6)
        assert report.scores["tuned"][mode]["sums"].value == pytest.approx(5 / 6)
