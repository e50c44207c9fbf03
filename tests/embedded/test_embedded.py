"""The shipped weights: what they are, and that they leave something to align and to measure."""

import json
import socket
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bvpo_stats.embedded.assets import embedded_model_path, embedded_prompts
from bvpo_stats.embedded.task import split_of
from bvpo_stats.errors import UserError
from bvpo_stats.lab.recipe.measure import Draw, draw_responses, evaluate_folder, render, summarise
from bvpo_stats.lab.recipe.train import RECORD, Recipe
from bvpo_stats.records import Prompt

# Four standard errors: a bound the model meets exactly fails by chance once in 30,000 runs.
ERRORS = 4.0


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_weights_are_a_small_qwen2_in_safetensors(no_network):
    folder = embedded_model_path()
    names = {p.name for p in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "MODEL_CARD.md"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    assert (folder / "model.safetensors").stat().st_size <= 3_000_000
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert 500_000 <= sum(p.numel() for p in model.parameters()) <= 1_500_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_weights_are_of_the_recipe_in_the_code():
    written = json.loads((embedded_model_path() / RECORD).read_text())["recipe"]
    # Through JSON, where tuples are lists.
    assert written == json.loads(json.dumps(asdict(Recipe())))


def test_default_prompts_are_held_out_and_limited():
    prompts = embedded_prompts()
    assert len({p.prompt_id for p in prompts}) == len(prompts) == 200
    assert embedded_prompts(7) == prompts[:7]
    for prompt in prompts:
        expression = "".join(c for c in prompt.prompt if c in "0123456789+-*")
        assert split_of(expression) == "held-out"
    with pytest.raises(UserError, match="`limit=0`"):
        embedded_prompts(0)


def test_bounds_hold_within_sampling_error_on_a_reduced_set():
    m = evaluate_folder(embedded_model_path(), limit=60)
    assert 0.70 - ERRORS * m.thinking_error <= m.thinking_accuracy <= 0.95 + ERRORS * m.thinking_error
    assert m.nothinking_accuracy > 0.20 - ERRORS * m.nothinking_error
    assert m.gap >= 0.15 - ERRORS * m.gap_error
    assert m.distinct_share >= 0.40 - ERRORS * m.distinct_error
    assert m.trace_spread >= 3
    assert m.unfinished_share < 0.02


def test_measures_by_hand():
    prompts = [Prompt("a", "1+1=?", "2"), Prompt("b", "1+2=?", "3")]
    draws = [
        *(Draw(0, "thinking", v, n, True) for v, n in ((2, 10), (5, 20))),
        Draw(1, "thinking", 3, 30, True),
        Draw(1, "thinking", None, 40, False),
        *(Draw(0, "nothinking", v, 0, True) for v in (2, 1)),
        *(Draw(1, "nothinking", v, 0, True) for v in (1, 1)),
    ]
    m = summarise(draws, prompts)
    assert (m.thinking_accuracy, m.nothinking_accuracy, m.gap) == (0.5, 0.25, 0.25)
    # Per-prompt rates: thinking (1/2, 1/2), nothinking (1/2, 0), gap (0, 1/2), distinct (1, 0).
    assert m.thinking_error == 0
    assert m.nothinking_error == pytest.approx(0.25)
    assert m.gap_error == pytest.approx(0.25)
    assert (m.distinct_share, m.distinct_error) == (0.5, pytest.approx(0.5))
    assert (m.trace_p5, m.trace_p95) == (pytest.approx(11.5), pytest.approx(38.5))
    assert m.trace_spread == pytest.approx(38.5 / 11.5)
    assert m.unfinished_share == 1 / 8
    assert (m.n_prompts, m.n_samples) == (2, 2)
    assert "| NoThinking accuracy | 25.0% ± 25.0% | above 20% | yes |" in render(m)
    assert "| Thinking accuracy | 50.0% ± 0.0% | 70% to 95% | no |" in render(m)


class Scripted(PreTrainedModel):
    """Stands in for a model: writes the given texts, one per row, whatever it is asked."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, thinking, nothinking):
        self.tokenizer, self.thinking, self.nothinking = tokenizer, thinking, nothinking

    def generate(self, input_ids, **_options):
        close = self.tokenizer.convert_tokens_to_ids("</think>")
        texts = self.nothinking if input_ids[0, -1] == close else self.thinking
        written = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
        return torch.cat((input_ids, written), dim=1)


def test_responses_are_split_into_trace_and_answer():
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    end = tokenizer.eos_token
    thinking = [f"1+1=2</think>It is 2.{end}", f"</think>7{end}", f"1+1=2{end}", "1+1=2</think>It is 2"]
    nothinking = [f"2.{end}", f"It is -4.{end}", end, "33333"]
    model = Scripted(tokenizer, thinking, nothinking)
    draws = list(draw_responses(model, tokenizer, [Prompt("a", "1+1=?", "2")], n_samples=4))
    # An unclosed trace and a cut answer have no value; the raw trace is never read as an answer.
    assert draws == [
        Draw(0, "thinking", 2, 5, True),
        Draw(0, "thinking", 7, 0, True),
        Draw(0, "thinking", None, 5, True),
        Draw(0, "thinking", None, 5, False),
        Draw(0, "nothinking", 2, 0, True),
        Draw(0, "nothinking", -4, 0, True),
        Draw(0, "nothinking", None, 0, True),
        Draw(0, "nothinking", None, 0, False),
    ]


def test_evaluate_refuses_what_it_cannot_measure(tmp_path):
    with pytest.raises(UserError, match="no embedded model in"):
        evaluate_folder(tmp_path / "nowhere")
    for options in ({"limit": 1}, {"n_samples": 1}, {"temperature": 0.0}):
        with pytest.raises(UserError, match="at least 2"):
            evaluate_folder(embedded_model_path(), **options)
