from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy
from bvpo_stats.records import MODES, Mode, Prompt
from bvpo_stats.sampling.engines import transformers_engine
from bvpo_stats.sampling.engines.base import Draw, Request, SamplingOptions
from bvpo_stats.sampling.engines.transformers_engine import InverseCdfSampler, TransformersEngine, uniforms

QUESTIONS = ("1+1=?", "What is 12*3?", "Compute 4+3*5-2+17.", "2")


@pytest.fixture(scope="module")
def policy(random_model: Path) -> Policy:
    """In float64, where two batches round to the same draws."""
    return load_policy(PolicyOptions(model=str(random_model), dtype="float64"))


def requests(policy: Policy, samples: int = 3, modes: tuple[Mode, ...] = MODES) -> list[Request]:
    template = policy.template
    return [
        Request(Prompt(text, text), mode, index, template.prompt_ids(text, mode), template.prompt_text(text, mode))
        for text in QUESTIONS
        for mode in modes
        for index in range(samples)
    ]


def draws(policy: Policy, asked: list[Request], size: int, options: SamplingOptions) -> dict[str, Draw]:
    batches = [asked[start : start + size] for start in range(0, len(asked), size)]
    return {
        request.key: outcome
        for group in TransformersEngine(policy).draw(batches, options)
        for request, outcome in group
        if isinstance(outcome, Draw)
    }


def test_a_draw_belongs_to_its_key_and_not_to_its_batch(policy: Policy) -> None:
    options = SamplingOptions(max_new_tokens=24, temperature=0.1)
    asked = requests(policy)
    one = draws(policy, asked, 1, options)
    assert len(set(one.values())) > len(one) / 2  # random indeed
    for size in (5, 8, len(asked)):
        assert draws(policy, asked, size, options) == one
    assert draws(policy, asked[::-1], 7, options) == one
    assert draws(policy, asked, 8, SamplingOptions(max_new_tokens=24, temperature=0.1, seed=1)) != one


@pytest.mark.parametrize("cuttable", [True, False])
def test_leaving_finished_rows_behind_changes_nothing(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, cuttable: bool
) -> None:
    """Against one uninterrupted `generate`; with a cache that can be cut, and with one that has to be computed anew."""
    options, asked = SamplingOptions(max_new_tokens=40, temperature=1.5), requests(policy)
    monkeypatch.setattr(transformers_engine, "_STRETCH", 1_000)
    plain = draws(policy, asked, 24, options)
    assert {draw.finish_reason for draw in plain.values()} == {"stop", "length"}
    if not cuttable:
        monkeypatch.delattr(DynamicLayer, "batch_select_indices")
        monkeypatch.delattr(CacheLayerMixin, "batch_select_indices", raising=False)
    for stretch in (1, 7):
        monkeypatch.setattr(transformers_engine, "_STRETCH", stretch)
        assert draws(policy, asked, 24, options) == plain


def test_a_shorter_cut_off_cuts_the_same_draw(policy: Policy) -> None:
    asked = requests(policy)
    long, short = (draws(policy, asked, 8, SamplingOptions(max_new_tokens=count)) for count in (24, 6))
    for key, draw in short.items():
        assert draw.completion_ids == long[key].completion_ids[:6]


def test_completions_end_with_their_end_or_at_the_limit(policy: Policy) -> None:
    (eos,) = policy.eos_ids
    options = SamplingOptions(max_new_tokens=60, temperature=3.0)
    found = draws(policy, requests(policy, samples=10), 40, options).values()
    assert {draw.finish_reason for draw in found} == {"stop", "length"}
    for draw in found:
        assert eos not in draw.completion_ids[:-1]
        assert (draw.completion_ids[-1] == eos) == (draw.finish_reason == "stop")
        assert draw.finish_reason == "stop" or len(draw.completion_ids) == 60


def test_first_tokens_follow_the_policy(policy: Policy) -> None:
    """End to end against softmax(logits / T): prompt, padding, temperature and random numbers."""
    text, count, temperature = QUESTIONS[2], 4_000, 0.15  # cold: the random model's own probabilities are nearly equal
    ids = policy.template.prompt_ids(text, "thinking")
    asked = [Request(Prompt("q", text), "thinking", index, ids, "") for index in range(count)]
    other = [request for request in requests(policy, 1) if len(request.prompt_ids) != len(ids)]  # these bring padding
    found = draws(policy, other + asked, 1_000, SamplingOptions(max_new_tokens=1, temperature=temperature))
    tokens = [found[request.key].completion_ids[0] for request in asked]
    with torch.inference_mode():
        logits = policy.model(torch.tensor([ids])).logits[0, -1].double()
    exact = torch.softmax(logits / temperature, dim=-1).numpy() * count
    counts = np.bincount(tokens, minlength=len(exact))
    common = exact >= 5
    observed, expected = [*counts[common], counts[~common].sum()], [*exact[common], exact[~common].sum()]
    assert len(expected) > 20
    assert max(expected) > 20 * min(expected)
    assert stats.chisquare(observed, expected).pvalue > 1e-3


