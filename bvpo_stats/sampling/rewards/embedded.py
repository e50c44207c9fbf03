"""The embedded task's own graded verifier as a reward."""

from __future__ import annotations

from collections.abc import Sequence

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
