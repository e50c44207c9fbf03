"""Per-sequence gradients against a plain backward and against peers: time and memory as ratios, in one interleaved run.

    python benchmarks/scores.py                      # the whole table; minutes on a quiet two-core machine
    python benchmarks/scores.py --hidden 128 --repeats 5 --output /tmp/quick

Bergson takes part where it is importable. Its declared dependencies bring CUDA builds of torch; without them:
``pip install --no-deps bergson natsort petname simple-parsing docstring_parser ml_dtypes torchopt optree``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contestants import Setting, available
from measure import interleaved_seconds, machine, median_ratio, peak_bytes
from transformers import Qwen2Config, Qwen2ForCausalLM

from bvpo_stats.model.batching import TokenSequence, collate, length_batches
from bvpo_stats.model.head import Head, head_logprobs
from bvpo_stats.model.subset import LoraOptions, create_lora, lora_subset

YARDSTICK = "plain"
SLOW = ("torch.func", "single_sequences")  # left out at sizes where they would not fit or finish


@dataclass(frozen=True)
class Case:
    """One row block of the table: a Qwen2 shape and a batch."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_heads: int
    words: int
    sequences: int
    tokens: int
    rank: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def shape(self) -> str:
        return f"{self.hidden}x{self.layers}"

    @property
    def batch(self) -> str:
        return f"{self.sequences}x{self.tokens}"


def cpu_cases(hidden_sizes: list[int]) -> list[Case]:
    """Four-layer Qwen2 shapes of these widths, each at three batches."""
    return [
        Case(hidden, 4, 4 * hidden, hidden // 32, hidden // 64, 2048, sequences, tokens)
        for hidden in hidden_sizes
        for sequences, tokens in ((16, 64), (16, 256), (8, 512))
    ]


def cuda_cases() -> list[Case]:
    """Qwen2 1.5B's shape with random weights, 4,096 tokens in all and 4,096 tokens per sequence."""
    shape = (1536, 28, 8960, 12, 2, 151_936)
    return [Case(*shape, n, t, rank=16, dtype=torch.bfloat16, device="cuda") for n, t in ((8, 512), (4, 4096))]


def setting_of(case: Case) -> Setting:
    """A case's model, subset and batch, with the same random weights and tokens every time."""

    def build() -> Any:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=case.words,
            hidden_size=case.hidden,
            intermediate_size=case.intermediate,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.key_heads,
            max_position_embeddings=4096,
        )
        model = create_lora(Qwen2ForCausalLM(config).to(case.dtype), LoraOptions(r=case.rank))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(case.dtype)
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
        return model.to(case.device)

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(case.words, (case.sequences, case.tokens), generator=generator).tolist()
    cut = case.tokens // 4
    sequences = [TokenSequence(tuple(row[:cut]), tuple(row[cut:])) for row in ids]
    return Setting(build, lora_subset, collate(sequences, device=case.device))


def run_case(case: Case, repeats: int) -> list[dict[str, Any]]:
    """All contestants on one case; each is checked against the yardstick's gradient first."""
    setting = setting_of(case)
    contestants = {
        name: make(setting) for name, make in available().items() if case.device == "cpu" or name not in SLOW
    }
    truth = contestants[YARDSTICK].gradients()[0]
    for name, contestant in contestants.items():
        error = float((contestant.gradients().float().sum(0) - truth.float()).norm() / truth.float().norm())
        if error > (1e-3 if case.dtype == torch.float32 else 0.1):
            raise RuntimeError(f"{name} is off by {error:.1e} of the gradient's norm on {case.shape} {case.batch}.")
    runs = {name: contestant.run for name, contestant in contestants.items()}
    seconds = interleaved_seconds(runs, repeats)
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    subset = lora_subset(setting.build())
    largest = case.sequences * max(p.numel() for p in subset.parameters.values()) * 4
    return [
        {
            "case": case.batch,
            "shape": case.shape,
            "engine": name,
            "time_ratio": round(median_ratio(seconds[name], seconds[YARDSTICK]), 4),
            "memory_ratio": round(peaks[name] / peaks[YARDSTICK], 4),
            "seconds": round(statistics.median(seconds[name]), 5),
            "peak_mb": round(peaks[name] / 2**20, 3),
            "largest_weight_scores_mb": round(largest / 2**20, 3),
            "repeats": repeats,
        }
        for name in runs
    ]


