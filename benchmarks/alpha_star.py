"""Where the time and the memory of ``bvpo-stats alpha-star`` go, on the embedded model and its pairs.

    python benchmarks/alpha_star.py

Each case runs in a process of its own, on one thread. Times are CPU seconds of the process, which hold on a busy
machine. `model` is everything inside forward and backward passes less the combining of scores there; the target is 80%
of the run, reading the records and loading the model not counted. Memory is the growth of the process's peak over what
it held before the pass. Needs of a 1.5B model follow from its shapes; its activations from one of its layers, run
here. Writes ``alpha_star.md`` and ``alpha_star.json`` next to this file.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import machine, peak_bytes

TARGET = 0.8
GROUPS = 20
CASES = (
    ("theta_ref, no traces needed", 256, 0.0, 16_384),
    ("8 traces per answer", 64, 0.02, 16_384),
    ("8 traces per answer", 256, 0.02, 16_384),
    ("8 traces per answer", 64, 0.02, 4096),
    ("8 traces per answer", 256, 0.02, 4096),
)
"""Name, prompts, distance from theta_ref, budget of tokens per forward."""
SHAPE = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
LAYERS, VOCABULARY, RANK = 28, 151_936, 16


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: What it is.
        prompts: Prompts.
        budget: Tokens per forward, at most.
        sequences: Sequences run through the model.
        tokens: Their tokens.
        method: Estimator of mu that the ladder chose.
        seconds: CPU seconds of the run, records in memory and model loaded, to the report.
        model: Of these, forward and backward passes.
        combining: Scores into gradients.
        moments: Gradients into moments.
        rest: Everything else: planning, weights, the report.
        loading: CPU seconds to import, read the records and load the model, not in ``seconds``.
        parameters: d.
        closed_bytes: What the sums of closed groups take, on disk or in memory.
        open_bytes: What those of the open group take, on the device.
        growth_bytes: Growth of the peak resident memory.
    """

    name: str
    prompts: int
    budget: int
    sequences: int
    tokens: int
    method: str
    seconds: float
    model: float
    combining: float
    moments: float
    rest: float
    loading: float
    parameters: int
    closed_bytes: int
    open_bytes: int
    growth_bytes: int

    @property
    def model_share(self) -> float:
        """Share of forward and backward passes."""
        return self.model / self.seconds


class Stopwatch:
    """CPU seconds inside some functions, by replacing them where they are looked up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Counts every call of ``owner.name`` under a label."""
        original: Callable[..., Any] = getattr(owner, name)
        self.seconds.setdefault(label, 0.0)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin = time.process_time()
            try:
                return original(*arguments, **keywords)
            finally:
                self.seconds[label] += time.process_time() - begin

        setattr(owner, name, timed)


def run_case(name: str, prompts: int, drift: float, budget: int) -> Case:
    """One estimate in this process."""
    from bvpo_stats.gradients import engine, reference, stream
    from bvpo_stats.gradients.moments import DeviceMoments
    from bvpo_stats.gradients.options import StreamOptions
    from bvpo_stats.model.capture import Tape
    from bvpo_stats.model.policy import PolicyOptions, load_policy
    from bvpo_stats.studies.alpha_star.config import AlphaInputs
    from bvpo_stats.studies.alpha_star.run import alpha_star, load_examples, prepare_subset

    torch.set_num_threads(1)
    inputs = AlphaInputs(limit=prompts)
    examples = load_examples(inputs).examples
    pairs = [pair for example in examples for pair in example.pairs]
    traces = [trace for example in examples for trace in example.traces]
    policy, subset, _ = prepare_subset(load_policy(PolicyOptions(device="cpu")))
    generator = torch.Generator().manual_seed(0)
    for key, weight in subset.parameters.items():
        if "lora_B" in key and drift:
            weight.data += drift * torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
    watch, count = Stopwatch(), [0, 0]
    for owner, function in ((engine, "score_pass"), (reference, "log_probabilities"), (stream, "check_scores"),
                            (reference, "completion_logprobs")):  # fmt: skip
        watch.watch(owner, function, "model")
    watch.watch(Tape, "_emit", "combining")
    for function in ("add", "reduce"):
        watch.watch(DeviceMoments, function, "moments")
    kept: list[DeviceMoments] = []
    add = DeviceMoments.add

    def keep(self: DeviceMoments, *arguments: Any) -> None:
        kept[:] = [self]
        add(self, *arguments)

    DeviceMoments.add = keep  # type: ignore[method-assign]
    scores = engine.score_pass

    def counted(model: Any, theta: Any, batch: Any, *arguments: Any) -> Any:
        count[0] += len(batch)
        count[1] += int(batch.attention_mask.sum())
        return scores(model, theta, batch, *arguments)

    engine.score_pass = counted
    stream_options = StreamOptions(traces_per_answer=8, half_splits=True, max_tokens=budget)
    loading, before = time.process_time(), _peak_resident()
    report = alpha_star(policy, pairs, traces=traces, subset=subset, groups=GROUPS, stream=stream_options)
    seconds, growth = time.process_time() - loading, _peak_resident() - before
    spent, plan = watch.seconds, kept[0].plan
    closed = len(plan.cells) * len(plan.rows) * plan.layout.size * plan.stored.itemsize
    model = spent["model"] - spent["combining"]
    return Case(name, report.n_prompts, budget, *count, report.marginal.method, seconds, model, spent["combining"],
                spent["moments"], seconds - spent["model"] - spent["moments"], loading, subset.size,
                closed, plan.open_bytes, growth)  # fmt: skip


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def larger_model() -> dict[str, float]:
    """What a 1.5B model (Qwen2.5's shapes, rank-16 LoRA on all linear layers) needs, from shapes and from one layer."""
    h, f = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = h // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    parameters = LAYERS * RANK * (2 * (h + h) + 2 * (h + kv) + 3 * (h + f))
    weights = VOCABULARY * h + LAYERS * (2 * h * h + 2 * h * kv + 3 * h * f)
    tokens = 256
    one, two = (_layer_peak(layers, tokens) for layers in (1, 2))
    per_token = (two - one) / tokens
    budget = 16_384
    return {
        "lora_parameters": parameters,
        "model_parameters": weights,
        "weights_gb": 2 * weights / 1e9,
        "activation_bytes_per_token_and_layer": per_token,
        "activations_gb_at_16384_tokens": per_token * LAYERS * budget / 1e9,
        "activations_gb_at_4096_tokens": per_token * LAYERS * 4096 / 1e9,
    }


