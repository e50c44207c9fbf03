"""Speed of sampling: the transformers engine against a bare ``generate`` loop, on the embedded model.

    python benchmarks/sampling.py

Both draw the same requests in the same batches, in turn; the bare loop samples with ``do_sample=True`` and keeps
nothing. Times are wall-clock and CPU seconds (the latter hold on a busy machine); figures are medians over the repeats.
The target is 90% of the bare loop's tokens per second at the bare loop's best batch size. Writes ``sampling.md`` and
``sampling.json`` next to this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import GenerationConfig

from bvpo_stats.embedded.assets import embedded_prompts
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy
from bvpo_stats.records import MODES
from bvpo_stats.sampling.engines.base import Request, SamplingOptions
from bvpo_stats.sampling.engines.transformers_engine import TransformersEngine

TARGET = 0.9
Draw = Callable[[Sequence[Request]], int]
"""Draws a batch; returns the number of tokens written, up to and with the end of each response."""


@dataclass(frozen=True)
class Row:
    """One batch size.

    Attributes:
        batch_size: Responses drawn at once.
        bare: Tokens per second of the bare loop, wall-clock median.
        ours: The same for the engine.
        ratio: ours / bare, median over repeats of the ratio within a repeat.
        bare_cpu: Tokens per CPU second of the bare loop.
        ours_cpu: The same for the engine.
        ratio_cpu: ours / bare in CPU time.
    """

    batch_size: int
    bare: float
    ours: float
    ratio: float
    bare_cpu: float
    ours_cpu: float
    ratio_cpu: float


def bare_loop(policy: Policy, options: SamplingOptions) -> Draw:
    """What a user would write: left padding, ``generate``, done."""
    settings = GenerationConfig(
        do_sample=True,
        temperature=options.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=options.max_new_tokens,
        eos_token_id=list(policy.eos_ids),
        pad_token_id=policy.pad_id,
    )

    @torch.inference_mode()
    def draw(batch: Sequence[Request]) -> int:
        width = max(len(request.prompt_ids) for request in batch)
        ids = torch.full((len(batch), width), policy.pad_id)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        written = policy.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:]
        ended = torch.isin(written, torch.tensor(policy.eos_ids))
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, torch.tensor(written.shape[1]))
        return int(first.sum())

    return draw


def engine(policy: Policy, options: SamplingOptions) -> Draw:
    """The engine of ``bvpo-stats sample``."""
    ours = TransformersEngine(policy)
    return lambda batch: sum(len(draw.completion_ids) for draw in ours.generate(batch, options))


def requests(policy: Policy, prompts: int, samples: int) -> list[list[Request]]:
    """Requests of the embedded task, a list for each mode."""
    chosen = embedded_prompts(prompts)
    template = policy.template
    return [
        [Request(p, mode, i, template.prompt_ids(p.prompt, mode), "") for p in chosen for i in range(samples)]
        for mode in MODES
    ]


def rate(draw: Draw, asked: list[list[Request]], size: int) -> tuple[float, float]:
    """Tokens per second of wall-clock and of CPU time over all requests."""
    wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for mode in asked:
        for start in range(0, len(mode), size):
            tokens += draw(mode[start : start + size])
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def compare(policy: Policy, options: SamplingOptions, asked: list[list[Request]], size: int, repeats: int) -> Row:
    """Both contestants in turn, each first in every other repeat."""
    draws = {"bare": bare_loop(policy, options), "ours": engine(policy, options)}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in draws}
    for repeat in range(repeats):
        for name in list(draws) if repeat % 2 else reversed(draws):
            rates[name].append(rate(draws[name], asked, size))
    pairs = list(zip(rates["ours"], rates["bare"], strict=True))
    ratios = [statistics.median(ours[clock] / bare[clock] for ours, bare in pairs) for clock in (0, 1)]
    middle = {name: [statistics.median(one[clock] for one in all_) for clock in (0, 1)] for name, all_ in rates.items()}
    return Row(size, middle["bare"][0], middle["ours"][0], ratios[0], middle["bare"][1], middle["ours"][1], ratios[1])


def markdown(rows: list[Row], setting: dict[str, object]) -> str:
    """The table, the verdict, and how it was measured."""
    best = max(rows, key=lambda row: row.bare)
    lines = [
        "# Sampling speed",
        "",
        "Tokens per second on the embedded model, both modes; median of interleaved repeats. CPU columns count CPU",
        "seconds of the process, which do not suffer from other work on the machine.",
        "",
        "| batch | bare `generate` | engine | ratio | bare, CPU | engine, CPU | ratio, CPU |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {r.batch_size} | {r.bare:.0f} | {r.ours:.0f} | {r.ratio:.2f} | {r.bare_cpu:.0f} | {r.ours_cpu:.0f} "
            f"| {r.ratio_cpu:.2f} |"
            for r in rows
        ),
        "",
        f"At the bare loop's best batch size, {best.batch_size}: {best.ratio:.0%} of its tokens per second "
        f"({best.ratio_cpu:.0%} in CPU time). Target: {TARGET:.0%}; {'met' if best.ratio >= TARGET else 'MISSED'}.",
        "",
        "The engine leaves finished rows behind every 32 steps; bare `generate` computes every row until the longest",
        "of its batch has ended.",
        "",
        "Setting: " + ", ".join(f"{name} {value}" for name, value in setting.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 48, 120, 240])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    policy = load_policy(PolicyOptions(device="cpu"))
    options = SamplingOptions(samples=arguments.samples)
    asked = requests(policy, arguments.prompts, arguments.samples)
    rows = []
    for size in arguments.batch_sizes:
        rows.append(compare(policy, options, asked, size, arguments.repeats))
        print(rows[-1], flush=True)
    setting: dict[str, object] = {
        "model": policy.identity,
        "prompts": arguments.prompts,
        "samples": arguments.samples,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": platform.machine(),
    }
    text = markdown(rows, setting)
    print(text)
    (arguments.output / "sampling.md").write_text(text, encoding="utf-8")
    data = {"setting": setting, "target": TARGET, "rows": [asdict(row) for row in rows]}
    (arguments.output / "sampling.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
