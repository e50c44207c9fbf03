"""What is in a set of completions: counts, lengths and flaws by mode, in one pass and constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bvpo_stats.records import Completion, Mode
from bvpo_stats.store.jsonl import read_jsonl


@dataclass(frozen=True)
class ModeSummary:
    """Completions of one mode.

    Attributes:
        responses: How many.
        tokens: Their tokens in all.
        truncated: Cut at the length limit.
        unclosed: Traces that never close, truncated or not: responses without an answer.
        empty_answers: Finished responses whose answer is empty.
        mean_tokens: Mean length, end-of-sequence included, of all of them.
        mean_trace_tokens: Mean number of trace tokens among those that have an answer, None in NoThinking mode.
        mean_answer_tokens: Mean number of answer tokens among those that have an answer.
    """

    responses: int
    tokens: int
    truncated: int
    unclosed: int
    empty_answers: int
    mean_tokens: float | None
    mean_trace_tokens: float | None
    mean_answer_tokens: float | None


def summarise(completions: Iterable[Completion]) -> dict[Mode, ModeSummary]:
    """Summaries by mode, for the modes that occur.

    Args:
        completions: Streamed.
    """
    counts: dict[Mode, Counter[str]] = {}
    for completion in completions:
        count = counts.setdefault(completion.mode, Counter())
        length, start = len(completion.completion_ids), completion.answer_start
        count["responses"] += 1
        count["tokens"] += length
        count["truncated"] += completion.finish_reason == "length"
        if start is None:
            count["unclosed"] += 1
        else:
            count["answers"] += 1
            count["trace"] += start
            count["answer"] += length - start
            count["empty"] += completion.finish_reason == "stop" and not completion.answer
    return {mode: _finish(mode, counts[mode]) for mode in sorted(counts, reverse=True)}


def _finish(mode: Mode, count: Counter[str]) -> ModeSummary:
    answers = count["answers"]
    return ModeSummary(
        responses=count["responses"],
        tokens=count["tokens"],
        truncated=count["truncated"],
        unclosed=count["unclosed"],
        empty_answers=count["empty"],
        mean_tokens=count["tokens"] / count["responses"],
        mean_trace_tokens=count["trace"] / answers if answers and mode == "thinking" else None,
        mean_answer_tokens=count["answer"] / answers if answers else None,
    )


def count_set_aside(paths: Iterable[Path]) -> dict[str, int]:
    """How many requests were set aside, by reason."""
    return dict(Counter(str(row["reason"]) for path in paths for _, row in read_jsonl(path, growing=True)))
