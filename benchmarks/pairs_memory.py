"""Peak memory and speed of a pairs run over many prompts.

    python benchmarks/pairs_memory.py --prompts 100000

Writes synthetic samples of the embedded task (five responses per prompt and mode, both modes, batches of one mode as a
sampling run writes them), pairs them in a process of its own, and prints that process's peak resident memory and time.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

SAMPLES = 5
_BATCH = 32  # prompts whose responses of one mode stand together in the file
_WORDINGS = ("{}", "It is {}.", "The answer is {}.")
_CHILD = """
import json, re, sys, time
from pathlib import Path
from bvpo_stats.model.policy import PolicyOptions
from bvpo_stats.studies.pairs.run import PairsConfig, run_pairs
started = time.monotonic()
report = run_pairs(PairsConfig(Path(sys.argv[1]), sys.argv[3], PolicyOptions(device="cpu")), Path(sys.argv[2]))
print(json.dumps({
    "peak_mb": int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024,
    "seconds": time.monotonic() - started,
    "pairs": sum(summary.pairs for summary in report.modes.values()),
}))
"""


@dataclass(frozen=True)
class Measurement:
    """What a pairs run took.

    Attributes:
        prompts: Number of prompts.
        responses: Number of responses.
        pairs: Number of pairs made.
        peak_mb: Peak resident memory of the process, MiB.
        seconds: Time of the run, imports left out.
    """

    prompts: int
    responses: int
    pairs: int
    peak_mb: float
    seconds: float


def write_samples(folder: Path, prompts: int, seed: int = 0) -> int:
    """Writes synthetic samples; returns how many."""
    from bvpo_stats.embedded.tokenizer import build_tokenizer
    from bvpo_stats.model.templates import find_template
    from bvpo_stats.records import MODES

    tokenizer = build_tokenizer()
    template = find_template(tokenizer)
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as handle:
        for start in range(0, prompts, _BATCH):
            questions = [
                (number, rng.randint(0, 99), rng.randint(0, 99))
                for number in range(start, min(start + _BATCH, prompts))
            ]
            for mode in MODES:
                _write_block(handle, template, rng, questions, mode)
    return prompts * SAMPLES * len(MODES)


def _write_block(
    handle: TextIO, template, rng: random.Random, questions: list[tuple[int, int, int]], mode: str
) -> None:
    prompts = [f"What is {a}+{b}?" for _, a, b in questions]
    drawn = []
    for _, a, b in questions:
        for _ in range(SAMPLES):
            answer = rng.choice(_WORDINGS).format(a + b + rng.choice((-1, 0, 0, 1)))
            trace = f"{a}+{b}={a + b}\n" * rng.randint(1, 4)
            drawn.append((answer, trace, f"{trace}</think>{answer}" if mode == "thinking" else answer))
    encoded = template.tokenizer([text for _, _, text in drawn], add_special_tokens=False)["input_ids"]
    (closing,) = template.encode("</think>")
    rendered = template.tokenizer([template.prompt_text(p, mode) for p in prompts], add_special_tokens=False)
    for place, ((answer, trace, completion), inner) in enumerate(zip(drawn, encoded, strict=True)):
        (number, a, b), index = questions[place // SAMPLES], place % SAMPLES
        text, prompt_ids = prompts[place // SAMPLES], rendered["input_ids"][place // SAMPLES]
        ids = [*inner, template.tokenizer.eos_token_id]
        row = {
            "prompt_id": f"p{number:07d}",
            "sample_index": index,
            "mode": mode,
            "prompt": text,
            "prompt_ids": prompt_ids,
            "completion_ids": ids,
            "text": completion,
            "finish_reason": "stop",
            "answer_start": ids.index(closing) + 1 if mode == "thinking" else 0,
            "trace": trace if mode == "thinking" else None,
            "answer": answer,
            "seed": 0,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 256,
            "model": "synthetic",
            "template": template.name,
            "engine": "file",
            "gold": str(a + b),
        }
        handle.write(json.dumps(row) + "\n")


def measure(prompts: int, folder: Path, reward: str = "embedded") -> Measurement:
    """Writes samples into ``folder`` and pairs them in a process of its own."""
    responses = write_samples(folder / "samples", prompts)
    command = [sys.executable, "-c", _CHILD, str(folder / "samples"), str(folder / "pairs"), reward]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return Measurement(prompts, responses, result["pairs"], result["peak_mb"], result["seconds"])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--reward", default="embedded")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        result = measure(arguments.prompts, Path(folder), arguments.reward)
        size = (Path(folder) / "samples" / "samples.jsonl").stat().st_size / 2**20
    print(
        f"{result.prompts} prompts, {result.responses} responses ({size:.0f} MiB): {result.pairs} pairs in "
        f"{result.seconds:.0f} s ({result.responses / result.seconds:.0f} responses/s), peak {result.peak_mb:.0f} "
        f"MiB; {time.monotonic() - started:.0f} s with making the samples."
    )


if __name__ == "__main__":
    main()
