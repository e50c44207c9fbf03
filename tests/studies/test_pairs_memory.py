"""A reduced version of benchmarks/pairs_memory.py: memory does not grow with the number of prompts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "pairs_memory.py"


def test_memory_does_not_grow_with_the_prompts(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("pairs_memory", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    few, many = (benchmark.measure(prompts, tmp_path / str(prompts)) for prompts in (100, 1000))
    assert (few.responses, many.responses) == (1000, 10000)
    assert few.pairs > 150
    # As records, the samples of 1,000 prompts take some 15 MB; the process may grow by its buffers, not by those.
    assert many.peak_mb - few.peak_mb < 8
    assert many.peak_mb < 1024
