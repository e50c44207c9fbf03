import dataclasses
import random
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bvpo_stats.errors import UserError
from bvpo_stats.gradients import stream
from bvpo_stats.gradients.engine import BlockLayout, BlockRows
from bvpo_stats.gradients.examples import join
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.options import StreamOptions
from bvpo_stats.gradients.reference import Reference, fill_reference, pair_batches
from bvpo_stats.gradients.stream import gradient_batches, pair_gradients
from bvpo_stats.lab.oracle import OracleConfig, build_oracle, draw_pairs, draw_traces
from bvpo_stats.model import capture
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import ScoreMismatchError
from bvpo_stats.model.subset import LoraOptions, Subset, create_lora, lora_subset
from bvpo_stats.model.templates import PROTOCOLS, Template
from bvpo_stats.records import Mode, PreferencePair
from bvpo_stats.statistics import alpha_from_gradients
from bvpo_stats.studies.alpha_star.run import alpha_star
from tests.model.shapes import WORDS, tiny_model


def token_ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(WORDS) for _ in range(length))


def make_pair(
    rng: random.Random, prompt_id: str, mode: Mode, prompt: tuple[int, ...], lengths: tuple[int, int]
) -> PreferencePair:
    chosen, rejected = (token_ids(rng, length) for length in lengths)
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
        top_k=0,
        cut_share=0.0,
        unclosed_share=0.0,
        model="tiny",
        template="embedded",
    )


def make_pairs(seed: int = 0) -> list[PreferencePair]:
    """Three prompts, both modes, two pairs each for prompt p1; lengths spread widely."""
    rng = random.Random(seed)
    prompts = {prompt_id: token_ids(rng, rng.randint(2, 5)) for prompt_id in ("p0", "p1", "p2")}
    pairs = []
    for prompt_id, mode in [("p0", "thinking"), ("p1", "nothinking"), ("p1", "thinking"), ("p2", "thinking")]:
        pairs.append(make_pair(rng, prompt_id, mode, prompts[prompt_id], (rng.randint(3, 40), rng.randint(3, 40))))
    for prompt_id, mode in [("p2", "nothinking"), ("p1", "thinking"), ("p0", "nothinking"), ("p1", "nothinking")]:
        pairs.append(make_pair(rng, prompt_id, mode, prompts[prompt_id], (rng.randint(1, 6), rng.randint(1, 6))))
    return pairs


def policy_of(model: Any) -> Policy:
    """A policy of a model that has no tokenizer; made-up pairs need none."""
    nothing = {"eos_token_id": None, "bos_token_id": None, "unk_token_id": 0}  # so that 0 is not certainly padding
    tokenizer: Any = SimpleNamespace(pad_token_id=0, get_chat_template=str, **nothing)
    return Policy(
        model, tokenizer, Template(PROTOCOLS["embedded"], tokenizer, words=model.config.vocab_size), "tiny", (1,)
    )


def gradients_of(
    model: Any, subset: Subset, pairs: Sequence[PreferencePair], **options: Any
) -> dict[tuple[str, str, int], Tensor]:
    """Every pair's gradient, by prompt, mode and number within the prompt."""
    how = StreamOptions(**({"method": "none"} | options))
    found = pair_gradients(policy_of(model), pairs, subset=subset, unmatched="error", options=how)
    examples = join(pairs).examples
    assert found.prompt_ids == tuple(example.prompt_id for example in examples)
    layout, columns = BlockLayout.of(subset), {}
    for name, (block, offset, size) in layout.places.items():
        start = found.blocks[block].start + offset
        columns[name] = torch.arange(start, start + size)
    order = torch.cat([columns[name] for name in subset.parameters])
    return {
        (example.prompt_id, mode, example.number): torch.from_numpy(rows[k])[order]
        for mode, rows in (("thinking", found.t), ("nothinking", found.e))
        for k, example in enumerate(examples)
    }


