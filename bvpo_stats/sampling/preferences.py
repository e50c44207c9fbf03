"""Preference data as people have it, recognised by its columns and made into rows of prompt, chosen and rejected.

| layout | columns |
|---|---|
| TRL, UltraFeedback binarised, Skywork | ``chosen``, ``rejected`` (text or messages), ``prompt``, ``question`` |
| UltraFeedback | ``instruction``, ``completions`` of ``response`` with ``fine-grained_score`` or ``overall_score`` |
| Argilla's UltraFeedback | ``instruction``, ``generations``, ``ratings`` |
| HelpSteer, HelpSteer2 | ``prompt``, ``response``, ``helpfulness``; rows of one prompt follow each other |
| HelpSteer2's preferences | ``prompt``, ``response_1``, ``response_2``, ``preference_strength`` |
| HelpSteer3 | ``context``, ``response1``, ``response2``, ``overall_preference`` |
| open-r1 | ``problem``, ``generations``, ``correctness_math_verify``, ``is_reasoning_complete`` |
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bvpo_stats.errors import UserError, shown

_TURN = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
_NUMBERS = {"chosen_reward": ("score_chosen", "chosen_score", "chosen-rating", "chosen_rating"),
            "rejected_reward": ("score_rejected", "rejected_score", "rejected-rating", "rejected_rating")}  # fmt: skip
_KNOWN = (
    "`chosen` and `rejected` (TRL, UltraFeedback binarised, Skywork), `instruction` and `completions` (UltraFeedback) "
    "or `generations` and `ratings`, `prompt`, `response` and `helpfulness` (HelpSteer), `response_1`, `response_2` "
    "and `preference_strength` (HelpSteer2), `context`, `response1`, `response2` and `overall_preference` "
    "(HelpSteer3), `problem`, `generations` and `correctness_math_verify` (open-r1)"
)

LAYOUTS: dict[str, frozenset[str]] = {
    "token ids": frozenset({"prompt_ids", "chosen_ids", "rejected_ids"}),
    "chosen and rejected": frozenset({"chosen", "rejected"}),
    "HelpSteer3": frozenset({"context", "response1", "response2", "overall_preference"}),
    "HelpSteer2 preferences": frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
    "UltraFeedback": frozenset({"instruction", "completions"}),
    "ratings": frozenset({"instruction", "generations", "ratings"}),
    "open-r1": frozenset({"problem", "generations", "correctness_math_verify"}),
    "HelpSteer": frozenset({"prompt", "response", "helpfulness"}),
}
"""Name of a layout -> the columns that it is known by; the first that fits counts."""


def layout_of(row: Mapping[str, Any]) -> str | None:
    """The layout of a row; None where its columns are those of none."""
    return next((name for name, columns in LAYOUTS.items() if columns <= row.keys()), None)


def check_layout(row: Any, where: str) -> None:
    """Refuses a row that holds no preference.

    Raises:
        UserError: Its columns are those of no layout; they are named.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a {type(row).__name__}, no row of columns.")
    if layout_of(row) is not None:
        return
    columns = ", ".join(map(str, row)) or "none"
    if {"problem", "solution"} <= row.keys():
        raise UserError(
            f"{where}: problems with one solution each (columns: {columns}), as in NuminaMath, hold no preferences. "
            "Give them to `sample` as `prompts`, whose gold answers `answer` or `solution` are, and make pairs of that."
        )
    raise UserError(f"{where}: no preference data that is known (columns: {columns}). Known are {_KNOWN}.")


