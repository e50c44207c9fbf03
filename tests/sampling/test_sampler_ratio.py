"""log q of the sampler: recorded, carried into pairs, read from foreign files, and compared with the policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.policy import Policy, load_policy
from bvpo_stats.model.scores import completion_logprobs
from bvpo_stats.records import Completion, PreferencePair, to_dict
from bvpo_stats.sampling.engines.file_engine import adopt_completions
from bvpo_stats.sampling.pairs import make_pairs
from bvpo_stats.sampling.sample import Samples, sample
from bvpo_stats.sampling.scoring import SamplerRatio, sampler_ratio
from bvpo_stats.store.tables import read_records
from tests.sampling.samples import sample as written
from tests.sampling.samples import template


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("embedded")


@pytest.fixture(scope="module")
def drawn(policy: Policy) -> Samples:
    return sample(policy, ["What is 8+9?", "What is 7-2*3?"], n=6, seed=3)


def test_the_recorded_log_probability_is_that_of_the_draw(policy: Policy, drawn: Samples) -> None:
    """Against a forward of its own; with a temperature and a nucleus against the law by hand, token by token."""
    sequences = [TokenSequence(c.prompt_ids, c.completion_ids) for c in drawn]
    found = completion_logprobs(policy, sequences, [c.key for c in drawn])
    for completion, logps in zip(drawn, found, strict=True):
        assert completion.sampler_logp == pytest.approx(float(logps.sum()), abs=1e-3)
    warm = sample(policy, ["What is 8+9?"], n=4, temperature=0.7, seed=3)
    sequences = [TokenSequence(c.prompt_ids, c.completion_ids) for c in warm]
    found = completion_logprobs(policy, sequences, [c.key for c in warm], temperatures=(0.7,))
    for completion, logps in zip(warm, found, strict=True):
        assert completion.sampler_logp == pytest.approx(float(logps.sum()), abs=1e-3)
    for narrow in sample(policy, ["What is 8+9?"], n=4, temperature=0.7, top_p=1e-6, seed=3):
        assert narrow.sampler_logp == 0.0  # one token is left at every step


def test_pairs_carry_it_and_the_policy_that_drew_them_agrees(policy: Policy, drawn: Samples) -> None:
    pairs = make_pairs(drawn, lambda question, answer: float(len(answer)), policy=policy, ref_logps=True)
    d_t = [pair for pair in pairs if pair.mode == "thinking"]
    by_index = {(c.prompt_id, c.sample_index): c for c in drawn if c.mode == "thinking"}
    for pair in d_t:
        assert pair.sampler_chosen_logps == by_index[pair.prompt_id, pair.chosen_index].sampler_logp
        assert pair.sampler_rejected_logps == by_index[pair.prompt_id, pair.rejected_index].sampler_logp
    assert all(pair.sampler_chosen_logps is None for pair in pairs if pair.mode == "nothinking")
    for known in (pairs, [replace(pair, ref_chosen_logps=None) for pair in pairs]):  # stored, or by a forward
        ratio = sampler_ratio(policy, known)
        assert (ratio.responses, ratio.unknown) == (2 * len(d_t), 0)
        assert ratio.effective == pytest.approx(1.0, abs=1e-4)
        assert ratio.mean == pytest.approx(1.0, abs=1e-3)
        assert not ratio.cautions
        assert "effective sample size 100%" in ratio.words


def test_another_sampler_is_noticed_and_the_unknown_stays_unknown(policy: Policy, drawn: Samples) -> None:
    pairs = [p for p in make_pairs(drawn, lambda q, a: float(len(a)), policy=policy) if p.mode == "thinking"]
    moved = [replace(p, sampler_chosen_logps=(p.sampler_chosen_logps or 0.0) - 3.0) for p in pairs]
    ratio = sampler_ratio(policy, moved)
    weights = np.exp([3.0, 0.0] * len(pairs))
    assert ratio.effective == pytest.approx(weights.sum() ** 2 / len(weights) / (weights**2).sum(), abs=1e-3)
    assert ratio.mean == pytest.approx(weights.mean(), abs=1e-2)
    assert ratio.spread == pytest.approx(1.5, abs=1e-3)
    assert "The policy is not the sampler" in ratio.cautions[0]
    for change in ({"sampler_rejected_logps": None}, {"top_p": 0.9}, {"top_k": None}, {"temperature": None}):
        found = sampler_ratio(policy, [replace(pairs[0], **change), *pairs[1:]])  # type: ignore[arg-type]
        assert (found.responses, found.unknown) == (2 * len(pairs) - 2, 2)
    nothing = sampler_ratio(policy, [replace(pair, sampler_chosen_logps=None) for pair in pairs])
    assert nothing == SamplerRatio(0, 2 * len(pairs))
    assert "is not known" in nothing.words
    assert not nothing.cautions


def test_ratios_beyond_all_numbers() -> None:
    ratio = SamplerRatio.of(np.array([-2000.0, 900.0]))
    assert (ratio.mean, ratio.effective) == (None, 0.5)
    assert "mean beyond all numbers" in ratio.words
    assert ratio.cautions
    json.dumps(ratio.effective, allow_nan=False)


# Files from elsewhere

ROW = to_dict(written("p", 0, "17"))
N = len(ROW["completion_ids"])


def adopted(tmp_path: Path, **changes: Any) -> Completion:
    row = {name: value for name, value in (ROW | changes).items() if value is not ...}
    path = tmp_path / "responses.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (found,) = adopt_completions(path, template())
    assert isinstance(found, Completion)
    return found


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({"sampler_logp": -3.5}, -3.5),
        ({"cumulative_logprob": -3.5}, -3.5),
        ({"rollout_log_probs": [-0.5] * N}, -0.5 * N),
        ({"sampling_per_token_logps": [-0.5] * N, "top_k": -1}, -0.5 * N),
        ({"cumulative_logprob": -20_000.0}, -20_000.0),
        ({"cumulative_logprob": None}, None),
        ({"cumulative_logprob": -3.5, "temperature": 0.8}, None),  # of the draw, or of the model? nobody knows
        ({"cumulative_logprob": -3.5, "temperature": ...}, None),
        ({"cumulative_logprob": -3.5, "top_p": 0.9}, None),
        ({"cumulative_logprob": -3.5, "top_k": ...}, None),
        ({"sampler_logp": -3.5, "temperature": 0.8}, -3.5),
        ({"sampler_logp": -3.5, "completion_ids": ROW["completion_ids"][:-1]}, None),  # the end was not counted
        ({"rollout_log_probs": [-0.5] * (N - 1), "completion_ids": ROW["completion_ids"][:-1]}, None),
        ({"sampler_logp": -3.5, "completion_ids": ..., "text": "8+9=17</think>17"}, None),
    ],
)
def test_what_a_foreign_sampler_says(changes: dict[str, Any], total: float | None, tmp_path: Path) -> None:
    assert adopted(tmp_path, **changes).sampler_logp == (None if total is None else pytest.approx(total))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sampler_logp": 0.5},
            "responses.jsonl:1: field `sampler_logp` must be a log-probability, at most 0, not 0.5",
        ),
        ({"sampler_logp": "-3"}, "field `sampler_logp` must be a finite number"),
        ({"cumulative_logprob": 1.5}, "field `cumulative_logprob` must hold log-probabilities, which are at most 0"),
        ({"cumulative_logprob": {"a": 1}}, "field `cumulative_logprob` must be a finite number"),
        ({"rollout_log_probs": [-0.5] * (N - 1)}, rf"`rollout_log_probs` has {N - 1} numbers for {N} `completion_ids`"),
        ({"rollout_log_probs": [-0.5] * (N - 1) + [None]}, "`rollout_log_probs` must be a list of finite numbers"),
        ({"rollout_log_probs": [-0.5] * (N - 1) + [3.0]}, "`rollout_log_probs` must hold log-probabilities"),
    ],
)
def test_what_no_sampler_says(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        adopted(tmp_path, **changes)


def test_pairs_refuse_what_is_no_log_probability(tmp_path: Path) -> None:
    (pair,) = make_pairs([written("p", 0, "17"), written("p", 1, "18")], "embedded", policy=template())
    path = tmp_path / "thinking.jsonl"
    path.write_text(json.dumps(to_dict(pair) | {"sampler_chosen_logps": 2.0}) + "\n")
    with pytest.raises(UserError, match="field `sampler_chosen_logps` must be a log-probability"):
        list(read_records(path, PreferencePair))
