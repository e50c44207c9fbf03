"""A first look at a stream of prompts: how many there are, their fingerprint, and the longest ones."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from bvpo_stats.records import Prompt

_LONGEST = 8


@dataclass(frozen=True)
class PromptSurvey:
    """What a run has to know about its prompts before it starts, in constant memory.

    Attributes:
        count: Number of prompts.
        fingerprint: The count and a short hash of ids and texts, in order.
        longest: The few prompts with the most characters, longest first.
    """

    count: int
    fingerprint: str
    longest: tuple[str, ...]


def survey_prompts(prompts: Iterable[Prompt]) -> PromptSurvey:
    """Goes through the prompts once.

    Args:
        prompts: The prompts; streamed.
    """
    digest = hashlib.sha256()
    longest: list[tuple[int, int, str]] = []
    count = 0
    for prompt in prompts:
        digest.update(f"{prompt.prompt_id}\x1f{prompt.prompt}\x1e".encode())
        entry = (len(prompt.prompt), -count, prompt.prompt)
        count += 1
        if len(longest) < _LONGEST:
            heapq.heappush(longest, entry)
        elif entry > longest[0]:
            heapq.heapreplace(longest, entry)
    texts = tuple(text for _, _, text in sorted(longest, reverse=True))
    return PromptSurvey(count, f"{count}:{digest.hexdigest()[:16]}", texts)