def _layer_peak(layers: int, tokens: int) -> int:
    """Peak bytes of scores over a bfloat16 model of so many layers of the larger model's width."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from bvpo_stats.model.batching import TokenSequence, collate
    from bvpo_stats.model.scores import score_pass
    from bvpo_stats.model.subset import LoraOptions, create_lora, lora_subset

    config = Qwen2Config(**SHAPE, num_hidden_layers=layers, vocab_size=64, tie_word_embeddings=True)
    model = create_lora(Qwen2ForCausalLM(config).bfloat16().eval(), LoraOptions(r=RANK))
    subset = lora_subset(model)
    batch = collate([TokenSequence((1,), tuple(2 + number % 60 for number in range(tokens - 1)))])
    return peak_bytes(lambda: score_pass(model, subset, batch, [lambda name, scores: None]))


def markdown(cases: list[Case], larger: dict[str, float], setting: dict[str, Any]) -> str:
    """The tables."""
    met = all(case.model_share >= TARGET for case in cases if case.prompts == 256)
    lines = [
        "# Time and memory of alpha-star", "",
        "On the embedded model and its pairs, one thread, CPU seconds; from records in memory to the report. "
        "`budget`: tokens a forward, at most.", "",
        "| case | prompts | budget | sequences | tokens | mu | seconds | model | combining | moments | rest |",
        "|---|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for case in cases:
        shares = [x / case.seconds for x in (case.model, case.combining, case.moments, case.rest)]
        numbers = " | ".join(f"{share:.1%}" for share in shares)
        lines.append(f"| {case.name} | {case.prompts} | {case.budget:,} | {case.sequences:,} | {case.tokens:,} | "
                     f"{case.method} | {case.seconds:.1f} | {numbers} |")  # fmt: skip
    lines += [
        "", f"Target: {TARGET:.0%} in forward and backward passes at 256 prompts; {'met' if met else 'MISSED'}. "
        f"Import, records and model take {cases[0].loading:.1f} s before.", "",
        "| case | prompts | budget | d | closed groups | open group | growth of the peak |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for case in cases:
        sizes = " | ".join(f"{x / 1e6:.0f} MB" for x in (case.closed_bytes, case.open_bytes, case.growth_bytes))
        lines.append(f"| {case.name} | {case.prompts} | {case.budget:,} | {case.parameters:,} | {sizes} |")
    lines += [
        "", "Closed groups: on disk, or here (from Python) in memory; d counts the A of LoRA, which has no gradient at "
        "theta_ref and is not kept.",
        "", "## A 1.5B model on one GPU: computed, not measured", "",
        f"- theta, rank-{RANK} LoRA on all linear layers: {larger['lora_parameters']:,.0f} parameters.",
        f"- GPU: weights in bfloat16 {larger['weights_gb']:.1f} GB, activations "
        f"{larger['activations_gb_at_16384_tokens']:.0f} GB at 16,384 tokens a forward (the default of --max-tokens), "
        f"{larger['activations_gb_at_4096_tokens']:.1f} GB at 4,096 "
        f"({larger['activation_bytes_per_token_and_layer'] / 1e3:.0f} kB per token and layer, by the allocator's "
        "account of one such layer on this machine); less with gradient checkpointing.",
        "", "Setting: " + ", ".join(f"{key} {value}" for key, value in setting.items()) + ".", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Runs the cases and writes the results; with ``--case`` one of them, printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help="run this case only and print it as JSON")
    parser.add_argument("--larger", action="store_true", help="print the needs of the larger model only")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(asdict(run_case(*CASES[options.case]))))
        return
    if options.larger:
        torch.set_num_threads(1)
        print(json.dumps(larger_model()))
        return
    cases = [Case(**_child("--case", str(number))) for number in range(len(CASES))]
    larger, setting, here = _child("--larger"), machine(), Path(__file__).parent
    plain = {"cases": [{**asdict(case), "model_share": case.model_share} for case in cases], "larger_model": larger,
             "machine": setting}  # fmt: skip
    (here / "alpha_star.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    text = markdown(cases, larger, setting)
    (here / "alpha_star.md").write_text(text, encoding="utf-8")
    print(text)


def _child(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
