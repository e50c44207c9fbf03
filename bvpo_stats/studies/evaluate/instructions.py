"""The prompts of the alignment benchmarks: AlpacaEval's and Arena-Hard's files, any file, or the embedded task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo_stats.embedded.assets import EMBEDDED, embedded_prompts
from bvpo_stats.errors import UserError
from bvpo_stats.records import Prompt
from bvpo_stats.sampling.prompts import prompt_from_row
from bvpo_stats.store.tables import source_rows
from bvpo_stats.studies.evaluate.benchmarks import Benchmark, distinct

# Both files are read as they lie on the hub: AlpacaEval's dataset is a script that `datasets` no longer runs, and
# Arena-Hard's is a folder of several benchmarks. The paper's baseline GPT-4-0314 is that of version 0.1.
INSTRUCTION_FILES = {
    "alpaca-eval": "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json",
    "arena-hard": "hf://datasets/lmarena-ai/arena-hard-auto/data/arena-hard-v0.1/question.jsonl",
}


@dataclass(frozen=True)
class InstructionSet:
    """Prompts, and what AlpacaEval wants to know about each.

    Attributes:
        benchmark: The prompts; one response to each.
        datasets: By prompt id: the data set that an instruction comes from (AlpacaEval), or its category (Arena-Hard).
    """

    benchmark: Benchmark
    datasets: dict[str, str]


def load_instructions(task: str, source: str, *, split: str | None = None, limit: int | None = None) -> InstructionSet:
    """Reads the prompts behind ``--data``.

    Args:
        task: ``alpaca-eval`` or ``arena-hard``; also the source that stands for its own prompts.
        source: ``embedded``, the task's name, a file (JSONL or a JSON list), or a dataset. A row has its prompt under
            ``instruction`` (AlpacaEval), ``prompt`` or ``turns`` (Arena-Hard).
        split: Split of a dataset; None for ``test``.
        limit: Only the first so many.

    Raises:
        UserError: No prompts, a row without one, or the same prompt twice.
    """
    if limit is not None and limit < 1:
        raise UserError(f"`limit={limit}`: at least 1 prompt is needed.")
    datasets: dict[str, str] = {}

    def prompts() -> Iterator[tuple[str, Prompt]]:
        if source == EMBEDDED:
            yield from ((f"{EMBEDDED}:{number}", prompt) for number, prompt in enumerate(embedded_prompts(), start=1))
            return
        for where, row in source_rows(INSTRUCTION_FILES.get(source, source), split or "test", "data"):
            prompt = instruction_from_row(row, where)
            datasets.setdefault(prompt.prompt_id, str(row.get("dataset") or row.get("category") or Path(source).stem))
            yield where, prompt

    found, duplicates = distinct(prompts(), keep_first=source in INSTRUCTION_FILES, limit=limit)
    if not found:
        raise UserError(f"`data={source!r}` holds no prompts.")
    benchmark = Benchmark(task, task, source, 1, "judge", tuple(found), duplicates)
    return InstructionSet(benchmark, {p.prompt_id: datasets.get(p.prompt_id, EMBEDDED) for p in found})


def instruction_from_row(row: dict[str, Any], where: str) -> Prompt:
    """The prompt of a row; Arena-Hard's ``turns`` (a single one) and ``question_id`` are understood, too.

    Raises:
        UserError: No prompt.
    """
    known = {name: value for name, value in row.items() if name not in ("answer", "solution")}
    turns = row.get("turns")
    if isinstance(turns, list):
        if len(turns) != 1 or not isinstance(turns[0], dict):
            raise UserError(f"{where}: {len(turns)} turns; exactly one is supported.")
        known["prompt"] = turns[0].get("content")
    if row.get("question_id") is not None:
        known.setdefault("uid", row["question_id"])
    return prompt_from_row(known, where)
