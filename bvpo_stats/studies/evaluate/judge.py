"""The alignment benchmarks: answer files for AlpacaEval 2 and Arena-Hard, and win rates judged by a reward model."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.progress import progress
from bvpo_stats.records import UNKNOWN, Completion, Mode, Prompt, chat_turns
from bvpo_stats.sampling.rewards import Answer, Reward, load_reward, score_answers
from bvpo_stats.sampling.sample import SAMPLES_FILE
from bvpo_stats.statistics.proportions import Interval, length_controlled_difference, length_controlled_rate
from bvpo_stats.store.jsonl import RowLog, encode_row, read_json_list, read_jsonl, write_atomic
from bvpo_stats.store.run_folder import open_run, run_files
from bvpo_stats.studies.evaluate.benchmarks import Benchmark, InstructionSet
from bvpo_stats.studies.evaluate.config import BASE, Contestant, EvaluateConfig
from bvpo_stats.studies.evaluate.report import (
    BenchmarkFacts,
    Column,
    ColumnValues,
    ResponseCounts,
    Scores,
    TaskResults,
    differences_of,
    scores_of,
)
from bvpo_stats.studies.evaluate.sampling import check_all_answered, open_responses, run_of

_CODE = re.compile(r"```.*?```", re.DOTALL)
_NAMESPACE = uuid.UUID("6c1f2a5e-6d0b-4b57-9a3c-3a1d5f0e7b42")


@dataclass(frozen=True)
class FinalAnswer:
    """One prompt's final answer, as a judge gets it.

    Attributes:
        prompt: The prompt.
        text: The final answer; empty where the response has none. A trace never stands here.
        tokens: Its tokens.
    """

    prompt: Prompt
    text: str
    tokens: int


def alpaca_eval_text(answers: Iterable[FinalAnswer], generator: str, datasets: Mapping[str, str]) -> str:
    """AlpacaEval's file: a JSON list of ``{instruction, output, generator, dataset, datasplit}``.

    Args:
        answers: In the order of the benchmark.
        generator: Name of the model on the leaderboard.
        datasets: By prompt id: where an instruction comes from.
    """
    rows = [
        {
            "instruction": answer.prompt.prompt,
            "output": answer.text,
            "generator": generator,
            "dataset": datasets[answer.prompt.prompt_id],
            "datasplit": "eval",
        }
        for answer in answers
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def arena_hard_text(answers: Iterable[FinalAnswer], model: str, time: float) -> str:
    """Arena-Hard's file: one line ``{uid, ans_id, model, messages, tstamp, metadata}`` per answer.

    ``metadata`` holds what its style control reads: ``token_len`` (counted by the model's own tokenizer) and the
    numbers of Markdown headers, list items and bold words outside code blocks.

    Args:
        answers: In the order of the benchmark.
        model: Name of the model; the file must be called ``MODEL.jsonl``.
        time: Time stamp, in seconds; equal runs should give equal ones.
    """
    lines = []
    for answer in answers:
        prompt = answer.prompt
        row = {
            "uid": prompt.prompt_id,
            "ans_id": uuid.uuid5(_NAMESPACE, f"{model}/{prompt.prompt_id}").hex,
            "model": model,
            "messages": [
                *chat_turns(prompt.question),
                {"role": "assistant", "content": {"answer": answer.text}},
            ],
            "tstamp": time,
            "metadata": {"token_len": answer.tokens, **markdown_counts(answer.text)},
        }
        lines.append(encode_row(row) + "\n")
    return "".join(lines)


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    r"""Headers, list items and bold spans of a Markdown text outside its code blocks, under Arena-Hard's names.

    >>> markdown_counts("# A\n- **b**\n1. c")["list_count"]
    {'ordered': 1, 'unordered': 1}
    """
    plain = _CODE.sub("", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, plain, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


@dataclass(frozen=True)
class AnswerFile:
    """Answers to beat.

    Attributes:
        name: The model's name in the file, else the file's.
        answers: Answer text by ``uid`` and by prompt text.
    """

    name: str
    answers: Mapping[str, str]

    def answers_to(self, prompts: Iterable[Prompt], path: Path) -> list[str]:
        """The answers to these prompts, in their order; found by id, else by text.

        Raises:
            UserError: Some are missing.
        """
        found = [self.answers.get(p.prompt_id, self.answers.get(p.prompt)) for p in prompts]
        missing = [p for p, answer in zip(prompts, found, strict=True) if answer is None]
        if missing:
            raise UserError(
                f"`baseline={str(path)!r}` has no answer to {len(missing)} of the {len(found)} prompts, e.g. "
                f"{missing[0].prompt_id} ({missing[0].prompt[:60]!r}). Give the baseline's answers to all of them."
            )
        return [answer for answer in found if answer is not None]


def read_answer_file(path: Path) -> AnswerFile:
    """Reads AlpacaEval's format (``instruction`` and ``output``) or Arena-Hard's, JSON list or JSONL alike.

    Raises:
        UserError: A row without prompt or answer, or a second answer to one prompt; the row is named.
    """
    answers: dict[str, str] = {}
    names: set[str] = set()
    for where, row in _rows(path):
        keys, answer = _read_row(row, where)
        for key in keys:
            if answers.setdefault(key, answer) is not answer:
                raise UserError(f"{where}: a second answer to {key[:60]!r}. Remove one.")
        name = row.get("generator") or row.get("model") or row.get("model_id")
        names |= {str(name)} if name else set()
    if not answers:
        raise UserError(f"`baseline={str(path)!r}` holds no answers.")
    return AnswerFile(names.pop() if len(names) == 1 else path.stem, answers)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(
            f"`baseline={str(path)!r}`: no such file. Give the answers to beat, in AlpacaEval's or Arena-Hard's form."
        )
    if path.suffix == ".json":
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(read_json_list(path), start=1))
    else:
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def _read_row(row: dict[str, Any], where: str) -> tuple[list[str], str]:
    """The names under which a row's prompt may be asked for, and the answer."""
    keys = [str(row[name]) for name in ("uid", "question_id", "prompt_id", "instruction", "prompt") if row.get(name)]
    messages = row.get("messages")
    answer = row.get("output", row.get("answer"))
    if isinstance(messages, list) and messages:
        content = messages[-1].get("content") if isinstance(messages[-1], dict) else None
        answer = content.get("answer") if isinstance(content, dict) else content
    elif isinstance(row.get("choices"), list):  # Arena-Hard's first format
        answer = _first_turn(row["choices"])
    if not keys or not isinstance(answer, str):
        raise UserError(
            f'{where}: not an answer; it needs "instruction" and "output" (AlpacaEval), or "uid" and "messages" '
            f"(Arena-Hard). Fields: {', '.join(row) or 'none'}."
        )
    return list(dict.fromkeys(keys)), answer


def _first_turn(choices: list[Any]) -> Any:
    try:
        return choices[0]["turns"][0]["content"]
    except (IndexError, KeyError, TypeError):
        return None


Answered = Mapping[str, Mapping[str, Sequence[FinalAnswer]]]
"""Answers by model and mode, in the order of the benchmark."""
Values = Float[np.ndarray, " prompts"]

_WINDOW = 64  # answers scored between two writes
# How a file of scores names the baseline's answers.
_BASELINE_MODE = "nothinking"
_BASELINE_INDEX = -1
WIN_RATE, LC_WIN_RATE = "win_rate", "lc_win_rate"


@dataclass(frozen=True)
class Judge:
    """Who judges, and whom to beat.

    Attributes:
        reward: The reward model.
        baseline: Name of the baseline.
        answers: Its answers, in the order of the benchmark.
    """

    reward: Reward
    baseline: str
    answers: tuple[FinalAnswer, ...]

    @property
    def fingerprint(self) -> str:
        """Short hash of the reward and of the baseline's answers."""
        texts = "\x1f".join(answer.text for answer in self.answers)
        return hashlib.sha256(f"{self.reward.identity}\x1e{texts}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Judgement:
    """Win rates of all models."""

    columns: tuple[Column, ...]
    scores: Scores
    differences: Scores
    notes: tuple[str, ...]


def load_judge(config: EvaluateConfig, benchmark: Benchmark, models: int) -> Judge | None:
    """The judge that was asked for.

    Raises:
        UserError: No such reward or baseline, a baseline without an answer to some prompt, or a file of scores for
            several models.
    """
    if config.judge is None or config.reward is None or config.baseline is None:
        return None
    path = config.baseline
    answers = read_answer_file(path)
    if config.reward.startswith("file:") and models > 1:
        raise UserError("`reward='file:...'` holds the scores of one model. Evaluate one model at a time with it.")
    texts = answers.answers_to(benchmark.problems, path)
    options = config.policy
    reward = load_reward(
        config.reward,
        device=options.device if options else "auto",
        dtype=options.dtype if options else "auto",
        trust_remote_code=options.trust_remote_code if options else False,
    )
    held = tuple(FinalAnswer(p, text.strip(), 0) for p, text in zip(benchmark.problems, texts, strict=True))
    return Judge(reward, answers.name, held)


def judge_answers(answers: Answered, judge: Judge, level: float, folder: Path) -> Judgement:
    """Scores every answer and counts wins.

    A prompt is won (1) by the larger reward, lost (0) by the smaller, and tied (1/2) at equal rewards. A model without
    an answer loses without being scored, unless the baseline has none either (a tie). Scores are kept in a folder of
    their own for each judge and baseline, so that another judge needs no new responses.

    Args:
        answers: The models' answers.
        judge: Reward and baseline.
        level: Confidence level.
        folder: Folder of the evaluation.
    """
    place = folder / "judged" / judge.fingerprint
    place.parent.mkdir(exist_ok=True)
    with open_run(place, "judge", {"reward": judge.reward.identity, "baseline": judge.baseline}) as own:
        theirs = _scores(judge.answers, judge.reward, own / "baseline.jsonl", _BASELINE_MODE, _BASELINE_INDEX)
        wins = {
            label: {
                mode: _wins(held, _scores(held, judge.reward, own / f"{label}-{mode}.jsonl", mode, 0), judge, theirs)
                for mode, held in modes.items()
            }
            for label, modes in answers.items()
        }
    lengths = {
        label: {mode: _length_differences(held, judge.answers) for mode, held in modes.items()}
        for label, modes in answers.items()
    }
    plain = ColumnValues(Column(WIN_RATE, "Win rate", f"against {judge.baseline}"), wins)
    scores, differences = scores_of([plain], level), differences_of([plain], level)
    for label, modes in scores.items():
        for mode, entries in modes.items():
            entries[LC_WIN_RATE] = _controlled(wins[label][mode], lengths[label][mode], level)
    for label, modes in differences.items():
        for mode, entries in modes.items():
            pair = [(wins[name][mode], lengths[name][mode]) for name in (label, BASE)]
            entries[LC_WIN_RATE] = _controlled_difference(pair, level)
    controlled = Column(LC_WIN_RATE, "LC win rate", f"against {judge.baseline}")
    return Judgement((plain.column, controlled), scores, differences, tuple(_notes(wins, judge, level)))


def _scores(answers: Sequence[FinalAnswer], reward: Reward, path: Path, mode: str, index: int) -> list[float | None]:
    """Rewards of the answers, put on record; None for an empty answer or one that cannot be scored."""
    log, found = RowLog(path), []
    with progress(f"Judging {path.stem}", len(answers), "answers") as advance:
        for start in range(0, len(answers), _WINDOW):
            window = answers[start : start + _WINDOW]
            asked = [_for_reward(answer, mode, index) for answer in window if answer.text]
            keys = [{"prompt_id": a.prompt_id, "mode": mode, "sample_index": index} for a in asked]

            def scored(asked: list[Answer] = asked) -> list[dict[str, float | None]]:
                return [{"reward": score} for score in score_answers(reward, asked)]

            rows = iter(log.rows(keys, scored))
            found += [next(rows)["reward"] if a.text else None for a in window]
            advance(len(window))
    return found


def _for_reward(answer: FinalAnswer, mode: str, index: int) -> Answer:
    prompt = answer.prompt
    named: Mode = "thinking" if mode == "thinking" else "nothinking"
    return Answer(prompt.prompt_id, named, index, prompt.prompt, answer.text, prompt.gold, prompt.messages)


def _wins(
    answers: Sequence[FinalAnswer], ours: Sequence[float | None], judge: Judge, theirs: Sequence[float | None]
) -> Values:
    """1, 1/2 or 0 for each prompt; NaN where an answer could not be scored."""
    wins = np.full(len(answers), np.nan)
    for place, (answer, other) in enumerate(zip(answers, judge.answers, strict=True)):
        mine, base = ours[place], theirs[place]
        if not answer.text or not other.text:
            wins[place] = 0.5 + 0.5 * (bool(answer.text) - bool(other.text))
        elif mine is not None and base is not None:
            wins[place] = 0.5 + 0.5 * ((mine > base) - (mine < base))
    return wins


def _length_differences(answers: Sequence[FinalAnswer], baseline: Sequence[FinalAnswer]) -> Values:
    return np.array([len(a.text) - len(b.text) for a, b in zip(answers, baseline, strict=True)], dtype=np.float64)


def _controlled(wins: Values, lengths: Values, level: float) -> Interval:
    scored = np.isfinite(wins)
    return length_controlled_rate(wins[scored], lengths[scored], level=level)


def _controlled_difference(pair: Sequence[tuple[Values, Values]], level: float) -> Interval:
    scored = np.isfinite(pair[0][0]) & np.isfinite(pair[1][0])
    new, old = ((wins[scored], lengths[scored]) for wins, lengths in pair)
    return length_controlled_difference(new, old, level=level)


def _notes(wins: Mapping[str, Mapping[str, Values]], judge: Judge, level: float) -> list[str]:
    notes = [
        f"Judged by {judge.reward.identity} against {judge.baseline}: the larger reward wins, equal ones tie, no "
        "answer loses. A reward model's win rates are no estimate of the paper's, which GPT-4o judged.",
        "LC win rate: logistic(theta) of the fit P(win) = logistic(theta + phi tanh(d / s)), d the difference of the "
        "answers' lengths in characters, s its standard deviation (AlpacaEval 2's form without its instruction term).",
        f"Intervals: {level:.0%}, clustered by prompt (Wilson's; jackknife for the LC win rate; differences paired).",
    ]
    for label, modes in wins.items():
        for mode, values in modes.items():
            unscored = int(np.isnan(values).sum())
            if unscored:
                notes.append(f"{label}, {mode}: {unscored} prompts without a reward are left out.")
    return notes


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
            unclosed=sum(c.finish_reason != "length" for c in found if c.answer_start is None),
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
