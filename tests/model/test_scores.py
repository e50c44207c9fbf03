import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bvpo_stats.errors import UserError
from bvpo_stats.lab.reference_engine import reference_scores
from bvpo_stats.model import capture
from bvpo_stats.model.batching import Batch, TokenSequence, collate
from bvpo_stats.model.policy import gradient_checkpointing
from bvpo_stats.model.scores import (
    ScoreMismatchError,
    ScoreOptions,
    batch_variation,
    check_scores,
    log_probabilities,
    score_pass,
)
from bvpo_stats.model.sinks import Dots, Keep, Project, Sum
from bvpo_stats.model.subset import LoraOptions, Subset, create_lora, linear_subset, lora_subset
from tests.model.shapes import SHAPES, sequences_of, tiny_model

LENGTHS = [(3, 5), (1, 9), (6, 2), (2, 7)]
LINEAR = {"gpt2": ["attn.c_attn", "mlp.c_proj"]}


def lora_model(shape: str, *, zero_b: bool = False, **kwargs: Any) -> nn.Module:
    """A model with LoRA on all linear layers; B is random unless asked otherwise, so that A has a gradient too."""
    model = create_lora(tiny_model(shape, **kwargs), LoraOptions(r=3, alpha=5, seed=1))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not zero_b:
            parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def single_sequence_scores(model: nn.Module, subset: Subset, sequences: list[TokenSequence]) -> Tensor:
    """The truth: each sequence alone, unpadded, through the model's own forward, full logits and autograd."""
    weights = list(subset.parameters.values())
    for weight in weights:
        weight.requires_grad_(True)
    rows = []
    for sequence in sequences:
        ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
        logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], -1)
        start = len(sequence.prompt_ids) - 1
        total = logps.gather(1, ids[0, 1:, None])[start:].sum()
        found = torch.autograd.grad(total, weights, allow_unused=True)
        rows.append(
            torch.cat(
                [torch.zeros(w.numel()) if g is None else g.flatten() for g, w in zip(found, weights, strict=True)]
            )
        )
    for weight in weights:
        weight.requires_grad_(False)
    return torch.stack(rows)


