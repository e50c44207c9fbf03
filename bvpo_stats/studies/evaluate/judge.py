"""Win rates against a baseline, with a reward model for a judge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.progress import progress
from bvpo_stats.records import Mode
from bvpo_stats.sampling.rewards import Answer, Reward, load_reward, score_answers
from bvpo_stats.statistics.proportions import Interval, length_controlled_difference, length_controlled_rate
from bvpo_stats.store.row_log import RowLog
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.studies.evaluate.answer_files import FinalAnswer, read_answer_file
from bvpo_stats.studies.evaluate.benchmarks import Benchmark
from bvpo_stats.studies.evaluate.config import EvaluateConfig
from bvpo_stats.studies.evaluate.report import BASE, Column, ColumnValues, Scores, differences_of, scores_of

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
    if config.judge is None:
        return None
    path = config.judge.baseline
    answers = read_answer_file(path)
    if config.judge.reward.startswith("file:") and models > 1:
        raise UserError("`reward='file:...'` holds the scores of one model. Evaluate one model at a time with it.")
    texts = answers.answers_to(benchmark.problems, path)
    options = config.policy
    reward = load_reward(
        config.judge.reward,
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
    return Answer(prompt.prompt_id, named, index, prompt.prompt, answer.text, prompt.gold)


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
