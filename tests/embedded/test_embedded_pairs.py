"""The shipped pairs and traces: of the shipped model, at temperature 1, enough of them, all answers with traces."""

from collections import Counter, defaultdict

import pytest

from bvpo_stats.embedded.assets import embedded_prompts
from bvpo_stats.embedded.task import grade
from bvpo_stats.gradients.examples import Example, check_identity
from bvpo_stats.gradients.reference import check_stored_log_probs
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.studies.alpha_star.config import AlphaInputs
from bvpo_stats.studies.alpha_star.run import load_examples


@pytest.fixture(scope="module")
def examples() -> tuple[Example, ...]:
    return load_examples(AlphaInputs()).examples


@pytest.fixture(scope="module")
def pairs(examples) -> list[PreferencePair]:
    return [pair for example in examples for pair in example.pairs]


@pytest.fixture(scope="module")
def traces(examples) -> list[TraceRecord]:
    return [trace for example in examples for trace in example.traces]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(PolicyOptions(device="cpu"))


def test_enough_prompts_have_both_pairs(pairs):
    modes = Counter(pair.mode for pair in pairs)
    assert modes["thinking"] == modes["nothinking"] >= 256
    assert len({p.prompt_id for p in embedded_prompts()} & {pair.prompt_id for pair in pairs}) >= 190


def test_pairs_are_plain_draws_ranked_by_the_verifier(pairs):
    golds = {prompt.prompt_id: prompt.gold for prompt in embedded_prompts()}
    for pair in pairs:
        assert (pair.temperature, pair.top_p) == (1.0, 1.0)
        assert pair.chosen_reward > pair.rejected_reward
        if pair.prompt_id in golds:
            assert pair.chosen_reward == pytest.approx(grade(pair.chosen_answer, golds[pair.prompt_id]))


def test_every_answer_has_eight_posterior_and_eight_prior_traces(pairs, traces):
    bank: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for trace in traces:
        bank[trace.prompt_id, trace.side][trace.source] += 1
    assert len(bank) == 2 * sum(pair.mode == "thinking" for pair in pairs)
    for counts in bank.values():
        assert counts["anchor"] == 1
        assert counts["anchor"] + counts["same-answer"] + counts["mh"] == counts["prior"] == 8


def test_records_are_of_the_shipped_weights(policy, examples):
    """Fails when the weights were trained anew and the records were not drawn again."""
    check_identity(policy, examples)
    assert check_stored_log_probs(policy, examples, 16) == 16
