import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import Batch, collate
from bvpo_stats.model.head import Head, head_logprobs, sequence_logprobs, token_logprobs
from tests.model.shapes import SHAPES, sequences_of, tiny_model

LENGTHS = [(3, 5), (1, 9), (6, 2)]


def full_logits_logprobs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The textbook way: all logits of the model's own forward, with an attention mask, then log-softmax."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    logps = torch.log_softmax(logits.double(), dim=-1).gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    return logps * batch.completion_mask


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
def test_matches_full_logits_with_gradients(shape: str, attention: str, chunk_tokens: int | None) -> None:
    batch = collate(sequences_of(LENGTHS))
    model = tiny_model(shape, attention=attention)
    twin = copy.deepcopy(model)
    ours = token_logprobs(model, batch, chunk_tokens=chunk_tokens)
    truth = full_logits_logprobs(twin, batch)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(0.5, 2, len(LENGTHS), dtype=torch.float64)
    (sequence_logprobs(ours) * weights).sum().backward()
    (truth.sum(1) * weights).sum().backward()
    # Every parameter, a trainable (and perhaps tied) head included.
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_finds_the_decoder_inside_peft() -> None:
    batch = collate(sequences_of(LENGTHS))
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    torch.testing.assert_close(token_logprobs(model, batch), full_logits_logprobs(model, batch), rtol=1e-10, atol=1e-12)


def test_head_bias() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (7,))
    ours = head_logprobs(hidden, Head(weight, bias), targets, chunk_tokens=3)
    truth = torch.log_softmax(hidden @ weight.T + bias, -1)[torch.arange(7), targets]
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    rates = torch.randn(7, dtype=torch.float64)
    got = torch.autograd.grad((ours * rates).sum(), (hidden, bias))
    expected = torch.autograd.grad((truth * rates).sum(), (hidden, bias))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_softmax_is_float32_in_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 32).to(dtype).requires_grad_()
    head = Head((0.3 * torch.randn(500, 32)).to(dtype), None)
    targets = torch.randint(500, (64,))
    ours = head_logprobs(hidden, head, targets, chunk_tokens=10)
    logits = torch.nn.functional.linear(hidden, head.weight).detach().double()
    truth = torch.log_softmax(logits, -1)[torch.arange(64), targets]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.detach().double(), truth, rtol=1e-6, atol=1e-6)
    ours.sum().backward()
    exact = (torch.nn.functional.one_hot(targets, 500) - logits.softmax(-1)) @ head.weight.double()
    error = (hidden.grad.double() - exact).norm() / exact.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(
    ("setting", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.0625), ("logits_scaling", 8.0)]
)
def test_logit_transforms_are_refused_by_name(setting: str, value: float) -> None:
    model = tiny_model()
    setattr(model.config, setting, value)
    with pytest.raises(UserError, match=setting):
        token_logprobs(model, collate(sequences_of(LENGTHS)))


def test_an_adapter_on_the_head_is_refused() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(tiny_model(), config)
    with pytest.raises(UserError, match=r"output layer of Qwen2ForCausalLM is peft.*Linear"):
        token_logprobs(model, collate(sequences_of(LENGTHS)))


MEMORY_PROBE = """
    import json, pathlib, torch
    from bvpo_stats.model.head import Head, head_logprobs

    def added_peak_mb(tokens, chunk_tokens):
        hidden = torch.randn(tokens, 4, requires_grad=True)
        targets = torch.randint(len(weight), (tokens,))
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
        before = peak_mb()
        head_logprobs(hidden, Head(weight, None), targets, chunk_tokens=chunk_tokens).sum().backward()
        return peak_mb() - before

    def peak_mb():
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    torch.manual_seed(0)
    weight = torch.randn(151_936, 4)
    added_peak_mb(2, None)  # loads the kernels
    print(json.dumps([added_peak_mb(4096, None), added_peak_mb(1024, 1024)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.slow
def test_4096_tokens_of_151936_words_add_at_most_300_mb() -> None:
    # In a process of its own, so that other tests' memory is not counted. Full logits would be 2,500 MB.
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(MEMORY_PROBE)], capture_output=True, check=True)
    added, one_chunk_of_1024 = json.loads(run.stdout)
    assert added <= 300
    assert one_chunk_of_1024 > 550, "the probe does not see the memory it is meant to bound"
