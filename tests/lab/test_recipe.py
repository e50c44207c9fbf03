import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bvpo_stats.embedded.task import Example
from bvpo_stats.embedded.tokenizer import ASSISTANT, BOS, EOS, THINK_CLOSE, THINK_OPEN, USER, build_tokenizer
from bvpo_stats.errors import UserError
from bvpo_stats.lab.recipe import train as recipe_module
from bvpo_stats.lab.recipe.train import (
    CHECKPOINT,
    IGNORED,
    Recipe,
    Shape,
    build_model,
    collate,
    completion_loss,
    difficulty_at,
    draw_bucket,
    encode_example,
    learning_rate_at,
    train,
)

SMALL = Recipe(steps=6, batch_size=8, bucket=2, warmup=2, checkpoint_every=2, shape=Shape(32, 2, 2, 1, 48))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), SMALL, show_progress=False)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_output_loads_and_nothing_else_is_left(trained):
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.generation_config.temperature == 0.8
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(trained).eos_token_id
    assert json.loads((trained / "recipe.json").read_text())["recipe"]["steps"] == 6
    assert not (trained / CHECKPOINT).exists()


def test_same_seed_same_weights_and_another_seed_others(trained, tmp_path):
    assert_same_weights(trained, train(tmp_path / "again", SMALL, show_progress=False))
    other = weights(train(tmp_path / "other", replace(SMALL, seed=1), show_progress=False))
    assert not torch.equal(other["model.embed_tokens.weight"], weights(trained)["model.embed_tokens.weight"])


@pytest.mark.parametrize("survived", [1, 2])
def test_killed_run_resumes_to_the_same_weights(trained, tmp_path, monkeypatch, survived):
    output, saved = tmp_path / "killed", []
    save = recipe_module._save_checkpoint

    def save_then_die(path, state):
        if len(saved) == survived:
            raise KeyboardInterrupt
        saved.append(state["step"])
        save(path, state)

    monkeypatch.setattr(recipe_module, "_save_checkpoint", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(output, SMALL, show_progress=False)
    monkeypatch.setattr(recipe_module, "_save_checkpoint", save)
    assert torch.load(output / CHECKPOINT, weights_only=True)["step"] == saved[-1] == 2 * survived
    with pytest.raises(UserError, match="other options"):
        train(output, replace(SMALL, seed=1), show_progress=False)
    assert_same_weights(trained, train(output, SMALL, show_progress=False))


def test_nothing_is_overwritten(trained, tmp_path):
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    with pytest.raises(UserError, match="not empty"):
        train(trained, SMALL, show_progress=False)
    assert before == {p.name: p.read_bytes() for p in trained.iterdir()}
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        train(file, SMALL, show_progress=False)
    with pytest.raises(UserError, match="`steps=0`"):
        train(tmp_path / "new", replace(SMALL, steps=0), show_progress=False)
    assert not (tmp_path / "new").exists()


def test_examples_follow_the_protocol_in_both_modes(tokenizer):
    question = [BOS, USER, *"1+2=?", ASSISTANT, THINK_OPEN]
    for trace, prompt, completion in (
        ("1+2=3", question, [*"1+2=3", THINK_CLOSE, "3", ".", EOS]),
        (None, [*question, THINK_CLOSE], ["3", ".", EOS]),
    ):
        encoded = encode_example(Example("1+2=?", trace, "3."), tokenizer)
        assert [tokenizer.convert_ids_to_tokens(ids) for ids in encoded] == [prompt, completion]


def test_loss_is_the_mean_over_completion_tokens_of_unpadded_sequences(tokenizer):
    model = build_model(SMALL.shape, tokenizer, 0)
    batch = draw_bucket(SMALL, 0, tokenizer)[0]
    inputs, labels = collate(batch, tokenizer.pad_token_id)
    terms = []
    for prompt, completion in batch:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        terms += [-logits[len(prompt) + i - 1, token].item() for i, token in enumerate(completion)]
    assert (labels != IGNORED).sum() == len(terms)
    assert completion_loss(model, inputs, labels).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_training_lowers_the_loss(tokenizer, trained):
    inputs, labels = collate(draw_bucket(replace(SMALL, seed=9), 50, tokenizer)[0], tokenizer.pad_token_id)
    with torch.no_grad():
        before = completion_loss(build_model(SMALL.shape, tokenizer, 0), inputs, labels)
        after = completion_loss(AutoModelForCausalLM.from_pretrained(trained), inputs, labels)
    assert after < before


def test_schedule_and_curriculum():
    recipe = Recipe(steps=1000, warmup=100, learning_rate=1.0, curriculum=0.4)
    assert learning_rate_at(0, recipe) == pytest.approx(0.01)
    assert learning_rate_at(99, recipe) == learning_rate_at(100, recipe) == 1.0
    assert learning_rate_at(550, recipe) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert learning_rate_at(1000, recipe) == pytest.approx(0.1)
    weights = recipe.difficulty.operand_weights
    kept = [len(difficulty_at(step, recipe).operand_weights) for step in range(1000)]
    assert kept[0] == 1
    assert kept == sorted(kept)
    assert kept[400] == len(weights)
    assert difficulty_at(400, recipe) == recipe.difficulty


def test_building_a_model_leaves_the_global_generator_alone(tokenizer):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_model(SMALL.shape, tokenizer, 0)
    assert torch.equal(torch.rand(1), expected)
