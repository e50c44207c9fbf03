"""`make gpu`: at most six minutes on one H100, one table; exits with 1 where a check fails.

Needs torch 2.6 or newer and transformers 5, no network. A row whose library is missing is skipped and says so. With
``--small`` the same rows run on the CPU in a few seconds, as `tests/test_gpu_script.py` does. Never run on a GPU yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import machine, peak_bytes
from benchmarks.scale import SHAPES
from bvpo_stats.gradients.engine import BlockLayout, BlockRows
from bvpo_stats.gradients.moments import DeviceMoments, MomentPlan
from bvpo_stats.gradients.stream import GradientBatch
from bvpo_stats.model.batching import Batch, TokenSequence, collate
from bvpo_stats.model.head import sequence_logprobs, token_logprobs
from bvpo_stats.model.needs import ModelShape
from bvpo_stats.model.scores import ScoreOptions, check_log_probabilities, check_scores, score_pass
from bvpo_stats.model.sinks import Mixture
from bvpo_stats.model.subset import LoraOptions, Subset, create_lora, lora_subset

MOST_MOMENTS = 0.05
"""Share of an `alpha-star` step that the moments may take."""
SLOWEST = 1.5
"""Most time of a pass of scores, in units of a plain LoRA backward."""


@dataclass(frozen=True)
class Setting:
    """What the rows run on.

    Attributes:
        device: Where.
        shape: Of the large model.
        tokens: Of a pass.
        small: Whether this is the miniature, whose times mean nothing.
    """

    device: torch.device
    shape: ModelShape
    tokens: int
    small: bool


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: What is looked at.
        value: What was found.
        passed: Whether it is as it should be; None where nothing is demanded or the row was skipped.
    """

    name: str
    value: str
    passed: bool | None = None


def model_of(setting: Setting, dtype: torch.dtype, layers: int | None = None) -> Any:
    """Random weights of the shape, or of so many of its layers."""
    s = setting.shape
    heads = max(2, s.hidden // 128)
    config = Qwen2Config(vocab_size=s.words, hidden_size=s.hidden, intermediate_size=s.width,
                         num_hidden_layers=layers or s.layers, num_attention_heads=heads,
                         num_key_value_heads=max(1, s.keys * heads // s.hidden), tie_word_embeddings=s.tied,
                         max_position_embeddings=setting.tokens, initializer_range=0.05)  # fmt: skip
    torch.manual_seed(0)
    with torch.device(setting.device):
        return Qwen2ForCausalLM(config).to(dtype).eval().requires_grad_(False)


def batch_of(setting: Setting, sequences: int) -> Batch:
    """Sequences of one length that add up to the setting's tokens."""
    length, words = setting.tokens // sequences, setting.shape.words
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(5, words, (sequences, length), generator=draw).tolist()
    return collate([TokenSequence(tuple(row[:4]), tuple(row[4:])) for row in rows], pad_id=0, device=setting.device)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """The fastest of some runs after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def capture(setting: Setting) -> list[Row]:
    """Scores against autograd, the chunked head against the model's own logits."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = create_lora(model_of(setting, dtype, layers=2), LoraOptions(r=4))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.02)
        batch = batch_of(setting, 4)
        worst = check_scores(model, lora_subset(model), batch)  # raises where it is off
        rows.append(Row(f"capture against autograd, {str(dtype)[6:]}", f"{worst:.1e} of the norm", True))
    check_log_probabilities(model_of(setting, torch.float32, layers=2), batch, tolerance=1e-3)
    return [*rows, Row("chunked head against the model's logits, float32", "within 1e-3 nats", True)]


def passes(setting: Setting) -> list[Row]:
    """Time and memory of a pass of scores beside a plain LoRA backward, and of adding its rows to the moments."""
    dtype = torch.float32 if setting.small else torch.bfloat16
    model = create_lora(model_of(setting, dtype), LoraOptions(r=16))
    subset, batch = lora_subset(model), batch_of(setting, 8)
    weights = list(subset.parameters.values())

    def plain() -> None:
        for weight in weights:
            weight.requires_grad_(True)
        torch.autograd.grad(sequence_logprobs(token_logprobs(model, batch)).sum(), weights)

    def scores() -> None:
        score_pass(model, subset, batch, [lambda name, found: None])

    both = [seconds(run, setting.device) for run in (plain, scores)]
    memory = [peak_bytes(run) / 1e9 for run in (plain, scores)]
    ratio = both[1] / both[0]
    value = f"{both[1]:.3f} s, {both[0]:.3f} s: {ratio:.2f}"
    return [
        Row(f"scores of {setting.tokens:,} tokens, plain LoRA backward", value,
            None if setting.small else ratio <= SLOWEST),
        Row("most memory of either", f"{memory[1]:.3g} GB, {memory[0]:.3g} GB"),
        Row("forward and backward", f"{setting.tokens / both[1]:,.0f} tokens/s"),
        *moments(setting, model, subset, batch),
    ]  # fmt: skip


def moments(setting: Setting, model: Any, subset: Subset, batch: Batch) -> list[Row]:
    """An `alpha-star` step of two prompts, four sequences each, and what of it the moments take."""
    carried = subset.carried
    layout = BlockLayout.of(carried)
    weights = torch.zeros(4, len(batch), dtype=torch.float64, device=setting.device)
    for prompt in range(2):  # t and e of each: differences of the scores of a pair
        for member in range(2):
            weights[2 * member + prompt, 4 * prompt + 2 * member] = 1.0
            weights[2 * member + prompt, 4 * prompt + 2 * member + 1] = -1.0
    prompts = [f"q{k}" for k in range(400)]
    plan = MomentPlan(("t", "e"), False, dict.fromkeys(prompts, 1), 20, layout, BlockLayout.of(subset))
    found, spent, number = DeviceMoments(plan, prompts), [], 0

    def step() -> None:
        nonlocal number
        rows = BlockRows(layout, 4, setting.device)
        score_pass(model, carried, batch, [rows], ScoreOptions(mix=lambda logps: Mixture.of(weights)))
        own = prompts[number : number + 2]
        number += 2
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)
        begin = time.perf_counter()
        found.add(GradientBatch(own, own, {"t": rows.take([0, 1]), "e": rows.take([2, 3])}, None, []))
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)
        spent.append(time.perf_counter() - begin)

    whole = seconds(step, setting.device)
    share = min(spent[1:]) / whole
    value = f"{share:.1%} ({layout.size:,} numbers a gradient)"
    return [Row("moments' share of an alpha-star step", value, None if setting.small else share <= MOST_MOMENTS)]


