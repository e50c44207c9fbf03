"""Mathematical equality with a gold answer, by the math-verify package."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

from bvpo_stats.errors import UserError
from bvpo_stats.sampling.rewards.base import Answer
from bvpo_stats.sampling.rewards.embedded import required_gold

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