# The sampler by itself


def choose(logits: torch.Tensor, uniform: np.ndarray, **options: float) -> np.ndarray:
    sampler = InverseCdfSampler(torch.empty(0, 0), 0, SamplingOptions(**options))  # type: ignore[arg-type]
    rows = logits.expand(len(uniform), -1)
    return sampler.choose(rows, torch.from_numpy(uniform)).numpy()


def nucleus_by_hand(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of most likely tokens whose mass reaches ``top_p``, renormalised."""
    order = np.argsort(-probabilities)
    size = 1 + int(np.argmax(np.cumsum(probabilities[order]) >= top_p)) if top_p < 1 else len(order)
    kept = np.zeros_like(probabilities)
    kept[order[:size]] = probabilities[order[:size]]
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.05])
@pytest.mark.parametrize("temperature", [0.3, 0.8, 2.0])
def test_frequencies_are_the_probabilities(top_p: float, temperature: float) -> None:
    """On an even grid of uniform numbers each token is drawn in proportion to its probability, up to the grid."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    grid = (np.arange(20_000) + 0.5) / 20_000
    counts = np.bincount(choose(logits, grid, temperature=temperature, top_p=top_p), minlength=40)
    scaled = np.exp(logits.double().numpy() / temperature)
    expected = nucleus_by_hand(scaled / scaled.sum(), top_p)
    np.testing.assert_allclose(counts / 20_000, expected, atol=1.01 / 20_000)


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    edges = np.array([0.0, 0.25, 0.5, 1 - 2**-53])
    assert choose(logits, edges).tolist() == [1, 1, 3, 3]


def test_a_nan_is_reported() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2] = float("nan")
    with pytest.raises(UserError, match=r"NaN logits.*dtype='float32'"):
        choose(logits, np.array([0.5]))


def test_uniform_numbers_are_uniform_and_independent() -> None:
    table = np.stack([uniforms(f"key{row}", 0, 200) for row in range(200)])
    assert table.min() >= 0
    assert table.max() < 1
    assert stats.kstest(table.ravel(), "uniform").pvalue > 1e-3
    neighbours = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(table.size)
    np.testing.assert_array_equal(uniforms("key3", 0, 50), table[3, :50])
    assert not np.array_equal(uniforms("key3", 1, 50), table[3, :50])


# Limits


def test_memory_that_runs_out_halves_the_batch(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    options, asked = SamplingOptions(max_new_tokens=8), requests(policy)
    plain = draws(policy, asked, 24, options)
    generate, sizes = TransformersEngine._generate, []

    def tight(engine: TransformersEngine, batch: list[Request], options: SamplingOptions) -> list[Draw]:
        if len(batch) > limit:
            raise torch.OutOfMemoryError
        sizes.append(len(batch))
        return generate(engine, batch, options)

    monkeypatch.setattr(transformers_engine.TransformersEngine, "_generate", tight)
    limit = 7
    assert draws(policy, asked, 24, options) == plain
    assert sizes == [6, 6, 6, 6]
    limit = 0
    with pytest.raises(UserError, match="Out of memory on a single response"):
        draws(policy, asked, 4, options)


def test_positions_bound_the_length(policy: Policy) -> None:
    room = policy.max_positions
    assert room == 256
    long = Request(Prompt("q", ""), "thinking", 0, (10,) * (room - 5), "")
    (draw,) = draws(policy, [long], 1, SamplingOptions(max_new_tokens=50, temperature=0.5)).values()
    assert len(draw.completion_ids) == 5
    short = Request(Prompt("p", ""), "thinking", 0, (10,) * 5, "")
    options = SamplingOptions(max_new_tokens=room, temperature=0.5, seed=1)
    together, alone = draws(policy, [short, long], 2, options), draws(policy, [short], 1, options)
    assert together[short.key] == alone[short.key]  # a long neighbour does not cut a short prompt's response
    assert len(together[short.key].completion_ids) > 5
    assert len(together[long.key].completion_ids) <= 5
    full = Request(Prompt("q", ""), "thinking", 0, (10,) * room, "")
    with pytest.raises(UserError, match="leaves no room in the model's 256 positions"):
        draws(policy, [full], 1, SamplingOptions())


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 0},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"`{next(iter(changes))}="):
        SamplingOptions(**changes)  # type: ignore[arg-type]