def generation(setting: Setting) -> list[Row]:
    """Tokens a second of transformers' own sampling."""
    model, new = model_of(setting, torch.float32 if setting.small else torch.bfloat16), 4 if setting.small else 128
    ids = torch.randint(5, setting.shape.words, (16, 8), device=setting.device)

    def run() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=new,
                       min_new_tokens=new, pad_token_id=0)  # fmt: skip

    took = seconds(run, setting.device, 1)
    return [Row("generation, 16 at a time", f"{16 * new / took:,.0f} tokens/s")]


def sharded(setting: Setting) -> list[Row]:
    """Gradients under FSDP2 with one process against those without."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    batch = batch_of(setting, 4)

    def gradients(model: Any) -> dict[str, Tensor]:
        model.requires_grad_(True)
        logits = model(input_ids=batch.input_ids[:, :-1], use_cache=False).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten()).backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    expected = gradients(model_of(setting, torch.float32, layers=2))
    ours = not dist.is_initialized()
    if ours:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        backend = "nccl" if setting.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh(setting.device.type, (1,))
        model = model_of(setting, torch.float32, layers=2)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in gradients(model).items()}
    finally:
        if ours:
            dist.destroy_process_group()
    worst = max(float((found[name] - g).norm() / g.norm().clamp_min(1e-12)) for name, g in expected.items()
                if "k_proj.bias" not in name)  # whose gradient is zero, but for rounding  # fmt: skip
    return [Row("FSDP2 with one process against none, float32", f"{worst:.1e} of the norm", worst < 1e-4)]


def trainer(setting: Setting) -> list[Row]:
    """A training step beside TRL's."""
    name = "a training step, in TRL's"
    missing = [library for library in ("trl", "datasets") if importlib.util.find_spec(library) is None]
    if missing:
        return [Row(name, f"skipped: no {', '.join(missing)} here")]
    if setting.small:
        return [Row(name, "skipped: a comparison of times (`make bench` has it on the CPU)")]
    from benchmarks.training import FIXED, TRL_DPO, interleaved, steps_of, synthetic_case

    with tempfile.TemporaryDirectory() as folder:
        steps, _ = steps_of(synthetic_case(1024), folder)
        found = interleaved({which: steps[which] for which in (FIXED, TRL_DPO)}, 3)
    ours, theirs = (min(found[which]) for which in (FIXED, TRL_DPO))
    return [Row(name, f"{ours:.3f} s with both sets, {theirs:.3f} s with one: {ours / theirs / 2:.2f} a pair",
                ours <= 2.2 * theirs)]  # fmt: skip


PARTS = (capture, passes, generation, sharded, trainer)


def run(setting: Setting) -> list[Row]:
    """All rows; one that raises is a failed row, with the reason."""
    rows = []
    for part in PARTS:
        try:
            rows += part(setting)
        except Exception as error:  # whatever goes wrong on a new machine is what this table is for
            rows.append(Row(part.__name__, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", False))
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def table(rows: list[Row], spent: float) -> str:
    """As Markdown."""
    said = {True: "yes", False: "NO", None: ""}
    info = machine()
    where = info["gpu"] or f"{info['cpu']} (no GPU)"
    lines = [f"On {where}, torch {info['torch']}, transformers {info['transformers']}, {spent:.0f} s.", "",
             "| what | found | as it should be |", "|---|---|---|"]  # fmt: skip
    return "\n".join([*lines, *(f"| {row.name} | {row.value} | {said[row.passed]} |" for row in rows)])


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="in miniature, on the CPU")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    if not options.small and not torch.cuda.is_available():
        print("No GPU is here: nothing was run. `--small` runs the same rows in miniature on the CPU.")
        return 1
    device = torch.device("cpu" if options.small else "cuda")
    tiny = ModelShape(32, 64, 16, 2, 96, tied=True)
    begin = time.time()
    rows = run(Setting(device, tiny if options.small else SHAPES["1.5B"], 64 if options.small else 4096, options.small))
    print(table(rows, time.time() - begin))
    if options.json:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=1), encoding="utf-8")
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