def padding_shares() -> list[dict[str, Any]]:
    """Padding on 1,000 lengths spread tenfold (log-uniform, 400 to 4,000 tokens), by way of batching."""
    rng = random.Random(0)
    lengths = [int(400 * 10 ** rng.random()) for _ in range(1000)]
    pairs = [i // 2 for i in range(1000)]

    def share(batches: list[list[int]]) -> float:
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        return round(1 - sum(lengths) / padded, 4)

    order = [list(range(start, start + 8)) for start in range(0, 1000, 8)]
    by_length = length_batches(lengths, max_tokens=16_384)
    together = length_batches(lengths, max_tokens=16_384, groups=pairs)
    split = []
    for members in together:  # as the gradient estimators do: a microbatch of whole pairs, run in equal-length parts
        split += [
            [members[i] for i in part] for part in length_batches([lengths[i] for i in members], max_tokens=16_384)
        ]
    ways = {"in the order of the file, 8 at a time": order, "by length": by_length}
    ways |= {"pairs in one rectangle": together, "pairs in one microbatch, run in parts": split}
    return [{"batching": name, "padding": share(batches), "forwards": len(batches)} for name, batches in ways.items()]


def head_memory() -> list[dict[str, Any]]:
    """Peak of forward and backward through the chunked head at 4,096 tokens x 151,936 words."""
    rows = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        weight = torch.randn(151_936, 32).to(dtype).to(device)
        hidden = torch.randn(4096, 32).to(dtype).to(device).requires_grad_()
        targets = torch.randint(151_936, (4096,)).to(device)
        peak = peak_bytes(lambda h=hidden, w=weight, t=targets: head_logprobs(h, Head(w, None), t).sum().backward())
        full = 4096 * 151_936 * 4
        rows.append({"dtype": str(dtype)[6:], "peak_mb": round(peak / 1e6, 1), "full_logits_mb": round(full / 1e6, 1)})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The committed table."""
    lines = [
        "# Per-sequence gradients: time and memory",
        "",
        "Ratios to `plain`, one batched LoRA forward and backward by PEFT and autograd; medians over interleaved",
        "rounds. `plain_fused` sums gradients through this package's fused LoRA layer, so bvpo_stats / plain_fused is",
        "the cost of per-sequence gradients alone. Memory is the peak of tensors beyond the model.",
        "",
        "| shape | batch | engine | time | memory | ms | MB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['shape']} | {r['case']} | {r['engine']} | {r['time_ratio']:.2f} | {r['memory_ratio']:.2f} "
            f"| {1000 * r['seconds']:.1f} | {r['peak_mb']:.1f} |"
        )
    lines += ["", "## Padding on lengths spread tenfold", "", "| batching | padding | forwards |", "|---|---:|---:|"]
    lines += [f"| {r['batching']} | {100 * r['padding']:.1f}% | {r['forwards']} |" for r in result["padding"]]
    lines += ["", "## Chunked head, 4,096 tokens x 151,936 words", "", "| dtype | peak MB | full logits MB |"]
    lines += ["|---|---:|---:|"]
    lines += [f"| {r['dtype']} | {r['peak_mb']} | {r['full_logits_mb']} |" for r in result["head"]]
    lines += ["", "## Machine", ""]
    lines += [f"- {name}: {value}" for name, value in result["machine"].items()]
    for name in ("opacus", "bergson"):
        if result["machine"][name] == "not installed":
            lines.append(f"- {name} was not run: not installed.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all cases and writes ``scores.md`` and ``scores.json`` after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="*", default=[128, 256, 512], help="hidden sizes of the CPU cases")
    parser.add_argument("--repeats", type=int, default=9, help="rounds per case")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for scores.md, scores.json")
    options = parser.parse_args()
    cases = cpu_cases(options.hidden)
    if torch.cuda.is_available():
        cases = cuda_cases() + [Case(**{**vars(case), "device": "cuda"}) for case in cases]
    options.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "rows": [], "padding": padding_shares(), "head": head_memory()}
    for case in cases:
        rows = run_case(case, options.repeats)
        result["rows"] += rows
        print(case.shape, case.batch, {row["engine"]: row["time_ratio"] for row in rows}, flush=True)
        # After every case: an interrupted run keeps what it has measured.
        (options.output / "scores.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.output / "scores.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
