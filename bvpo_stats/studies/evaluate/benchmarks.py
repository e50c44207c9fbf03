"""What is asked: the paper's six math benchmarks by their hub ids, AlpacaEval's and Arena-Hard's prompts, any file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bvpo_stats.embedded.assets import EMBEDDED, embedded_prompts
from bvpo_stats.errors import UserError
from bvpo_stats.records import Message, Prompt, chat_turns, to_dict
from bvpo_stats.sampling.prompts import prompt_from_row
from bvpo_stats.store.tables import source_rows

Verifier = Literal["math-verify", "embedded", "judge"]

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""What DeepSeek advises to add to a math problem; the paper does not print its own wording."""

_EMBEDDED_SAMPLES = 8


@dataclass(frozen=True)
class Preset:
    """One of the paper's benchmarks (Section 5.1).

    The paper names the benchmarks, not the copies it read; these are widely used copies of the usual size.

    Attributes:
        title: Column heading, as in Table 2.
        source: Hub id.
        split: Split that holds the problems.
        samples: k: 32 for AIME and AMC, 1 (pass@1) for the rest.
        size: Number of problems when this was written.
    """

    title: str
    source: str
    split: str
    samples: int
    size: int


PRESETS: dict[str, Preset] = {
    "aime24": Preset("AIME 24", "HuggingFaceH4/aime_2024", "train", 32, 30),
    "aime25": Preset("AIME 25", "math-ai/aime25", "test", 32, 30),
    "amc": Preset("AMC", "AI-MO/aimo-validation-amc", "train", 32, 83),
    "math-500": Preset("MATH-500", "HuggingFaceH4/MATH-500", "test", 1, 500),
    "minerva": Preset("Minerva", "math-ai/minervamath", "test", 1, 272),
    "olympiadbench": Preset("OlympiadBench", "math-ai/olympiadbench", "test", 1, 674),
}
PAPER = "paper"
"""The ``--data`` value that stands for all six."""


@dataclass(frozen=True)
class Benchmark:
    """A set of problems with gold answers.

    Attributes:
        name: Short name; names files and columns.
        title: Column heading.
        source: Where the problems come from.
        samples: k, responses per problem and mode.
        verifier: What decides whether an answer is correct; ``judge`` where that is a matter of preference.
        problems: The problems, instruction included; ``gold`` is set.
        duplicates: Repeated rows of a preset that were left out.
    """

    name: str
    title: str
    source: str
    samples: int
    verifier: Verifier
    problems: tuple[Prompt, ...]
    duplicates: int = 0

    @property
    def metric(self) -> str:
        """``avg@k``, the paper's name of the mean over k > 1 samples, else ``pass@1``."""
        return f"avg@{self.samples}" if self.samples > 1 else "pass@1"

    @property
    def fingerprint(self) -> str:
        """The count and a short hash of ids, texts and gold answers, in order."""
        digest = hashlib.sha256()
        for problem in self.problems:
            turns = [] if problem.messages is None else chat_turns(problem.messages)
            digest.update(json.dumps([problem.prompt_id, problem.prompt, problem.gold, *turns]).encode())
        return f"{len(self.problems)}:{digest.hexdigest()[:16]}"


def load_benchmarks(
    sources: Sequence[str],
    *,
    samples: int | None = None,
    split: str | None = None,
    instruction: str | None = None,
    limit: int | None = None,
    config_name: str | None = None,
) -> list[Benchmark]:
    """Reads the benchmarks behind ``--data``.

    Args:
        sources: Each ``embedded``, a preset's name, ``paper`` for all six presets, a file, or a dataset's folder or hub
            id with fields ``problem`` and ``answer``.
        samples: k for all of them; None for the preset's own, 8 for the embedded task, 1 otherwise.
        split: Split of a dataset that is no preset; None for ``test``.
        instruction: Added to each problem on a line of its own; None for :data:`BOXED` (none for the embedded task).
        limit: Only the first so many problems of each.
        config_name: Configuration of a dataset that has several.

    Raises:
        UserError: No problems, a row without problem or answer, the same problem twice, or two sources of one name.
    """
    names = [name for source in sources for name in (PRESETS if source == PAPER else (source,))]
    benchmarks = [_load(name, split, instruction, limit, config_name) for name in names]
    for number, benchmark in enumerate(benchmarks):
        if benchmark.name in {other.name for other in benchmarks[:number]}:
            raise UserError(f"`data`: two benchmarks are called {benchmark.name}. Rename a file, or leave one out.")
    return benchmarks if samples is None else [replace(benchmark, samples=samples) for benchmark in benchmarks]