def numbered(pairs: Sequence[PreferencePair]) -> dict[tuple[str, str, int], PreferencePair]:
    """Pairs under the names that `gradients_of` gives their gradients."""
    return {
        (example.prompt_id, pair.mode, example.number): pair
        for example in join(pairs).examples
        for pair in example.both
    }


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
@pytest.mark.parametrize(("max_tokens", "max_padding"), [(60, 0.05), (10_000, 0.05), (10_000, 0.99)])
def test_pair_gradients_equal_autograd(
    model: Any, subset: Subset, objective: Objective, max_tokens: int, max_padding: float
) -> None:
    pairs = make_pairs()
    found = gradients_of(model, subset, pairs, objective=objective, max_tokens=max_tokens, max_padding=max_padding)
    assert len(found) == len(pairs)
    for key, pair in numbered(pairs).items():
        truth, _ = autograd_gradient(model, subset, pair, objective)
        assert (found[key] - truth).norm() < 1e-10 * truth.norm()


def test_alpha_of_the_matrices_is_that_of_the_stream() -> None:
    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=2, n_answers=3, n_prompts=2, seed=3))
    thinking, nothinking = draw_pairs(oracle, 40, np.random.default_rng(0))
    g = pair_gradients(oracle.policy, [*thinking, *nothinking])
    assert (g.m, g.marginal.rung) == (None, "reference point")
    assert g.t.shape == g.e.shape == (40, lora_subset(oracle.policy.model).size)
    assert [block.stop - block.start for block in g.blocks.values()] == [g.t.shape[1] // 2] * 2
    matrix = alpha_from_gradients(g.t, g.e, batch_size=128, clusters=g.prompt_ids)
    streamed = alpha_star(oracle.policy, [*thinking, *nothinking])
    assert matrix.unclipped == pytest.approx(streamed.alpha_star.unclipped, rel=1e-9)


def test_the_marginal_gradient_comes_along_where_it_is_needed() -> None:
    oracle = build_oracle(OracleConfig(n_symbols=2, max_trace=2, n_answers=3, n_prompts=2, seed=3, drift=0.05))
    rng = np.random.default_rng(0)
    thinking, nothinking = draw_pairs(oracle, 8, rng)
    bank = draw_traces(oracle, thinking, 3, rng)
    g = pair_gradients(oracle.policy, [*thinking, *nothinking], bank, objective=Objective(beta=1.0))
    assert g.marginal.method == "posterior"
    assert g.m is not None
    joined = join([*thinking, *nothinking], bank)
    again = pair_gradients(oracle.policy, joined, objective=Objective(beta=1.0))
    np.testing.assert_array_equal(again.m, g.m)
    assert np.abs(g.m - g.t).max() > 1e-3
    assert pair_gradients(oracle.policy, [*thinking, *nothinking]).m is None  # no bank, no m


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
    by_adapter = gradients_of(model, subset, pairs, reference="adapter")
    for records in (pairs, stored, [*stored[:3], *pairs[3:]]):
        by_record = gradients_of(model, subset, records, reference="record")
        for key, gradient in by_adapter.items():
            torch.testing.assert_close(by_record[key], gradient, rtol=1e-9, atol=1e-13)
    wrong = [dataclasses.replace(stored[0], ref_chosen_logps=-1.0), *stored[1:]]
    with pytest.raises(UserError, match="ref_chosen_logps of the thinking pair of prompt p0 is -1"):
        gradients_of(model, subset, wrong)


def test_reference_of_batches_of_pairs(model: Any) -> None:
    """Stored values where they are allowed, the disabled adapter elsewhere; filled pairs give the same."""
    pairs, policy = make_pairs(), policy_of(model)
    batches = pair_batches(policy, pairs, Reference(policy), max_tokens=100)
    assert sorted(member for batch in batches for member in batch.members) == list(range(len(pairs)))
    filled = [
        pair for example in fill_reference(policy, join(pairs).examples, max_tokens=100) for pair in example.pairs
    ]
    for batch in batches:
        for row, pair in enumerate(batch.pairs):
            with torch.no_grad(), model.disable_adapter():
                truth = [logprob(model, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
            assert batch.reference is not None
            torch.testing.assert_close(batch.reference[2 * row : 2 * row + 2], torch.stack(truth))
            mine = next(f for f in filled if f.chosen_ids == pair.chosen_ids and f.rejected_ids == pair.rejected_ids)
            assert [mine.ref_chosen_logps, mine.ref_rejected_logps] == pytest.approx([float(x) for x in truth])
    shifted = [dataclasses.replace(pair, ref_chosen_logps=-1.0, ref_rejected_logps=-2.0) for pair in pairs]
    for stored, expected in ((True, {-1.0, -2.0}), (False, None)):
        found = pair_batches(policy, shifted, Reference(policy, stored=stored), max_tokens=100)
        values = {float(x) for batch in found if batch.reference is not None for x in batch.reference}
        assert values == expected if expected else not values & {-1.0, -2.0}


def test_a_fresh_adapter_has_zero_margins_and_no_gradient_in_a() -> None:
    policy = create_lora(tiny_model("qwen3", dtype=torch.float32), LoraOptions(r=2))
    theta, beta = lora_subset(policy), 0.1
    found = gradients_of(policy, theta, make_pairs(), objective=Objective(beta=beta))
    names = torch.cat([torch.full((w.numel(),), "lora_A" in name) for name, w in theta.parameters.items()])
    scores = {key: (gradient[names], gradient[~names]) for key, gradient in found.items()}
    assert all(bool((of_a == 0).all()) and bool((of_b != 0).any()) for of_a, of_b in scores.values())


@pytest.mark.parametrize("max_padding", [0.05, 0.99])
def test_memory_is_flat_in_the_pairs(
    model: Any, subset: Subset, max_padding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watched(BlockRows):
        def __call__(self, name: str, scores: Tensor) -> None:
            nonlocal most
            alive.append(weakref.ref(scores))
            most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(stream, "BlockRows", Watched)
    more = [dataclasses.replace(pair, prompt_id=f"{pair.prompt_id}x") for pair in make_pairs(1)]
    options = StreamOptions(method="none", max_tokens=100, max_padding=max_padding)
    for _ in gradient_batches(policy_of(model), subset, join(make_pairs(0) + more).examples, options):
        assert sum(ref() is not None for ref in alive) <= 1
    assert len(alive) >= 2 * len(subset.parameters)
    assert most <= 2  # the one being reported, and at most the one before it


def test_the_run_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = create_lora(tiny_model("qwen2"), LoraOptions(r=2))
    product = capture.per_sequence_product
    monkeypatch.setattr(capture, "per_sequence_product", lambda left, right: 2 * product(left, right))
    with pytest.raises(ScoreMismatchError, match="lora_B"):
        gradients_of(policy, lora_subset(policy), make_pairs())


def test_bad_pairs_are_named(model: Any, subset: Subset) -> None:
    pairs = make_pairs()
    with pytest.raises(UserError, match="no thinking pairs"):
        pair_gradients(policy_of(model), [], subset=subset)
    with pytest.raises(UserError, match=r"The nothinking pair of prompt p1 has no token ids \(rejected_ids is empty\)"):
        gradients_of(model, subset, [pairs[0], dataclasses.replace(pairs[1], rejected_ids=()), *pairs[2:]])
    with pytest.raises(
        UserError, match=r"pair p0 \(thinking, chosen\): \d+ tokens, but the model has positions for 64"
    ):
        gradients_of(model, subset, [dataclasses.replace(pairs[0], chosen_ids=(1,) * 63), *pairs[1:]])
    with pytest.raises(UserError, match=r"has no adapter. Load it with one .*lora=16"):
        pair_gradients(policy_of(tiny_model("qwen2")), pairs)
    with pytest.raises(UserError, match="must be a Policy"):
        pair_gradients(model, pairs)
