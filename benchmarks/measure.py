"""Interleaved times, peak memory by the allocator's own account, and the machine's description."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def interleaved_seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times every run ``repeats`` times, in rounds: whatever else the machine does hits all alike.

    Args:
        runs: What to time; each is called twice beforehand to warm up.
        repeats: Rounds. The order within a round rotates.
    """
    for run in runs.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(repeats):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            _synchronize()
            begin = time.perf_counter()
            runs[name]()
            _synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def median_ratio(seconds: list[float], yardstick: list[float]) -> float:
    """Median over rounds of the ratio within the round.

    Args:
        seconds: Times of an engine, by round.
        yardstick: Times of the yardstick in the same rounds.
    """
    return statistics.median(mine / other for mine, other in zip(seconds, yardstick, strict=True))


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes of tensors that a run holds at one time, beyond what was held before.

    Args:
        run: What to measure.
    """
    if torch.cuda.is_available():
        _synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine() -> dict[str, Any]:
    """The machine and the versions a result belongs to."""
    packages = ("torch", "transformers", "peft", "opacus", "bergson")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
