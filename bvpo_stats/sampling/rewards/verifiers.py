"""Verifiers: answers compared with a gold answer, by the embedded task's own grade or by math-verify."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

from bvpo_stats.errors import UserError
from bvpo_stats.sampling.rewards.base import Answer


class EmbeddedReward:
    """Grades arithmetic answers in [0, 1]; see :func:`bvpo_stats.embedded.task.grade`."""

    identity = "embedded"
    text_only = True

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One grade per answer.

        Raises:
            UserError: A prompt without a gold answer, or one whose gold answer is no integer.
        """
        from bvpo_stats.embedded.task import grade

        return [grade(answer.text, required_gold(answer, self.identity)) for answer in answers]


class EmbeddedJudge:
    """A taste in wordings, blind to correctness; see :func:`bvpo_stats.embedded.task.judge_wording`."""

    identity = "embedded-judge"
    text_only = True

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score per answer, -1 to 1.

        Raises:
            UserError: A prompt that is no question of the embedded task.
        """
        from bvpo_stats.embedded.task import judge_wording

        return [judge_wording(answer.prompt, answer.text) for answer in answers]


def required_gold(answer: Answer, reward: str) -> str:
    """The gold answer of a prompt.

    Args:
        answer: The answer that is to be scored.
        reward: Name of the reward, for the error.

    Raises:
        UserError: There is none.
    """
    if answer.gold is None:
        raise UserError(
            f"`reward={reward!r}` compares with a gold answer, and the prompt {answer.prompt_id} has none. Give the "
            "prompts a field `gold` before sampling, or choose a reward that needs none."
        )
    return answer.gold


_SECONDS = 5  # math-verify's own limit for one expression
Verdict = Literal["correct", "wrong", "timeout", "unreadable gold"]
_SCORES: dict[Verdict, float | None] = {"correct": 1.0, "wrong": 0.0, "timeout": 0.0, "unreadable gold": None}
_DELIMITERS = ("$", "\\(", "\\[", "\\boxed", "\\begin")


class MathVerifyReward:
    """1 where math-verify finds the answer equal to gold, else 0; None where the gold answer itself cannot be read."""

    identity = "math-verify"
    text_only = True

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise UserError(
                "`reward='math-verify'` needs the package math-verify. Install it with: pip install 'bvpo-stats[math]'"
            ) from error
        self._library = math_verify

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score per answer.

        Raises:
            UserError: A prompt without a gold answer.
        """
        return [_SCORES[verdict] for verdict in self.verdicts(answers)]

    def verdicts(self, answers: Sequence[Answer]) -> list[Verdict]:
        """What became of each comparison; one that runs into math-verify's time limit is ``timeout``.

        Raises:
            UserError: A prompt without a gold answer.
        """
        # math-verify's limits use signals, which only the main thread may set.
        limit = _SECONDS if threading.current_thread() is threading.main_thread() else 0
        golds = [self._gold(required_gold(answer, self.identity), limit) for answer in answers]
        return [self._compare(gold, answer.text, limit) for gold, answer in zip(golds, answers, strict=True)]

    def _compare(self, gold: Any, text: str, limit: int) -> Verdict:
        if not gold:
            return "unreadable gold"
        started = time.monotonic()
        answer = self._library.parse(text, parsing_timeout=limit)
        if self._library.verify(gold, answer, timeout_seconds=limit):  # the order matters: gold first
            return "correct"
        # The library reports a limit only in its log: a comparison that failed after that long was cut off.
        return "timeout" if limit and time.monotonic() - started >= limit else "wrong"

    def _gold(self, text: str, limit: int) -> Any:
        # Bare LaTeX is read only up to its first command (2\sqrt{3} as 2) unless something marks it as mathematics.
        marked = text if any(sign in text for sign in _DELIMITERS) else f"\\boxed{{{text}}}"
        return self._library.parse(marked, parsing_timeout=limit)
