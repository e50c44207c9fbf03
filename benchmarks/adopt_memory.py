"""Peak memory and speed of ``bvpo-stats sample --engine file`` over many prompts.

    python benchmarks/adopt_memory.py --prompts 100000

Takes the synthetic responses of ``pairs_memory.py`` (five for each prompt and mode) over in a process of its own, once
as full records and once stripped to prompt and text, which are then tokenised; prints that process's peak resident
memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pairs_memory import write_samples

_CHILD = """
import json, re, sys, time
from pathlib import Path
from bvpo_stats.model.policy import PolicyOptions
from bvpo_stats.studies.sample.run import SampleConfig, run_sample
model = PolicyOptions() if sys.argv[3] == "text" else None
started = time.monotonic()
report = run_sample(SampleConfig(model, engine="file", samples_from=Path(sys.argv[1]), parquet=True), Path(sys.argv[2]))
print(json.dumps({
    "peak_mb": int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024,
    "seconds": time.monotonic() - started,
    "responses": sum(mode.responses for mode in report.modes.values()),
}))
"""
_TEXT_FIELDS = ("prompt_id", "mode", "prompt", "text", "finish_reason", "gold")


def strip(source: Path, target: Path) -> None:
    """Keeps what a foreign writer would have."""
    with source.open(encoding="utf-8") as rows, target.open("w", encoding="utf-8") as out:
        for line in rows:
            row = json.loads(line)
            out.write(json.dumps({name: row[name] for name in _TEXT_FIELDS}) + "\n")


def measure(source: Path, output: Path, kind: str) -> dict[str, float]:
    """Runs the file engine in a process of its own.

    Args:
        source: Responses.
        output: Folder for the run.
        kind: ``records`` (token ids in the file) or ``text`` (to be tokenised).

    Returns:
        ``peak_mb``, ``seconds`` and ``responses``.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(source), str(output), kind], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_samples(folder / "samples", arguments.prompts)
        records = folder / "samples" / "samples.jsonl"
        strip(records, folder / "text.jsonl")
        for kind, source in (("records", records), ("text", folder / "text.jsonl")):
            result = measure(source, folder / f"run-{kind}", kind)
            print(
                f"{arguments.prompts} prompts as {kind}: {result['responses']:.0f} responses in "
                f"{result['seconds']:.0f} s, peak {result['peak_mb']:.0f} MiB"
            )


if __name__ == "__main__":
    main()
