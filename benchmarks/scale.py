"""What a run needs: memory, disk and time from formulas (docs/scale.md), and what was measured (benchmarks/scale.md).

python -m benchmarks.scale             writes docs/scale.md from `bvpo_stats.model.needs`
python -m benchmarks.scale --measure   measures alpha-star on a model of 135M parameters' shape (random weights, CPU)
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bvpo_stats.model.needs import ModelShape

SHAPES = {
    "1.5B": ModelShape(1536, 8960, 256, 28, 151_936, tied=True),
    "7B": ModelShape(3584, 18_944, 512, 28, 152_064),
    "8B": ModelShape(4096, 14_336, 1024, 32, 128_256),
    "32B": ModelShape(5120, 27_648, 1024, 64, 152_064),
    "70B": ModelShape(8192, 28_672, 1024, 80, 128_256),
}
SMALL = ModelShape(576, 1536, 192, 30, 49_152, tied=True)
"""Of SmolLM2-135M."""
RANK, PROBE = 16, 8
TOKENS = 8_192
PROMPT_TOKENS = 7_500
"""Of the sequences of one prompt: two pairs and traces, 5 of 1,500 tokens."""
PROMPTS = 1_000
SPEED = 0.4 * 989e12
"""Operations a second that an H100 gets out of bfloat16: 40% of what it has."""
GPUS = (1, 2, 4, 8, 16, 32, 64)
PAGE = Path(__file__).parent.parent / "docs" / "scale.md"


def gigabytes(size: float) -> str:
    """In units of 10^9 bytes.

    >>> gigabytes(3.14e9), gigabytes(314e9), gigabytes(2e7)
    ('3.1', '314', '0.02')
    """
    size /= 1e9
    return f"{size:.0f}" if size >= 10 else f"{size:.1f}" if size >= 0.1 else f"{size:.2f}"


def page() -> str:
    """The page of documentation."""
    lines = [
        "# What a run needs", "",
        "Computed, not measured: this package has **never run on a GPU**. Every number follows from a model's shape",
        "by the formulas of `bvpo_stats/model/needs.py`; `tests/model/test_needs.py` holds them against what small",
        "runs take (activations, Adam's state, the file of moments). `python -m benchmarks.scale` writes this page;",
        "GB are 10^9 bytes. What was measured on a CPU is in [benchmarks/scale.md](../benchmarks/scale.md).", "",
        "## Training: GB on each GPU", "",
        f"AdamW, {TOKENS:,} padded tokens a microbatch, layers computed again in backward. All weights: float32",
        "masters and moments, sharded (FSDP2, ZeRO-3). LoRA: the base in bfloat16 on each GPU.", "",
        "| GPUs | " + " | ".join(f"{name}, all | {name}, LoRA" for name in SHAPES) + " |",
        "|--:|" + "--:|--:|" * len(SHAPES),
    ]  # fmt: skip
    for gpus in GPUS:
        cells = [gigabytes(s.training(gpus, TOKENS, rank)) for s in SHAPES.values() for rank in (None, RANK)]
        lines.append(f"| {gpus} | " + " | ".join(cells) + " |")
    lines += [
        "", "A GPU of 80 GB takes what is below about 70. LoRA does not shrink with GPUs: each holds the base.", "",
        "`examples/` has a configuration of accelerate for each way: `ddp`, `fsdp2`, `zero2`, `zero3`. In two",
        "processes on CPUs the weights are those of one: DistributedDataParallel and FSDP2 to 1e-10 in float64 (the",
        "tests), ZeRO to 1e-5 in float32 ([benchmarks/zero.md](../benchmarks/zero.md)). Adaptive alpha needs the",
        "gradients of D_t and D_e apart, which ZeRO gives to no process, and `--bf16` needs autocast, which DeepSpeed",
        "turns off: both are refused there; take FSDP2.", "",
        "With `--bf16` weights travel between GPUs in float32 (12 bytes a weight and microbatch: gathered for forward",
        "and for backward, and the gradient), and products are formed in bfloat16 by autocast. FSDP2's",
        "`MixedPrecisionPolicy(param_dtype=bfloat16)` would make these 8 bytes, and is not used: it rounds norms,",
        "embeddings and the residual stream too, which autocast in one process does not, so several processes would",
        "not be one; and it is fixed once for all forwards, while curvature and looks at the bias need float32 - their",
        "finite differences would be its rounding.", "",
        "## `alpha-star`", "",
        "Each process holds a whole model in bfloat16: GPUs divide the time, not the memory; what does not fit",
        f"one GPU does not run. {TOKENS:,} padded tokens a pass (`--max-tokens`), 20 groups, t, e and m;",
        "a fresh adapter carries its B half only. Disk: `moments.bin` with the open group, for each process.", "",
        "| model | weights | LoRA r16: carried | GPU, GB | disk, GB | probe r8: carried | GPU, GB | disk, GB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, s in SHAPES.items():
        parts = []
        for numbers in (s.moving(RANK), s.probed(PROBE)):
            sizes = gigabytes(s.alpha_star(TOKENS, numbers)), gigabytes(s.closed(numbers))
            parts += [f"{numbers / 1e6:.1f}M", *sizes]
        lines.append(f"| {name} | {s.parameters / 1e9:.2f}B | " + " | ".join(parts) + " |")
    lines += [
        "", "Exact gradients of all Linear weights (`--theta PATTERN`) take 4 bytes a weight and sequence instead:",
        "that is what the probe is for.", "",
        "## Time", "",
        f"Minutes for {PROMPTS:,} prompts of {PROMPT_TOKENS:,} tokens (5 sequences of 1,500), at 40% of an H100's",
        "bfloat16 operations; sampling them is not counted. `alpha-star` on so many GPUs, and an epoch of",
        "training on 8.", "",
        "| model | " + " | ".join(map(str, GPUS)) + " | epoch |",
        "|---|" + "--:|" * (len(GPUS) + 1),
    ]  # fmt: skip
    for name, s in SHAPES.items():
        tokens = PROMPTS * PROMPT_TOKENS
        minutes = [s.operations(tokens, trained=False) / SPEED / 60 / gpus for gpus in GPUS]
        epoch = (s.operations(tokens, trained=True) + 2.0 * s.parameters * tokens) / SPEED / 60 / 8
        lines.append(
            f"| {name} | " + " | ".join(f"{h:.0f}" if h >= 10 else f"{h:.2g}" for h in (*minutes, epoch)) + " |"
        )
    lines += ["", "An epoch adds the reference's forward.", ""]
    return "\n".join(lines)


def measure(folder: Path, limit: int | None) -> dict[str, float]:
    """Peak memory, disk and time of one `alpha-star` in a process of its own."""
    out = folder / "run"
    words = [sys.executable, "-m", "bvpo_stats.cli.main", "alpha-star", "--model", str(folder / "model"), "--pairs",
             str(folder / "pairs"), "--max-tokens", "2048", "--output", str(out)]  # fmt: skip
    begin = time.time()
    subprocess.run([*words, *([] if limit is None else ["--limit", str(limit)])], check=True, capture_output=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    disk = sum(file.stat().st_size for file in out.glob("moments*"))
    return {"peak_gb": usage.ru_maxrss * 1024 / 1e9, "disk_gb": disk / 1e9, "cpu_s": usage.ru_utime,
            "wall_s": time.time() - begin}  # fmt: skip


def make_case(folder: Path, shape: ModelShape = SMALL, prompts: int = 24) -> None:
    """A model of random weights with the embedded tokenizer, and made-up pairs of some hundred tokens."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bvpo_stats.model.policy import PolicyOptions, load_policy
    from bvpo_stats.records import PreferencePair, to_dict

    embedded = load_policy("embedded")
    heads = max(1, shape.hidden // 64)
    config = LlamaConfig(vocab_size=shape.words, hidden_size=shape.hidden, intermediate_size=shape.width,
                         num_hidden_layers=shape.layers, num_attention_heads=heads, tie_word_embeddings=shape.tied,
                         num_key_value_heads=shape.keys * heads // shape.hidden, eos_token_id=embedded.eos_ids[0],
                         max_position_embeddings=8192)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    embedded.tokenizer.save_pretrained(folder / "model")
    policy = load_policy(PolicyOptions(model=str(folder / "model")))
    (folder / "pairs").mkdir()
    for mode in ("thinking", "nothinking"):
        rows = []
        for n in range(prompts):
            rng, question = np.random.default_rng([n, mode == "thinking"]), f"{n} + {n % 7}"
            closing, sides = tuple(policy.template.empty_trace_ids(question)[1]), []
            for _ in range(2):
                trace = tuple(rng.integers(10, 40, size=int(rng.integers(60, 220)) * (mode == "thinking")).tolist())
                answer = (*rng.integers(10, 40, size=int(rng.integers(20, 60))).tolist(), policy.eos_ids[0])
                sides.append(((*trace, *closing, *answer), len(trace) + len(closing)))
            (chosen, first), (rejected, second) = sides
            pair = PreferencePair(
                prompt_id=f"q{n}", mode=mode, prompt=question, chosen="a", rejected="b", chosen_ids=chosen,
                rejected_ids=rejected, prompt_ids=tuple(policy.template.prompt_ids(question, "thinking")),
                chosen_answer_start=first, rejected_answer_start=second, chosen_answer="a", rejected_answer="b",
                chosen_reward=1.0, rejected_reward=0.0, chosen_index=0, rejected_index=1, temperature=1.0, top_p=1.0,
                top_k=0, cut_share=0.0, unclosed_share=0.0, model=policy.identity, template=policy.template.name,
            )  # fmt: skip
            rows.append(json.dumps(to_dict(pair)) + "\n")
        (folder / "pairs" / f"{mode}.jsonl").write_text("".join(rows), encoding="utf-8")


def main() -> None:
    """Writes the page, or measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    if not options.measure:
        PAGE.write_text(page(), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        make_case(Path(folder))
        print(json.dumps(measure(Path(folder), options.limit), indent=1))


if __name__ == "__main__":
    main()