def preference_rows(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Rows with the columns ``prompt``, ``chosen``, ``rejected`` from rows of :data:`LAYOUTS`; others as they are.

    Of several answers the best and the worst by score make the pair, the first among equals. What scores an answer
    stands in ``chosen_reward`` and ``rejected_reward``: helpfulness, UltraFeedback's mean of its four ratings
    (``fine-grained_score``; its ``overall_score`` has known faults and counts where the other is missing), 1 and 0 for
    right and wrong solutions, or the strength of a preference and 0.

    Args:
        rows: (place for errors, row).

    Yields:
        Place and row; None in the place of a row that prefers nothing: a tie, or fewer than two answers.

    Raises:
        UserError: A cell is not what its layout says.
    """
    waiting: list[tuple[str, Any, float | None]] = []  # HelpSteer's answers to one prompt
    prompt: Any = None
    for where, row in rows:
        layout = layout_of(row) if isinstance(row, Mapping) else None
        if layout == "HelpSteer":
            if waiting and row["prompt"] != prompt:
                yield _best_and_worst(waiting, _helpsteer_prompt(prompt))
                waiting = []
            prompt = row["prompt"]
            waiting.append((where, row["response"], _number(row["helpfulness"], where, "helpfulness")))
            continue
        if waiting:
            yield _best_and_worst(waiting, _helpsteer_prompt(prompt))
            waiting = []
        yield where, row if layout is None else _pair_of(dict(row), layout, where)
    if waiting:
        yield _best_and_worst(waiting, _helpsteer_prompt(prompt))


def _pair_of(row: dict[str, Any], layout: str, where: str) -> dict[str, Any] | None:
    if layout in ("token ids", "chosen and rejected"):
        for ours, names in _NUMBERS.items():
            name = next((name for name in names if row.get(name) is not None), None)
            if row.get(ours) is None and name is not None:
                row[ours] = _number(row[name], where, name)
        if row.get("prompt") is None and row.get("question") is not None:
            row["prompt"] = row["question"]
        return row
    if layout == "HelpSteer3":
        return _stronger(row, ("response1", "response2"), "overall_preference", row["context"], where)
    if layout == "HelpSteer2 preferences":
        prompt = _helpsteer_prompt(row["prompt"])
        return _stronger(row, ("response_1", "response_2"), "preference_strength", prompt, where)
    if layout == "UltraFeedback":
        completions = _list(row["completions"], where, "completions")
        if not all(isinstance(each, Mapping) and "response" in each for each in completions):
            raise UserError(f"{where}: `completions` must be a list of objects with a `response`.")
        name = "fine-grained_score"
        if any(each.get(name) is None for each in completions):
            name = "overall_score"
        answers = [(where, each["response"], _number(each.get(name), where, name)) for each in completions]
        return _best_and_worst(answers, row["instruction"])[1]
    texts = _list(row["generations"], where, "generations")
    name = "ratings" if layout == "ratings" else "correctness_math_verify"
    values = _list(row[name], where, name)
    if len(values) != len(texts):
        raise UserError(f"{where}: {len(texts)} `generations` have {len(values)} `{name}`; one each is needed.")
    if layout == "ratings":
        answers = [(where, t, _number(v, where, name)) for t, v in zip(texts, values, strict=True)]
        return _best_and_worst(answers, row["instruction"])[1]
    complete = row.get("is_reasoning_complete")
    whole = [True] * len(texts) if complete is None else _list(complete, where, "is_reasoning_complete")
    if len(whole) != len(texts):
        raise UserError(f"{where}: {len(texts)} `generations` have {len(whole)} `is_reasoning_complete`.")
    answers = [(where, t, float(bool(v))) for t, v, done in zip(texts, values, whole, strict=True) if done]
    return _best_and_worst(answers, row["problem"])[1]


def _best_and_worst(answers: Sequence[tuple[str, Any, float | None]], prompt: Any) -> tuple[str, dict[str, Any] | None]:
    scored = [(score, answer) for _, answer, score in answers if score is not None]
    place = answers[0][0] if answers else ""
    if not scored:
        return place, None
    best, worst = (choose(score for score, _ in scored) for choose in (max, min))
    if best == worst:
        return place, None
    chosen, rejected = (next(answer for score, answer in scored if score == extreme) for extreme in (best, worst))
    return place, {
        "prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_reward": best, "rejected_reward": worst
    }  # fmt: skip


def _stronger(
    row: dict[str, Any], names: tuple[str, str], strength: str, prompt: Any, where: str
) -> dict[str, Any] | None:
    """NVIDIA's scale: -3 (the first is much better) to 3 (the second is)."""
    value = _number(row[strength], where, strength)
    if not value:
        return None
    chosen, rejected = (row[name] for name in (names if value < 0 else names[::-1]))
    return {
        "prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_reward": abs(value), "rejected_reward": 0.0
    }  # fmt: skip


def _helpsteer_prompt(prompt: Any) -> Any:
    """HelpSteer2's prompts of several turns, with ``<extra_id_1>User`` and ``Assistant`` between them, as messages."""
    if not isinstance(prompt, str) or not _TURN.search(prompt):
        return prompt
    first, *rest = _TURN.split(prompt)
    turns = [{"role": "user", "content": first}] if first.strip() else []
    for role, text in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": role.lower(), "content": text})
    while turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()  # a marker alone: where the answer begins
    return turns


def _list(value: Any, where: str, name: str) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: `{name}` must be a list, not {shown(value)}.")
    return list(value)


def _number(value: Any, where: str, name: str) -> float | None:
    """A score; None where there is none: null, NaN, or a word such as N/A."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isinf(value):
        raise UserError(f"{where}: `{name}` must be a finite number, not {shown(value)}.")
    return float(value)
