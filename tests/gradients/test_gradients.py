import dataclasses
import random
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.pair_gradients import (
    GradientOptions,
    GradientRow,
    pair_gradients,
    stream_pair_gradients,
)
from bvpo_stats.model import capture
from bvpo_stats.model.scores import ScoreMismatchError
from bvpo_stats.model.subset import LoraOptions, Subset, create_lora, lora_subset
from bvpo_stats.records import Mode, PreferencePair
from tests.model.shapes import WORDS, tiny_model


def make_pair(rng: random.Random, prompt_id: str, mode: Mode, lengths: tuple[int, int, int]) -> PreferencePair:
    prompt, chosen, rejected = (tuple(rng.randrange(WORDS) for _ in range(n)) for n in lengths)
    return PreferencePair(
        prompt_id=prompt_id,
        mode=mode,
        prompt="",
        chosen="",
        rejected="",
        prompt_ids=prompt,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_answer_start=0,
        rejected_answer_start=0,
        chosen_answer="",
        rejected_answer="",
        chosen_reward=1.0,
        rejected_reward=0.0,
        chosen_index=0,
        rejected_index=1,
        temperature=1.0,
        top_p=1.0,
        model="tiny",
        template="none",
    )


def make_pairs(seed: int = 0) -> list[PreferencePair]:
    """Three prompts, both modes, two thinking pairs for prompt p1; lengths spread widely."""
    rng = random.Random(seed)
    pairs = []
    for prompt_id, mode in [("p0", "thinking"), ("p1", "nothinking"), ("p1", "thinking"), ("p2", "thinking")]:
        pairs.append(make_pair(rng, prompt_id, mode, (rng.randint(2, 5), rng.randint(3, 40), rng.randint(3, 40))))
    for prompt_id, mode in [("p2", "nothinking"), ("p1", "thinking"), ("p0", "nothinking")]:
        pairs.append(make_pair(rng, prompt_id, mode, (rng.randint(2, 5), rng.randint(1, 6), rng.randint(1, 6))))
    return pairs


@pytest.fixture(scope="module")
def model() -> Any:
    policy = create_lora(tiny_model("qwen2"), LoraOptions(r=2))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(False)


@pytest.fixture(scope="module")
def subset(model: nn.Module) -> Subset:
    return lora_subset(model)