def _load(
    source: str, split: str | None, instruction: str | None, limit: int | None, config_name: str | None
) -> Benchmark:
    if limit is not None and limit < 1:
        raise UserError(f"`limit={limit}`: at least 1 problem is needed.")
    if source == EMBEDDED:
        problems = [_instructed(prompt, instruction or "") for prompt in embedded_prompts(limit)]
        return Benchmark(EMBEDDED, "Arithmetic", EMBEDDED, _EMBEDDED_SAMPLES, "embedded", tuple(problems))
    preset = PRESETS.get(source.lower())
    if preset is None:
        _refuse_near_presets(source)
    if preset is not None:
        rows = source_rows(preset.source, preset.split, "data")
    else:
        rows = source_rows(source, split or "test", "data", config_name=config_name)
    found = ((where, problem_from_row(row, where)) for where, row in rows)
    problems, duplicates = distinct(found, keep_first=preset is not None, limit=limit)
    if not problems:
        raise UserError(f"`data={source!r}` holds no problems. A row needs the fields `problem` and `answer`.")
    wording = BOXED if instruction is None else instruction
    return Benchmark(
        name=source.lower() if preset else Path(source).stem,
        title=preset.title if preset else Path(source).stem,
        source=f"{preset.source} ({preset.split})" if preset else source,
        samples=preset.samples if preset else 1,
        verifier="math-verify",
        problems=tuple(_instructed(problem, wording) for problem in problems),
        duplicates=duplicates,
    )


def _refuse_near_presets(source: str) -> None:
    """A word that is no path, no hub id and no preset is a mistyped preset; the hub need not be asked."""
    if "/" not in source and "." not in source and not Path(source).exists():
        raise UserError(
            f"`data={source!r}`: unknown. Choose embedded, {PAPER} (all six), {', '.join(PRESETS)}, or give a file or "
            "a dataset with the fields `problem` and `answer`."
        )


def problem_from_row(row: dict[str, Any], where: str) -> Prompt:
    """The problem and its gold answer; ``question`` and ``final_answer`` (a list, joined) are understood, too.

    Raises:
        UserError: No problem, or no answer.
    """
    prompt = prompt_from_row({name: value for name, value in row.items() if name != "solution"}, where)
    if prompt.gold is None and isinstance(row.get("final_answer"), (list, tuple)):
        prompt = replace(prompt, gold=", ".join(map(str, row["final_answer"])))
    if prompt.gold is None or not prompt.gold.strip():
        raise UserError(f"{where}: no field `answer` with the gold answer (fields: {', '.join(row)}).")
    return prompt


def distinct(rows: Iterable[tuple[str, Prompt]], *, keep_first: bool, limit: int | None) -> tuple[list[Prompt], int]:
    """Every prompt once.

    Args:
        rows: Place and prompt.
        keep_first: Leave later copies out (a published benchmark, which a user cannot mend) instead of refusing them.
        limit: Stop after so many.

    Returns:
        The prompts, and how many copies were left out.

    Raises:
        UserError: A text or an id occurs twice.
    """
    seen: dict[str, str] = {}
    prompts: list[Prompt] = []
    duplicates = 0
    for where, prompt in rows:
        names = (f"id {prompt.prompt_id}", f"text {prompt.question}")
        twice = next((seen[name] for name in names if name in seen), None)
        if twice is None:
            seen |= dict.fromkeys(names, where)
            prompts.append(prompt)
            if len(prompts) == limit:
                break
        elif keep_first:
            duplicates += 1
        else:
            raise UserError(
                f"{where}: the problem or its id {prompt.prompt_id!r} occurs twice (first at {twice}). Remove one: "
                "repeated problems would count as independent clusters."
            )
    return prompts, duplicates


def _instructed(problem: Prompt, instruction: str) -> Prompt:
    if not instruction:
        return problem
    text = f"{problem.prompt}\n{instruction}"
    turns = problem.messages and (*problem.messages[:-1], Message("user", text))
    return replace(problem, prompt=text, messages=turns)


def prompt_rows(prompts: Iterable[Prompt]) -> Iterator[dict[str, Any]]:
    """The prompts as rows that :func:`bvpo_stats.sampling.prompts.load_prompts` reads back."""
    for prompt in prompts:
        row = to_dict(prompt)
        yield row if prompt.messages is None else row | {"prompt": row.pop("messages")}


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


def load_instructions(
    task: str,
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    config_name: str | None = None,
) -> InstructionSet:
    """Reads the prompts behind ``--data``.

    Args:
        task: ``alpaca-eval`` or ``arena-hard``; also the source that stands for its own prompts.
        source: ``embedded``, the task's name, a file (JSONL or a JSON list), or a dataset. A row has its prompt under
            ``instruction`` (AlpacaEval), ``prompt`` or ``turns`` (Arena-Hard).
        split: Split of a dataset; None for ``test``.
        limit: Only the first so many.
        config_name: Configuration of a dataset that has several.

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
        file = INSTRUCTION_FILES.get(source, source)
        for where, row in source_rows(file, split or "test", "data", config_name=config_name):
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