def captured_scores(model: nn.Module, subset: Subset, batch: Batch) -> Tensor:
    keep = Keep()
    score_pass(model, subset, batch, [keep])
    return keep.flat(subset, len(batch))


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Largest over sequences of norm(difference) / norm(truth)."""
    return float(((ours - truth).norm(dim=1) / truth.norm(dim=1)).max())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["lora", "lora at B = 0", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees_with_single_sequences(shape: str, kind: str, checkpointed: bool, attention: str) -> None:
    sequences = sequences_of(LENGTHS)
    if kind == "linear":
        model: nn.Module = tiny_model(shape, attention=attention)
        subset = linear_subset(model, LINEAR.get(shape, ["q_proj", "v_proj", "layers.1.mlp.*"]))
    else:
        model = lora_model(shape, zero_b=kind == "lora at B = 0", attention=attention)
        subset = lora_subset(model)
    truth = single_sequence_scores(model, subset, sequences)
    if checkpointed:
        with gradient_checkpointing(model):
            ours = captured_scores(model, subset, collate(sequences))
    else:
        ours = captured_scores(model, subset, collate(sequences))
    assert relative_error(ours, truth) < 1e-10


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_own_norms_and_eager_attention(attention: str) -> None:
    # They round to float32 on the way, so agreement is at the level of float32 rounding and no better.
    model = lora_model("qwen3", dtype=torch.float32, attention=attention).double()
    assert model.get_base_model().config._attn_implementation == attention
    subset = lora_subset(model)
    sequences = sequences_of(LENGTHS)
    truth = single_sequence_scores(model, subset, sequences)
    assert relative_error(captured_scores(model, subset, collate(sequences)), truth) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_engine_agrees_with_single_sequences(shape: str) -> None:
    sequences = sequences_of(LENGTHS)
    model = lora_model(shape, attention="sdpa")
    subset = lora_subset(model)
    found = reference_scores(model, list(subset.parameters), collate(sequences))
    flat = torch.cat([found[name].flatten(1) for name in subset.parameters], 1)
    assert relative_error(flat, single_sequence_scores(model, subset, sequences)) < 1e-10
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_reference_engine_takes_any_parameter() -> None:
    model = tiny_model("qwen2")
    names = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"]
    sequences = sequences_of(LENGTHS)
    found = reference_scores(model, names, collate(sequences))
    subset = Subset({name: dict(model.named_parameters())[name] for name in names}, ())
    flat = torch.cat([found[name].flatten(1) for name in names], 1)
    assert relative_error(flat, single_sequence_scores(model, subset, sequences)) < 1e-10
    with pytest.raises(UserError, match=r"nowhere\.weight"):
        reference_scores(model, ["nowhere.weight"], collate(sequences))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layer_used_twice_adds_before_it_is_reported(checkpointed: bool) -> None:
    model = tiny_model("qwen2")
    model.model.layers[1] = model.model.layers[0]
    lora = create_lora(model, LoraOptions(r=2, targets=("q_proj", "down_proj")))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    subset = lora_subset(lora)
    sequences = sequences_of(LENGTHS)
    truth = single_sequence_scores(lora, subset, sequences)
    seen: list[str] = []
    keep, dots = Keep(), Dots()
    with gradient_checkpointing(lora) if checkpointed else torch.enable_grad():
        score_pass(lora, subset, collate(sequences), [keep, dots, lambda name, _: seen.append(name)])
    assert len(seen) == len(set(seen)) == len(subset.parameters) == 4
    assert relative_error(keep.flat(subset, 4), truth) < 1e-10
    torch.testing.assert_close(dots.gram, truth @ truth.T, rtol=1e-9, atol=1e-9)


def test_weights_shared_by_two_layers_are_one_parameter() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    subset = linear_subset(model, ["up_proj"])
    assert list(subset.parameters) == ["model.layers.0.mlp.up_proj.weight"]
    sequences = sequences_of(LENGTHS)
    truth = single_sequence_scores(model, subset, sequences)
    assert relative_error(captured_scores(model, subset, collate(sequences)), truth) < 1e-10


def test_gradients_and_flags_are_left_alone_even_where_everything_is_trainable() -> None:
    model = lora_model("qwen2")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    subset = lora_subset(model, ["q_proj"])
    sequences = sequences_of(LENGTHS)
    ours = captured_scores(model, subset, collate(sequences))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert relative_error(ours, single_sequence_scores(model, subset, sequences)) < 1e-10


def test_results_do_not_depend_on_the_batch() -> None:
    model = lora_model("qwen3")
    subset = lora_subset(model)
    sequences = sequences_of(LENGTHS)
    together = captured_scores(model, subset, collate(sequences, pad_id=5))
    reordered = captured_scores(model, subset, collate(sequences[::-1], pad_id=0)).flip(0)
    alone = torch.cat([captured_scores(model, subset, collate([s])) for s in sequences])
    assert relative_error(together, alone) < 1e-12
    assert relative_error(reordered, alone) < 1e-12
    assert float(batch_variation(model, subset, collate(sequences)).max()) < 1e-12
    # A model whose last norm looks at its neighbours in the batch is found out.
    model.get_base_model().model.norm.register_forward_hook(lambda _m, _i, out: out + 1e-3 * out.mean(0, keepdim=True))
    assert 1e-5 < float(batch_variation(model, subset, collate(sequences)).max()) < 0.1


@pytest.mark.parametrize(
    ("base", "adapter"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("shape", ["qwen2", "gpt2"])
def test_low_precision(shape: str, base: str, adapter: str) -> None:
    sequences = sequences_of(LENGTHS)
    model = lora_model(shape, dtype=getattr(torch, base))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(getattr(torch, adapter))
    subset = lora_subset(model)
    ours = captured_scores(model, subset, collate(sequences))
    assert ours.dtype == torch.float32
    exact = copy.deepcopy(model).double()
    truth = single_sequence_scores(exact, lora_subset(exact), sequences)
    assert relative_error(ours.double(), truth) < (1e-4 if base == "float32" else 0.1)
    assert check_scores(model, subset, collate(sequences)) > 0


def test_token_weights_and_mix_are_linear_maps_of_the_scores() -> None:
    model = lora_model("llama")
    subset = lora_subset(model)
    sequences = sequences_of(LENGTHS)
    batch = collate(sequences)
    answers_only = batch.completion_mask.double()
    answers_only[:, :4] = 0
    keep = Keep()
    score_pass(model, subset, batch, [keep], ScoreOptions(token_weights=answers_only))
    parts = [
        TokenSequence((s.prompt_ids + s.completion_ids)[:5], (s.prompt_ids + s.completion_ids)[5:]) for s in sequences
    ]
    # Sequence 2's completion lies behind target 4 altogether.
    parts[2] = sequences[2]
    truth = single_sequence_scores(model, subset, parts)
    assert relative_error(keep.flat(subset, 4), truth) < 1e-10

    mixed = Keep()
    weights = torch.randn(2, 4, dtype=torch.float64)
    seen = []

    def mix(logps: Tensor) -> Tensor:
        seen.append(logps)
        return weights

    returned = score_pass(model, subset, batch, [mixed], ScoreOptions(mix=mix))
    scores = single_sequence_scores(model, subset, sequences)
    assert relative_error(mixed.flat(subset, 2), weights @ scores) < 1e-10
    torch.testing.assert_close(seen[0], returned.sum(1))
    torch.testing.assert_close(returned, log_probabilities(model, batch), rtol=1e-12, atol=1e-12)


def test_sinks() -> None:
    model = lora_model("qwen2")
    subset = lora_subset(model, ["layers.1.*"])
    sequences = sequences_of(LENGTHS)
    batch = collate(sequences)
    keep, total, dots, sketch = Keep(), Sum(), Dots(), Project(50_000, seed=3)
    score_pass(model, subset, batch, [keep, total, dots, sketch])
    score_pass(model, subset, batch, [total])
    flat = keep.flat(subset, 4)
    assert flat.shape == (4, subset.size)
    summed = torch.cat([total.totals[name].flatten() for name in subset.parameters])
    torch.testing.assert_close(summed, 2 * flat.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dots.gram, flat @ flat.T, rtol=1e-12, atol=1e-12)
    # Standard deviation of a sketched product: sqrt((|s|^2 |s'|^2 + <s, s'>^2) / p) at most.
    norms = flat.norm(dim=1)
    bound = (((norms[:, None] * norms) ** 2 + dots.gram**2) / 50_000).sqrt()
    assert ((sketch.sketch @ sketch.sketch.T - dots.gram).abs() < 4 * bound).all()
    assert not torch.equal(sketch.sketch @ sketch.sketch.T, dots.gram)


def test_only_one_weight_is_alive_at_a_time() -> None:
    import weakref

    model = lora_model("qwen2")
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(_: str, scores: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(scores))
        most = max(most, sum(ref() is not None for ref in alive))

    score_pass(model, lora_subset(model), collate(sequences_of(LENGTHS)), [watch])
    assert len(alive) == 28
    assert most == 1


class TestCheck:
    """The check of every run: it passes where the engine is right, and fails where it is made wrong."""

    @pytest.mark.parametrize("shape", SHAPES)
    def test_passes(self, shape: str) -> None:
        model = lora_model(shape)
        assert check_scores(model, lora_subset(model), collate(sequences_of(LENGTHS))) < 1e-12

    def test_catches_a_layer_the_model_bypasses(self) -> None:
        model = tiny_model("qwen2")
        attention = model.model.layers[1].self_attn
        bypassed = attention.o_proj
        attention.o_proj = nn.Sequential(bypassed)
        attention.o_proj.forward = lambda x: nn.functional.linear(x, bypassed.weight)
        with pytest.raises(ScoreMismatchError, match=r"model\.layers\.1\.self_attn\.o_proj\.0\.weight"):
            check_scores(model, linear_subset(model, ["v_proj", "o_proj.0"]), collate(sequences_of(LENGTHS)))

    def test_catches_a_weight_that_is_also_used_elsewhere(self) -> None:
        model = tiny_model("qwen2")
        target = model.model.layers[0].self_attn.q_proj
        model.model.norm.register_forward_hook(lambda _m, _i, out: out + nn.functional.linear(out, target.weight))
        with pytest.raises(ScoreMismatchError, match=r"layers\.0\.self_attn\.q_proj"):
            check_scores(model, linear_subset(model, ["q_proj"]), collate(sequences_of(LENGTHS)))

    def test_catches_a_wrong_scaling(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = lora_model("qwen2")
        product = capture.per_sequence_product
        monkeypatch.setattr(capture, "per_sequence_product", lambda left, right: 1.001 * product(left, right))
        with pytest.raises(ScoreMismatchError, match="lora"):
            check_scores(model, lora_subset(model), collate(sequences_of(LENGTHS)))

    def test_catches_a_head_that_does_more(self) -> None:
        model = lora_model("qwen2")
        model.get_base_model().lm_head.register_forward_hook(lambda _m, _i, logits: 2 * logits)
        with pytest.raises(ScoreMismatchError, match="output layer of Qwen2ForCausalLM"):
            check_scores(model, lora_subset(model), collate(sequences_of(LENGTHS)))


class TestRefusals:
    """What cannot be right is refused by name before it runs."""

    def test_nan_names_the_record(self) -> None:
        model = lora_model("llama")
        model.get_base_model().model.embed_tokens.weight.data[28] = torch.nan
        sequences = [TokenSequence((1, 2), (3,)), TokenSequence((1, 28), (4,))]
        with pytest.raises(UserError, match=r"NaN or infinite log-probability in record 1;"):
            score_pass(model, lora_subset(model), collate(sequences), [])
        with pytest.raises(UserError, match=r"in pair p9 \(rejected\);"):
            log_probabilities(model, collate(sequences), names=["pair p9 (chosen)", "pair p9 (rejected)"])

    def test_dropout(self) -> None:
        model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
        subset = lora_subset(model)
        with pytest.raises(UserError, match=r"q_proj\.lora_dropout\.default: dropout is active \(0\.1\)"):
            score_pass(model.train(), subset, collate(sequences_of(LENGTHS)), [])
        score_pass(model.eval(), subset, collate(sequences_of(LENGTHS)), [])
        attention = tiny_model(attention_dropout=0.2).train()
        with pytest.raises(UserError, match=r"self_attn: dropout is active \(0\.2\)"):
            score_pass(attention, linear_subset(attention, ["q_proj"]), collate(sequences_of(LENGTHS)), [])

    def test_reentrant_checkpointing_and_autocast(self) -> None:
        model = lora_model("qwen2")
        subset = lora_subset(model)
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(UserError, match="reentrant gradient checkpointing"):
            score_pass(model.train(), subset, collate(sequences_of(LENGTHS)), [])
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="autocast"):
            score_pass(model.eval(), subset, collate(sequences_of(LENGTHS)), [])

    def test_layers_that_mix_sequences(self) -> None:
        model = tiny_model()
        mlp = model.model.layers[0].mlp
        inner = mlp.forward
        mlp.forward = lambda x: inner(x.flatten(0, 1)).view_as(x)
        with pytest.raises(UserError, match=r"layers\.0\.mlp\.gate_proj: its input has shape"):
            score_pass(model, linear_subset(model, ["mlp.*"]), collate(sequences_of(LENGTHS)), [])
