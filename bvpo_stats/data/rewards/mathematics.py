"""Mathematical equality with a gold answer, by the math-verify package."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from bvpo_stats.data.rewards.base import Answer
from bvpo_stats.data.rewards.embedded import required_gold
from bvpo_stats.errors import UserError

_SECONDS = 5  # math-verify's own limit for one expression
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
                "--reward math-verify needs the package math-verify. Install it with: pip install 'bvpo-stats[math]'"
            ) from error
        self._library = math_verify

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score per answer.

        Raises:
            UserError: A prompt without a gold answer.
        """
        # math-verify's limits use signals, which only the main thread may set.
        limit = _SECONDS if threading.current_thread() is threading.main_thread() else 0
        golds = [self._gold(required_gold(answer, self.identity), limit) for answer in answers]
        return [self._compare(gold, answer.text, limit) for gold, answer in zip(golds, answers, strict=True)]

    def _compare(self, gold: Any, text: str, limit: int) -> float | None:
        if not gold:
            return None
        answer = self._library.parse(text, parsing_timeout=limit)
        return float(self._library.verify(gold, answer, timeout_seconds=limit))  # the order matters: gold first

    def _gold(self, text: str, limit: int) -> Any:
        # Bare LaTeX is read only up to its first command (2\sqrt{3} as 2) unless something marks it as mathematics.
        marked = text if any(sign in text for sign in _DELIMITERS) else f"\\boxed{{{text}}}"
        return self._library.parse(marked, parsing_timeout=limit)
