"""A training step against TRL's DPOTrainer on the same pairs, and what adaptive alpha costs: CPU time and peak memory.

    python benchmarks/training.py                    # the whole table; under six minutes on a quiet two-core machine
    python benchmarks/training.py --rounds 3 --output /tmp/quick

One interleaved run on one thread; times are the process's own CPU time (wall time on a GPU), so that a busy machine
disturbs little; ratios are medians over rounds of the ratio within the round. A step is batching, the reference's
forward, the policy's forward and backward; the optimizer, the same for all, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, median_ratio, peak_bytes
from transformers import Qwen2Config, Qwen2ForCausalLM

from bvpo_stats.model.batching import TokenSequence
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy, with_lora
from bvpo_stats.model.scores import completion_logprobs
from bvpo_stats.model.subset import LoraOptions
from bvpo_stats.records import PreferencePair, TraceRecord
from bvpo_stats.studies.alpha_star.config import AlphaInputs
from bvpo_stats.studies.alpha_star.run import load_examples
from bvpo_stats.training import BVPOConfig, BVPOTrainer

RANK = 16
OURS_DPO, TRL_DPO, FIXED, ADAPTIVE = "ours, alpha = 1", "TRL DPOTrainer", "ours, alpha = 0.5", "ours, adaptive"


@dataclass(frozen=True)
class Case:
    """A model with pairs of both sets and a trace bank.

    Attributes:
        name: What the table calls it.
        build: Makes the policy without an adapter, always with the same weights.
        pairs: D_t and D_e.
        traces: Trace bank of D_t.
        batch_size: Prompts per step.
    """

    name: str
    build: Callable[[], Policy]
    pairs: list[PreferencePair]
    traces: list[TraceRecord]
    batch_size: int


def embedded_case(inputs: AlphaInputs) -> Case:
    """The embedded model on pairs and traces of its own."""
    examples = load_examples(inputs).examples
    pairs = [pair for example in examples for pair in example.pairs]
    traces = [trace for example in examples for trace in example.traces]
    return Case("embedded model, embedded pairs", lambda: load_policy(PolicyOptions(device="cpu")), pairs, traces, 32)


def synthetic_case(hidden: int, prompts: int = 16, batch_size: int = 8) -> Case:
    """A Qwen2 shape with random weights; traces of 50 to 200 tokens, answers of 10 to 30, by a log-uniform law."""
    embedded = load_policy(PolicyOptions(device="cpu"))
    embedded = replace(embedded, template=replace(embedded.template, words=4096))  # the random model's ids

    def build() -> Policy:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=4,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=1024,
        )
        return replace(embedded, model=Qwen2ForCausalLM(config).eval())

    rng = np.random.default_rng(0)
    pairs, traces = [], []
    for number in range(prompts):
        for mode in ("thinking", "nothinking"):
            pairs.append(_pair(rng, number, mode, embedded))
        for side in ("chosen", "rejected"):
            traces += _bank(rng, pairs[-2], side)
    return Case(f"Qwen2 {hidden}x4, random pairs", build, pairs, _with_logps(build(), traces), batch_size)


def _tokens(rng: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    return tuple(rng.integers(10, 4000, size=int(low * (high / low) ** rng.random())).tolist())


def _pair(rng: np.random.Generator, number: int, mode: str, policy: Policy) -> PreferencePair:
    sides = []
    for _ in range(2):
        trace = _tokens(rng, 50, 200) if mode == "thinking" else _tokens(rng, 2, 3)
        sides.append(((*trace, *_tokens(rng, 10, 30), policy.eos_ids[0]), len(trace)))
    (chosen, first), (rejected, second) = sides
    return PreferencePair(
        prompt_id=f"q{number}",
        mode=mode,  # type: ignore[arg-type]
        prompt="",
        chosen="",
        rejected="",
        prompt_ids=tuple(np.random.default_rng(number).integers(10, 4000, size=40).tolist()),
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_answer_start=first,
        rejected_answer_start=second,
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
        model=policy.identity,
        template=policy.template.name,
    )


def _bank(rng: np.random.Generator, pair: PreferencePair, side: str) -> list[TraceRecord]:
    own, start = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_answer_start")
    records = []
    for index in range(4):
        completion = (*_tokens(rng, 50, 200), *own[start:]) if index else own
        records.append(
            TraceRecord(
                prompt_id=pair.prompt_id,
                side=side,  # type: ignore[arg-type]
                source="same-answer" if index else "anchor",
                index=max(0, index - 1),
                prompt_ids=pair.prompt_ids,
                completion_ids=completion,
                answer_start=len(completion) - len(own[start:]),
                trace_logp=0.0,
                joint_logp=0.0,
                temperature=1.0,
                model=pair.model,
                template=pair.template,
            )
        )
    return records


def _with_logps(policy: Policy, traces: list[TraceRecord]) -> list[TraceRecord]:
    sequences = [TokenSequence(trace.prompt_ids, trace.completion_ids) for trace in traces]
    found = completion_logprobs(policy, sequences, [str(i) for i in range(len(sequences))])
    return [
        replace(trace, joint_logp=float(v.sum()), trace_logp=float(v[0, : trace.answer_start].sum()))
        for trace, v in zip(traces, found, strict=True)
    ]


def drifted(policy: Policy) -> Policy:
    """The policy with an adapter off the reference point, as it is in the middle of training."""
    policy = with_lora(policy, LoraOptions(r=RANK))
    torch.manual_seed(1)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-3)
    return policy


def our_trainer(case: Case, folder: str, **settings: Any) -> BVPOTrainer:
    """This package's trainer on a case, with a fresh adapter."""
    args = BVPOConfig(
        output_dir=folder,
        per_device_train_batch_size=case.batch_size,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        **settings,
    )
    return BVPOTrainer(drifted(case.build()), args, case.pairs, traces=case.traces)


