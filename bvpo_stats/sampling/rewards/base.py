"""The interface of a reward."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

from bvpo_stats.errors import UserError
from bvpo_stats.records import Message, Mode, draw_key


@dataclass(frozen=True)
class Answer:
    """What a reward may look at: the final answer, never the trace (Section 5.1 of the paper).

    Attributes:
        prompt_id: The prompt.
        mode: How the response was sampled; names the sample, and is no business of a reward's judgement.
        sample_index: 0 .. n-1 within (prompt, mode).
        prompt: The user's text.
        text: The final answer, trace and special tokens left out.
        gold: Reference answer, where the data has one.
        messages: All turns in front of the answer, where there are more than the user's text.
    """

    prompt_id: str
    mode: Mode
    sample_index: int
    prompt: str
    text: str
    gold: str | None = None
    messages: tuple[Message, ...] | None = None

    @property
    def key(self) -> str:
        """Unique name of the sample, as in :attr:`bvpo_stats.records.Completion.key`."""
        return draw_key(self.prompt_id, self.mode, self.sample_index)


@runtime_checkable
class Reward(Protocol):
    """Whoever scores final answers.

    Attributes:
        identity: What decides the scores (kind, and content where it has any); a run with another one is another run.
        text_only: Whether the score is a function of prompt, answer text and gold alone, so that equal answers to one
            prompt need scoring only once, and get the same score to the last bit whatever batch they fall into.
    """

    identity: str
    text_only: bool

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score per answer, in order; larger is better; None where this answer cannot be scored."""
        ...


def in_words(error: BaseException) -> str:
    """What a user's function raised, on one line."""
    try:
        reason = next(iter(str(error).splitlines()), "")
    except Exception:  # an exception of the user's own that cannot say what it is
        reason = ""
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def score_answers(reward: Reward, answers: Sequence[Answer]) -> list[float | None]:
    """Scores answers, equal ones once where the reward allows it, and refuses what is no number.

    Args:
        reward: Who scores.
        answers: What to score.

    Raises:
        UserError: A score is NaN or infinite, or their number is wrong; the sample is named.
    """
    if not answers:
        return []
    names = [(a.prompt_id, a.messages or a.prompt, a.text, a.gold) if reward.text_only else a.key for a in answers]
    first: dict[object, Answer] = {}
    for name, answer in zip(names, answers, strict=True):
        first.setdefault(name, answer)
    try:
        scores = list(islice(reward.score(list(first.values())), len(first) + 1))  # which may never end
        wrong = next((score for score in scores if not (score is None or isinstance(score, numbers.Real))), None)
        scores = [float(score) if isinstance(score, numbers.Real) else score for score in scores]
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's program; whatever it raises is about that program
        raise UserError(f"`reward={reward.identity!r}` fails with {in_words(error)}.") from error
    if wrong is not None:
        raise UserError(f"`reward={reward.identity!r}` gave a {type(wrong).__name__} where a number belongs.")
    if len(scores) != len(first):
        count = str(len(scores)) if len(scores) < len(first) else f"more than {len(first)}"
        raise UserError(
            f"`reward={reward.identity!r}` gave {count} scores for {len(first)} answers. It must give one for each."
        )
    for answer, score in zip(first.values(), scores, strict=True):
        if score is not None and not math.isfinite(score):
            raise UserError(
                f"`reward={reward.identity!r}` gave {score} to the sample {answer.key}. Fix the reward (a reward "
                "model: check its weights, or use `dtype='float32'`), or give None to leave a sample out."
            )
    by_name = dict(zip(first, scores, strict=True))
    return [by_name[name] for name in names]
