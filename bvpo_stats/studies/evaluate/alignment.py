"""The alignment benchmarks: answer files for AlpacaEval 2 and Arena-Hard, and a judgement by a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bvpo_stats.records import UNKNOWN, Completion
from bvpo_stats.sampling.sample import SAMPLES_FILE
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.store.shards import run_files
from bvpo_stats.studies.evaluate.answer_files import FinalAnswer, alpaca_eval_text, arena_hard_text
from bvpo_stats.studies.evaluate.benchmarks import Benchmark
from bvpo_stats.studies.evaluate.config import Contestant, EvaluateConfig
from bvpo_stats.studies.evaluate.instructions import InstructionSet
from bvpo_stats.studies.evaluate.judge import Answered, Judge, Judgement, judge_answers
from bvpo_stats.studies.evaluate.report import BASE, BenchmarkFacts, ResponseCounts, TaskResults
from bvpo_stats.studies.evaluate.sampling import check_all_answered, open_responses, run_of


@dataclass(frozen=True)
class _Responses:
    """One model's responses in one mode, in the order of the benchmark; None where one is missing."""

    model: str
    completions: tuple[Completion | None, ...]

    def answers(self, benchmark: Benchmark) -> list[FinalAnswer]:
        """What a judge may see: the text after the trace, and nothing where a trace never closed.

        The prompt stays in the file with an empty answer, so that a judge counts it as lost. Left out, it would leave
        the average of a tool that judges what it finds, and runaway traces would raise the win rate.
        """
        return [
            FinalAnswer(prompt, (c and c.answer) or "", 0 if c is None else _answer_tokens(c))
            for prompt, c in zip(benchmark.problems, self.completions, strict=True)
        ]

    def counts(self) -> ResponseCounts:
        found = [c for c in self.completions if c is not None]
        closed = [c for c in found if c.answer_start is not None]
        return ResponseCounts(
            responses=len(found),
            truncated=sum(c.finish_reason == "length" for c in found),
            unclosed=len(found) - len(closed),
            empty=sum(not c.answer for c in closed),
            timeouts=0,
            missing=len(self.completions) - len(found),
            solved=None,
            mean_tokens=sum(len(c.completion_ids) for c in found) / len(found) if found else None,
            mean_answer_characters=sum(len(c.answer or "") for c in found) / len(found) if found else None,
        )


def _answer_tokens(completion: Completion) -> int:
    if completion.answer_start is None:
        return 0
    return len(completion.completion_ids) - completion.answer_start - (completion.finish_reason == "stop")


def alignment_results(
    config: EvaluateConfig, entrants: Sequence[Contestant], asked: InstructionSet, judge: Judge | None, folder: Path
) -> TaskResults:
    """Writes the answer files, and judges where asked to.

    Args:
        config: Settings.
        entrants: The models.
        asked: The prompts.
        judge: Reward model and baseline, None to leave judging to the benchmarks' own tools.
        folder: Folder of the evaluation, with the responses in it.

    Raises:
        UserError: Responses to other prompts than the benchmark's.
    """
    benchmark = asked.benchmark
    responses = {e.label: _read(config, e, benchmark, folder) for e in entrants}
    answers: Answered = {
        label: {mode: held.answers(benchmark) for mode, held in modes.items()} for label, modes in responses.items()
    }
    names = _generator_names(responses)
    files: dict[str, dict[str, str]] = {
        e.label: {
            mode: _write(asked, names[e.label][mode], held, run_of(folder, e, benchmark), folder)
            for mode, held in answers[e.label].items()
        }
        for e in entrants
    }
    decided_by = judge.reward.identity if judge else "the benchmark's own tools"
    facts = BenchmarkFacts(
        benchmark.name, benchmark.source, len(benchmark.problems), 1, decided_by, benchmark.duplicates
    )
    judged = judge_answers(answers, judge, config.level, folder) if judge else Judgement((), {}, {}, ())
    return TaskResults(
        benchmarks=(facts,),
        columns=judged.columns,
        scores=judged.scores,
        differences=judged.differences,
        counts={
            label: {mode: {benchmark.name: held.counts()} for mode, held in modes.items()}
            for label, modes in responses.items()
        },
        answer_files=files,
        reward=judge.reward.identity if judge else None,
        notes=(*_NOTES, *judged.notes),
    )


_NOTES = (
    "Answer files hold the final answer alone. A response without one (its trace never closed, or nothing followed it) "
    "stands there with an empty answer, so that it is judged as lost and not left out; an answer that was cut is "
    "passed on as it is.",
)


def _read(config: EvaluateConfig, entrant: Contestant, benchmark: Benchmark, folder: Path) -> dict[str, _Responses]:
    with open_responses(config, folder, entrant, benchmark) as index:
        check_all_answered(index, benchmark, entrant)
        by_prompt = [
            {c.mode: c for c in reversed(index.completions(problem.prompt_id))} for problem in benchmark.problems
        ]
        model = index.source.model or UNKNOWN
    return {mode: _Responses(model, tuple(found.get(mode) for found in by_prompt)) for mode in config.modes}


def _generator_names(responses: Mapping[str, Mapping[str, _Responses]]) -> dict[str, dict[str, str]]:
    """Names for leaderboards: the base model's, the adapter's label, the mode."""
    names: dict[str, dict[str, str]] = {}
    for label, modes in responses.items():
        for mode in modes:
            base = responses[BASE][mode].model.partition("@")[0].replace("/", "_")
            names.setdefault(label, {})[mode] = f"{base}-{mode}" if label == BASE else f"{base}+{label}-{mode}"
    return names


def _write(asked: InstructionSet, name: str, answers: Sequence[FinalAnswer], drawn: Path, folder: Path) -> str:
    """Writes one answer file; returns its path within the folder."""
    (folder / "answers").mkdir(exist_ok=True)
    if asked.benchmark.name == "alpaca-eval":
        path = folder / "answers" / f"{name}.json"
        write_atomic(path, alpaca_eval_text(answers, name, asked.datasets))
    else:
        path = folder / "answers" / f"{name}.jsonl"
        time = max(file.stat().st_mtime for file in run_files(drawn, SAMPLES_FILE))
        write_atomic(path, arena_hard_text(answers, name, time))
    return path.relative_to(folder).as_posix()
