"""The openai engine against a real server: ``transformers serve`` with the embedded model, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from bvpo_stats.embedded.assets import embedded_model_path
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import PolicyOptions, load_policy, load_served_policy
from bvpo_stats.records import MODES, Completion, Prompt
from bvpo_stats.sampling.engines.base import Draw, Request, SamplingOptions
from bvpo_stats.sampling.engines.openai_engine import OpenAIEngine
from bvpo_stats.sampling.engines.server import ServerOptions
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.sample.config import SampleConfig
from bvpo_stats.studies.sample.run import run_sample

pytestmark = pytest.mark.slow
NAME = str(embedded_model_path())
PATIENCE = 180.0


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    command += ["serve", NAME, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def test_responses_of_a_real_server_go_on_record(base_url: str, tmp_path: Path) -> None:
    config = SampleConfig(
        policy=PolicyOptions(model=NAME),
        samples=2,
        max_new_tokens=150,
        engine="openai",
        limit=4,
        server=ServerOptions(base_url, served_model=NAME, concurrency=3),
    )
    report = run_sample(config, tmp_path / "run")
    assert report.dialect == "/v1/completions text transformers"
    policy = load_policy(PolicyOptions())
    kept = list(read_records(tmp_path / "run", Completion))
    aside = sum(report.set_aside.values())
    assert len({record.key for record in kept}) == len(kept) == 16 - aside
    assert aside <= 2  # the embedded model seldom spells a text in other tokens than its tokenizer would
    for record in kept:
        assert record.prompt_ids == policy.template.prompt_ids(record.prompt, record.mode)
        assert policy.template.completion_text(record.completion_ids) == record.text
        assert (record.completion_ids[-1] in policy.eos_ids) == (record.finish_reason == "stop")
    again = run_sample(config, tmp_path / "run")
    assert again.tally.responses == 0  # nothing is drawn twice


@pytest.mark.parametrize("mode", MODES)
def test_a_real_server_draws_from_the_distribution_that_was_asked_for(base_url: str, mode: str) -> None:
    """First tokens against softmax(logits / T), exact: prompt, temperature, no top-k, no default of the server."""
    policy = load_policy(PolicyOptions())
    served = load_served_policy(PolicyOptions(model=NAME))
    prompt = Prompt("q", "Compute 7-2*3.")
    ids, text = policy.template.prompt_ids(prompt.prompt, mode), policy.template.prompt_text(prompt.prompt, mode)
    draws, temperature = 250, 1.3
    requests = [Request(prompt, mode, index, ids, text) for index in range(draws)]
    engine = OpenAIEngine(served, ServerOptions(base_url, served_model=NAME, concurrency=4), MODES)
    options = SamplingOptions(samples=draws, temperature=temperature, max_new_tokens=1)
    outcomes = [outcome for group in engine.draw([requests], options) for _, outcome in group]
    assert len(outcomes) == draws
    tokens = [outcome.completion_ids[0] for outcome in outcomes if isinstance(outcome, Draw)]
    with torch.inference_mode():
        logits = policy.model(torch.tensor([ids])).logits[0, -1].double()
    exact = torch.softmax(logits / temperature, dim=-1).numpy()
    # Special tokens are left out of this server's text, so they end up set aside; the rest keeps its proportions.
    shown = np.array([bool(policy.tokenizer.decode([token], skip_special_tokens=True)) for token in range(len(exact))])
    assert len(tokens) / draws == pytest.approx(exact[shown].sum(), abs=0.1)
    counts = np.bincount(tokens, minlength=len(exact)).astype(float)
    expected = np.where(shown, exact, 0.0) / exact[shown].sum() * len(tokens)
    common = expected >= 5
    assert common.sum() >= 2  # else there is nothing to test
    observed = [*counts[common], counts[~common].sum()]
    assert stats.chisquare(observed, [*expected[common], expected[~common].sum()]).pvalue > 1e-4


def test_a_wrong_model_name_is_the_servers_to_refuse(base_url: str) -> None:
    engine = OpenAIEngine(
        load_served_policy(PolicyOptions()), ServerOptions(base_url, served_model="other", retries=0), MODES
    )
    request = Request(Prompt("q", "1+1"), "thinking", 0, (1,), "x")
    with pytest.raises(UserError, match="Server is pinned"):
        list(engine.draw([[request]], SamplingOptions()))
