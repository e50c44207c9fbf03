"""The vllm engine against a stand-in of vLLM's public interface."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import PolicyOptions
from bvpo_stats.records import Completion
from bvpo_stats.sampling.engines import vllm_engine
from bvpo_stats.sampling.engines.base import VllmOptions, draw_seed
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.sample.config import SampleConfig
from bvpo_stats.studies.sample.run import run_sample
from tests.cli.running import failed_politely, run
from tests.sampling.fake_vllm import CompletionOutput, Logprob, SamplingParams, fake_vllm
from tests.sampling.samples import template

EOS = template().tokenizer.eos_token_id
IDS = [*template().tokenizer.encode("1+2=3</think>It is 3.", add_special_tokens=False), EOS]
CONFIG = SampleConfig(engine="vllm", limit=3, samples=2, temperature=1.0, max_new_tokens=40)


def completion(
    ids: list[int], reason: str = "stop", *, stop: Any = None, logp: float | None = -0.25
) -> CompletionOutput:
    places = [{token: Logprob(logp)} for token in ids] if logp is not None else None
    return CompletionOutput(0, "", ids, None if logp is None else logp * len(ids), places, reason, stop)


def plain(ids: list[int], params: SamplingParams) -> CompletionOutput:
    return completion(IDS)


def install(monkeypatch: pytest.MonkeyPatch, write: Any = plain, **changes: Any) -> Any:
    module = fake_vllm(write, **changes)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def draws(folder: Path) -> dict[str, Completion]:
    return {record.key: record for record in read_records(folder, Completion)}


def test_a_run_with_vllm_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[list[int], SamplingParams]] = []

    def write(ids: list[int], params: SamplingParams) -> CompletionOutput:
        seen.append((ids, params))
        return plain(ids, params)

    module = install(monkeypatch, write)
    report = run_sample(replace(CONFIG, vllm=VllmOptions(tensor_parallel=2, gpu_memory=0.5)), tmp_path / "run")
    found = draws(tmp_path / "run")
    assert len(found) == 12
    assert report.model.startswith("embedded@")
    for key, record in found.items():
        assert record.completion_ids == tuple(IDS)
        assert (record.finish_reason, record.engine, record.top_k) == ("stop", "vllm", 0)
        assert record.model == report.model
        assert record.sampler_logp == pytest.approx(-0.25 * len(IDS))
        assert (list(record.prompt_ids), draw_seed(key, 0)) in [(ids, params.seed) for ids, params in seen]
    assert len({params.seed for _, params in seen}) == 12  # one seed a draw
    _, params = seen[0]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, -1, 0.0)
    assert (params.repetition_penalty, params.max_tokens, params.detokenize) == (1.0, 40, False)
    arguments = module.engines[0].arguments
    assert (arguments.tensor_parallel_size, arguments.gpu_memory_utilization) == (2, 0.5)
    assert (arguments.generation_config, arguments.logprobs_mode) == ("vllm", "processed_logprobs")
    assert arguments.max_model_len == max(len(record.prompt_ids) for record in found.values()) + 40
    assert run_sample(replace(CONFIG, vllm=VllmOptions(2, 0.5)), tmp_path / "run").tally.responses == 0


def test_vllm_is_kept_busy_and_a_stop_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = install(monkeypatch, fails_at=4)
    busy = replace(CONFIG, vllm=VllmOptions(in_flight=4))
    with pytest.raises(UserError, match=r"vLLM has stopped \(EngineCore encountered an issue\.\)\. Run the same"):
        run_sample(busy, tmp_path / "run")
    assert module.engines[0].most_waiting == 4
    assert len(draws(tmp_path / "run")) == 6  # two a step
    install(monkeypatch)
    assert run_sample(busy, tmp_path / "run").tally.responses == 6
    assert len(draws(tmp_path / "run")) == 12


@pytest.mark.parametrize(
    ("written", "reason", "ids"),
    [
        (completion(IDS[:-1], "length"), "length", IDS[:-1]),
        (completion(IDS[:-1], "stop"), "stop", IDS),  # the end that an engine keeps to itself
        (completion(IDS[:-1], "stop", stop=EOS), "stop", IDS),
        (completion(IDS, "length"), "stop", IDS),  # it was written at the very last place
        (completion(IDS, "stop", logp=None), "stop", IDS),
        (completion(IDS, "stop", logp=float("-inf")), "stop", IDS),
    ],
)
def test_how_responses_end(
    written: CompletionOutput, reason: str, ids: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, lambda *_: written)
    run_sample(replace(CONFIG, limit=1, samples=1, modes=("thinking",)), tmp_path / "run")
    (record,) = draws(tmp_path / "run").values()
    assert (record.finish_reason, list(record.completion_ids)) == (reason, ids)
    known = written.logprobs is not None and written.cumulative_logprob != float("-inf") and written.token_ids == ids
    assert record.sampler_logp == (pytest.approx(-0.25 * len(ids)) if known else None)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (completion(IDS, "abort"), "finish-reason"),
        (completion(IDS, "error"), "finish-reason"),
        (completion(IDS[:-1], "stop", stop="User:"), "finish-reason"),
        (completion([], "length"), "empty"),
        (completion([*IDS, *IDS], "stop"), "ids-differ"),
        (completion([10**6, EOS], "stop"), "ids-differ"),
    ],
)
def test_flaws_are_set_aside(
    written: CompletionOutput, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, lambda *_: written)
    report = run_sample(replace(CONFIG, limit=1, samples=1, modes=("thinking",)), tmp_path / "run")
    assert report.set_aside == {reason: 1}


def test_an_older_vllm_does_not_say_q_of_other_temperatures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, newest=False)
    for temperature, known in ((1.0, True), (0.7, False)):
        run_sample(replace(CONFIG, temperature=temperature), tmp_path / str(temperature))
        assert all((r.sampler_logp is not None) == known for r in draws(tmp_path / str(temperature)).values())


def test_a_model_of_few_positions_keeps_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = install(monkeypatch, positions=20)
    run_sample(CONFIG, tmp_path / "run")
    assert [engine.arguments.max_model_len for engine in module.engines] == [None]


def test_what_vllm_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, refuses="CUDA out of memory\nTried to allocate")
    with pytest.raises(UserError, match=r"vLLM cannot load embedded: CUDA out of memory$"):
        run_sample(CONFIG, tmp_path / "run")
    with pytest.raises(UserError, match="`adapter` is not loaded by `engine='vllm'`"):
        replace(CONFIG, policy=PolicyOptions(adapter="x"))
    with pytest.raises(UserError, match="are for `engine='vllm'`"):
        replace(CONFIG, engine="transformers", vllm=VllmOptions(2))


def test_without_vllm_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    failed = run("sample", "--engine", "vllm", "--model", "embedded", "--output", tmp_path / "run")
    failed_politely(failed, "--engine vllm needs vLLM: pip install 'bvpo-stats[vllm]'")
    assert not (tmp_path / "run").exists()
    assert "vllm" not in vllm_engine.__dict__  # imported where it is needed
    failed_politely(run("sample", "--engine", "vllm"), "--engine vllm needs --model")