def logprob(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def autograd_gradient(model: Any, subset: Subset, pair: PreferencePair, objective: Objective) -> tuple[Tensor, float]:
    """Gradient of one pair's loss, the pair alone, by autograd through the model's own forward."""
    weights = list(subset.parameters.values())
    for weight in weights:
        weight.requires_grad_(True)
    with torch.no_grad(), model.disable_adapter():
        ref = [logprob(model, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
    now = [logprob(model, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
    n = [len(pair.chosen_ids), len(pair.rejected_ids)]
    if objective.name == "dpo":
        loss = -nn.functional.logsigmoid(objective.beta * (now[0] - ref[0] - now[1] + ref[1]))
    elif objective.name == "simpo":
        loss = -nn.functional.logsigmoid(objective.beta * (now[0] / n[0] - now[1] / n[1]) - objective.gamma)
    else:
        loss = ((now[0] - ref[0]) / n[0] - (now[1] - ref[1]) / n[1] - 1 / (2 * objective.beta)) ** 2
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    for weight in weights:
        weight.requires_grad_(False)
    return gradient, float(loss.detach())


@pytest.mark.parametrize("objective", [Objective("dpo", 0.5), Objective("simpo", 2.5, 1.0), Objective("ipo", 0.5)])
@pytest.mark.parametrize(("max_tokens", "max_padding"), [(60, 0.05), (10_000, 0.05), (10_000, 1.0)])
def test_pair_gradients_equal_autograd(
    model: Any, subset: Subset, objective: Objective, max_tokens: int, max_padding: float
) -> None:
    pairs = make_pairs()
    options = GradientOptions(objective, max_tokens=max_tokens, max_padding=max_padding)
    rows, gradients = pair_gradients(model, subset, pairs, options)
    assert rows == tuple(GradientRow(pair.prompt_id, pair.mode, (i,)) for i, pair in enumerate(pairs))
    losses = {}
    for result in stream_pair_gradients(model, subset, pairs, lambda _: [], options):
        losses.update(zip(result.pairs, result.terms.loss.tolist(), strict=True))
    for index, pair in enumerate(pairs):
        truth, loss = autograd_gradient(model, subset, pair, objective)
        assert (gradients[index] - truth).norm() < 1e-10 * truth.norm()
        assert losses[index] == pytest.approx(loss, rel=1e-10)


def test_rows_by_prompt_are_means_over_the_prompts_pairs(model: Any, subset: Subset) -> None:
    pairs = make_pairs()
    _, by_pair = pair_gradients(model, subset, pairs)
    rows, by_prompt = pair_gradients(model, subset, pairs, GradientOptions(rows="prompt"))
    assert [(row.prompt_id, row.mode, row.pairs) for row in rows] == [
        ("p0", "thinking", (0,)),
        ("p1", "nothinking", (1,)),
        ("p1", "thinking", (2, 5)),
        ("p2", "thinking", (3,)),
        ("p2", "nothinking", (4,)),
        ("p0", "nothinking", (6,)),
    ]
    expected = torch.stack([by_pair[list(row.pairs)].mean(0) for row in rows])
    torch.testing.assert_close(by_prompt, expected, rtol=1e-10, atol=1e-13)


def test_both_modes_of_a_prompt_share_a_microbatch(model: Any, subset: Subset) -> None:
    batches: list[set[str]] = []

    def make_sinks(rows: tuple[GradientRow, ...]) -> list[Any]:
        batches.append({row.prompt_id for row in rows})
        return []

    results = list(stream_pair_gradients(model, subset, make_pairs(), make_sinks, GradientOptions(max_tokens=50)))
    assert sorted(prompt for batch in batches for prompt in batch) == ["p0", "p1", "p2"]
    assert sorted(index for result in results for index in result.pairs) == list(range(7))


def test_reference_sources(model: Any, subset: Subset) -> None:
    pairs = make_pairs()
    with torch.no_grad(), model.disable_adapter():
        stored = [
            dataclasses.replace(
                pair,
                ref_chosen_logps=float(logprob(model, pair.prompt_ids, pair.chosen_ids)),
                ref_rejected_logps=float(logprob(model, pair.prompt_ids, pair.rejected_ids)),
            )
            for pair in pairs
        ]
    _, by_adapter = pair_gradients(model, subset, pairs)
    _, by_record = pair_gradients(model, subset, stored, GradientOptions(reference="record"))
    torch.testing.assert_close(by_record, by_adapter, rtol=1e-9, atol=1e-13)
    for same in stream_pair_gradients(model, subset, pairs, lambda _: [], GradientOptions(reference="policy")):
        assert (same.terms.margin == 0).all()
    with pytest.raises(UserError, match=r"pair p0 \(thinking\): no stored reference"):
        pair_gradients(model, subset, pairs, GradientOptions(reference="record"))


def test_a_fresh_adapter_has_zero_margins_and_no_gradient_in_a() -> None:
    policy = create_lora(tiny_model("qwen3", dtype=torch.float32), LoraOptions(r=2))
    theta = lora_subset(policy)
    zero: list[tuple[bool, bool]] = []

    def record(name: str, gradients: Tensor) -> None:
        zero.append(("lora_A" in name, bool((gradients == 0).all())))

    for result in stream_pair_gradients(policy, theta, make_pairs(), lambda _: [record]):
        assert (result.terms.margin == 0).all()
    assert zero
    assert all(is_a == is_zero for is_a, is_zero in zero)


@pytest.mark.parametrize("max_padding", [0.05, 1.0])
def test_memory_is_flat_in_the_pairs(model: Any, subset: Subset, max_padding: float) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(_: str, gradients: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(gradients))
        most = max(most, sum(ref() is not None for ref in alive))

    options = GradientOptions(max_tokens=100, max_padding=max_padding)
    for _ in stream_pair_gradients(model, subset, make_pairs(0) + make_pairs(1), lambda _: [watch], options):
        assert sum(ref() is not None for ref in alive) <= 1
    assert len(alive) >= 2 * len(subset.parameters)
    assert most <= 2  # the one being reported, and at most the one before it


def test_the_run_is_checked_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = create_lora(tiny_model("qwen2"), LoraOptions(r=2))
    product = capture.per_sequence_product
    monkeypatch.setattr(capture, "per_sequence_product", lambda left, right: 2 * product(left, right))
    theta = lora_subset(policy)
    with pytest.raises(ScoreMismatchError, match="lora_B"):
        pair_gradients(policy, theta, make_pairs())
    pair_gradients(policy, theta, make_pairs(), GradientOptions(check=False))


def test_bad_pairs_are_named(model: Any, subset: Subset) -> None:
    pairs = make_pairs()
    with pytest.raises(UserError, match="no preference pairs"):
        pair_gradients(model, subset, [])
    with pytest.raises(UserError, match=r"pair p1 \(nothinking, rejected\): the completion is empty"):
        pair_gradients(model, subset, [dataclasses.replace(pairs[1], rejected_ids=())])
    with pytest.raises(
        UserError, match=r"pair p0 \(thinking, chosen\): \d+ tokens, but the model has positions for 64"
    ):
        pair_gradients(model, subset, [dataclasses.replace(pairs[0], chosen_ids=(1,) * 63)])
    plain = tiny_model("qwen2")
    with pytest.raises(UserError, match="has no adapter"):
        pair_gradients(plain, subset, pairs)