def trl_trainer(case: Case, folder: str) -> Any:
    """TRL's trainer around the same adapter; its reference is the bare base model, as ours."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    policy = drifted(case.build())
    weights = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()  # TRL copies the adapter it is given as the reference
    args = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=case.batch_size,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        report_to=[],
    )
    anything = datasets.Dataset.from_list([{"prompt": "1", "chosen": "2", "rejected": "3"}] * 2)
    trainer = DPOTrainer(model=policy.model, args=args, train_dataset=anything, processing_class=policy.tokenizer)
    for name, weight in trainer.model.named_parameters():
        if name in weights:
            weight.data.copy_(weights[name])
    return trainer


def steps_of(case: Case, folder: str) -> tuple[dict[str, Callable[[], Any]], BVPOTrainer]:
    """One training step of each contestant, on the same prompts, as a function of no arguments."""
    ours = {
        OURS_DPO: our_trainer(case, folder, alpha=1.0),
        FIXED: our_trainer(case, folder, alpha=0.5),
        ADAPTIVE: our_trainer(case, folder, alpha="adaptive"),
    }
    train = ours[ADAPTIVE].selection.train[: case.batch_size]
    ids = [prompt.prompt_id for prompt in train]

    def our_step(trainer: BVPOTrainer) -> Callable[[], Any]:
        rows = {p.prompt_id: n for n, p in enumerate(trainer.selection.train)}
        inputs = {"rows": torch.tensor([rows[prompt_id] for prompt_id in ids])}
        trainer.estimator.looks, steps = None, itertools.count(60)  # looks and measurements have their own cadence
        optimizer = torch.optim.AdamW(trainer._pair_model.weights, lr=1e-4)
        for weight in trainer._pair_model.weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        trainer.model.zero_grad()

        def run() -> None:
            trainer.training_step(trainer.model, inputs)
            trainer.model.zero_grad()
            trainer.estimator.finish_step(next(steps), 0.0, optimizer=optimizer)  # what on_step_end does

        return run

    theirs = trl_trainer(case, folder)
    tokens = [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids)}
        for p in (example.both[0] for example in train)
    ]

    def their_step() -> None:
        theirs.training_step(theirs.model, theirs.data_collator(tokens))
        theirs.model.zero_grad()

    for trainer in (*ours.values(), theirs):
        trainer.current_gradient_accumulation_steps = 1
    return {name: our_step(trainer) for name, trainer in ours.items()} | {TRL_DPO: their_step}, ours[ADAPTIVE]


def seconds_of(run: Callable[[], Any]) -> float:
    """CPU seconds of the process; wall seconds where the work is the GPU's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    begin = time.process_time()
    run()
    return time.process_time() - begin


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each by round; the order within a round rotates."""
    names = list(runs)
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            found[name].append(seconds_of(runs[name]))
    return found


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """Times, memory, and the cost of adaptive alpha at the default cadence."""
    with tempfile.TemporaryDirectory() as folder:
        runs, adaptive = steps_of(case, folder)
        seconds = interleaved(runs, rounds)
        peaks = {name: peak_bytes(run) for name, run in runs.items()}
    looks = adaptive.estimator.looks
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "case": case.name,
        "batch_size": case.batch_size,
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "peak_mb": {name: round(value / 2**20, 2) for name, value in peaks.items()},
        "time_ratio_to_trl": round(median_ratio(seconds[OURS_DPO], seconds[TRL_DPO]), 4),
        "memory_ratio_to_trl": round(peaks[OURS_DPO] / peaks[TRL_DPO], 4),
        "adaptive_over_fixed": round(median_ratio(seconds[ADAPTIVE], seconds[FIXED]), 4),
        "default_look_steps": None if looks is None else adaptive.estimator.look_steps,
        "rounds": rounds,
    }


def markdown(result: dict[str, Any]) -> str:
    """The committed table."""
    lines = [
        "# A training step: time and memory",
        "",
        "CPU time of the process on one thread (wall time on a GPU) and peak memory of tensors beyond what was held;",
        "medians of ratios within interleaved rounds. Goals: at most 1.00 of TRL's DPOTrainer for the same pairs, and",
        "adaptive alpha at most 1.02 of fixed alpha; looks at traces take 1% of the tokens beyond that.",
        "",
        "| case | batch | time / TRL | memory / TRL | adaptive / fixed | look every |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for r in result["cases"]:
        lines.append(
            f"| {r['case']} | {r['batch_size']} | {r['time_ratio_to_trl']:.3f} | {r['memory_ratio_to_trl']:.3f} "
            f"| {r['adaptive_over_fixed']:.3f} | {r['default_look_steps'] or '-'} steps |"
        )
    names = [TRL_DPO, OURS_DPO, FIXED, ADAPTIVE]
    lines += ["", "| case | " + " | ".join(names) + " |", "|---|" + "--:|" * 4]
    for r in result["cases"]:
        cells = [f"{1000 * r['seconds'][n]:.0f} ms, {r['peak_mb'][n]:.0f} MB" for n in names]
        lines.append(f"| {r['case']} | " + " | ".join(cells) + " |")
    lines += ["", "## Machine", ""]
    lines += [f"- {name}: {value}" for name, value in result["machine"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all cases and writes ``training.md`` and ``training.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds per case")
    parser.add_argument("--hidden", type=int, nargs="*", default=[256], help="hidden sizes of the random models")
    parser.add_argument("--pairs", default="embedded", help="pairs of the embedded model")
    parser.add_argument("--traces", default=None, help="their trace bank")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder of training.md, training.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [embedded_case(AlphaInputs(pairs=options.pairs, traces=options.traces))]
    cases += [synthetic_case(hidden) for hidden in options.hidden]
    result: dict[str, Any] = {"machine": machine(), "cases": []}
    for case in cases:
        result["cases"].append(run_case(case, options.rounds))
        print(json.dumps(result["cases"][-1]), flush=True)
        options.output.mkdir(parents=True, exist_ok=True)  # case by case, so that nothing measured is lost
        (options.output / "training.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.output / "training.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
