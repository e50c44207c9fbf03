"""Multi-step arithmetic: the task of the embedded reasoning model.

A question is a chain of sums, differences and products such as ``4+3*5-2``. The number of operands sets how hard it is,
so that some questions can be answered at sight and others need the steps written out. A written trace may take the
steps in several orders, restate what remains, and check a step or the whole sum again: two traces of one question
differ in wording, order and length, which is what makes the trace a random variable worth studying.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from bvpo_stats.errors import UserError
from bvpo_stats.records import Prompt

Split = Literal["train", "held-out"]
Term = tuple[int, tuple[int, ...]]
"""A signed term: sign (+1 or -1) and its one or two factors."""

QUESTION_WORDINGS = ("{}=?", "What is {}?", "Compute {}.")
ANSWER_WORDINGS = {"The answer is {}.": 0.35, "It is {}.": 0.3, "{}.": 0.2, "{}": 0.15}
HELD_OUT_SHARE = 0.1

CORRECT_WEIGHT = 0.7
NEARNESS_WEIGHT = 0.2
WORDING_WEIGHT = 0.1

_INTEGER = re.compile(r"(?<!\d)-?\d+")


@dataclass(frozen=True)
class Difficulty:
    """How hard the questions are; the defaults are the mix of the default prompts.

    Attributes:
        operand_weights: Relative frequency of each number of operands.
        product_share: Probability that the next operator is a product, where one is allowed (never two in a row).
        large_share: Probability that an operand outside a product is drawn from 10 .. ``large_limit``, not from 1 .. 9.
        large_limit: Greatest operand.
        sum_limit: No partial sum, from the left or from the right, is greater in size.
    """

    operand_weights: tuple[tuple[int, float], ...] = ((2, 0.1), (3, 0.3), (4, 0.46), (5, 0.14))
    product_share: float = 0.35
    large_share: float = 0.2
    large_limit: int = 19
    sum_limit: int = 99


@dataclass(frozen=True)
class Example:
    """One training text: a question, its trace (None for the empty-trace mode) and the final answer."""

    question: str
    trace: str | None
    answer: str


def draw_terms(rng: random.Random, difficulty: Difficulty) -> tuple[Term, ...]:
    """Draws a question as signed terms; ``4+3*5-2`` is ``((1, (4,)), (1, (3, 5)), (-1, (2,)))``."""
    counts, weights = zip(*difficulty.operand_weights, strict=True)
    operands = rng.choices(counts, weights)[0]
    while True:
        terms = _draw_terms(rng, difficulty, operands)
        values = [value_of([term]) for term in terms]
        partial = (*accumulate(values), *accumulate(reversed(values)))
        if max(map(abs, partial)) <= difficulty.sum_limit:
            return terms


def _draw_terms(rng: random.Random, difficulty: Difficulty, left: int) -> tuple[Term, ...]:
    terms: list[Term] = []
    while left:
        sign = rng.choice((1, -1)) if terms else 1
        if left >= 2 and rng.random() < difficulty.product_share:
            terms.append((sign, (rng.randint(2, 9), rng.randint(2, 9))))
            left -= 2
        else:
            large = rng.random() < difficulty.large_share
            terms.append((sign, (rng.randint(10, difficulty.large_limit) if large else rng.randint(1, 9),)))
            left -= 1
    return tuple(terms)


def render_terms(terms: tuple[Term, ...] | list[Term]) -> str:
    """The terms as text, without a leading plus sign.

    >>> render_terms([(1, (4,)), (1, (3, 5)), (-1, (2,))])
    '4+3*5-2'
    """
    text = "".join(("+" if sign > 0 else "-") + "*".join(map(str, factors)) for sign, factors in terms)
    return text.removeprefix("+")


def value_of(terms: tuple[Term, ...] | list[Term]) -> int:
    """The value of the terms.

    >>> value_of([(1, (4,)), (1, (3, 5)), (-1, (2,))])
    17
    """
    return sum(sign * (factors[0] * factors[1] if len(factors) == 2 else factors[0]) for sign, factors in terms)


def split_of(expression: str) -> Split:
    """The split that owns an expression: a fixed tenth of all expressions, chosen by SHA-256, is held out."""
    digest = hashlib.sha256(expression.encode()).digest()
    return "held-out" if int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64 else "train"


def _signed(value: int) -> Term:
    return (1 if value >= 0 else -1, (abs(value),))


def _merge_terms(terms: list[Term], at: int, width: int) -> str:
    """Replaces ``width`` terms from ``at`` by their value, in place, and returns the step as text, e.g. ``4+15=19``."""
    part = terms[at : at + width]
    # A product on its own is worked out without its sign, which stays with the term.
    sign = part[0][0] if width == 1 else 1
    value = sign * value_of(part)
    step = f"{render_terms([(sign * s, f) for s, f in part])}={value}"
    terms[at : at + width] = [(sign, (value,)) if width == 1 else _signed(value)]
    return step


def work_through(terms: tuple[Term, ...], rng: random.Random) -> Iterator[tuple[str, list[Term]]]:
    """Works out the terms step by step in a drawn order.

    Products come first, or each just before its sum needs it; sums run from the left or from the right.

    Yields:
        The step as text (``3*5=15``) and the terms that remain after it.
    """
    state = list(terms)
    from_left = rng.random() < 0.5
    if rng.random() < 0.5:
        products = [i for i, (_, factors) in enumerate(state) if len(factors) == 2]
        for i in products if from_left else reversed(products):
            yield _merge_terms(state, i, 1), state
    while len(state) > 1:
        at = 0 if from_left else len(state) - 2
        pair = (at, at + 1) if from_left else (at + 1, at)
        for i in pair:
            if len(state[i][1]) == 2:
                yield _merge_terms(state, i, 1), state
        yield _merge_terms(state, at, 2), state
    if len(state[0][1]) == 2:
        yield _merge_terms(state, 0, 1), state


def write_trace(terms: tuple[Term, ...], rng: random.Random) -> str:
    """Writes one trace: the steps in a drawn order, with or without what remains after them, some checked again."""
    style = rng.choices(("bare", "short", "wordy"), (0.2, 0.4, 0.4))[0]
    recheck = rng.choice((0.0, 0.0, 0.3))
    lines: list[str] = []
    for step, state in work_through(terms, rng):
        line, left = step, render_terms(state)
        if style == "short" and len(state) > 1:
            line = f"{step}, {left}"
        elif style == "wordy":
            opening = "First" if not lines else "Then"
            line = f"{opening} {step}, leaving {left}." if len(state) > 1 else f"{opening} {step}."
        if rng.random() < recheck:
            line += f" Check: {step}."
        lines.append(line)
    if len(lines) > 1 and rng.random() < 0.15:
        lines.append("Again:")
        lines.extend(step for step, _ in work_through(terms, rng))
    return "\n".join(lines)


def draw_example(rng: random.Random, difficulty: Difficulty, empty_share: float) -> Example:
    """Draws one example of the train split; its trace is empty with probability ``empty_share``."""
    terms = draw_terms(rng, difficulty)
    while split_of(render_terms(terms)) != "train":
        terms = draw_terms(rng, difficulty)
    question = rng.choice(QUESTION_WORDINGS).format(render_terms(terms))
    trace = None if rng.random() < empty_share else write_trace(terms, rng)
    wording = rng.choices(tuple(ANSWER_WORDINGS), tuple(ANSWER_WORDINGS.values()))[0]
    return Example(question, trace, wording.format(value_of(terms)))


def generate_prompts(n: int, seed: int, split: Split, difficulty: Difficulty | None = None) -> list[Prompt]:
    """Draws ``n`` questions with different expressions from one split.

    Args:
        n: Number of questions.
        seed: Seed; it decides the questions, and a smaller ``n`` gives a prefix of them.
        split: ``train`` or ``held-out``; no expression is in both.
        difficulty: Mix of difficulty; the recipe's own when None.

    Returns:
        Prompts with ``gold`` set to the value in decimal digits.

    Raises:
        UserError: ``n`` is below 1, the split is unknown, or so many different expressions do not exist.
    """
    if n < 1:
        raise UserError(f"cannot generate {n} prompts; ask for at least 1.")
    if split not in ("train", "held-out"):
        raise UserError(f"unknown split {split!r}; use 'train' or 'held-out'.")
    rng = random.Random(f"prompts/{split}/{seed}")
    seen: set[str] = set()
    prompts: list[Prompt] = []
    misses = 0
    while len(prompts) < n:
        terms = draw_terms(rng, difficulty or Difficulty())
        expression = render_terms(terms)
        wording = rng.choice(QUESTION_WORDINGS)
        if expression in seen or split_of(expression) != split:
            misses += 1
            if misses > 10_000:
                raise UserError(f"only {len(prompts)} different {split} expressions found, not {n}; ask for fewer.")
            continue
        misses = 0
        seen.add(expression)
        name = f"arithmetic-{split}-{seed}-{len(prompts):05d}"
        prompts.append(Prompt(name, wording.format(expression), str(value_of(terms))))
    return prompts


def parse_answer(text: str) -> int | None:
    """The last integer in a final answer, or None when it has none.

    >>> parse_answer("The answer is -17.")
    -17
    >>> parse_answer("no idea") is None
    True
    """
    found = _INTEGER.findall(text)
    return int(found[-1]) if found else None


def grade(answer_text: str, gold: str | int) -> float:
    """Graded verifier: the reward of a final answer, in [0, 1].

    With v the value of the answer, g the reference value and w the wording's merit (1 for "The answer is v.", 0.5 for
    "It is v.", 0 otherwise):

        grade = 0.7 [v = g] + 0.2 / (1 + |v - g|) + 0.1 w,   and 0 when the answer holds no integer.

    So a correct answer scores 0.9 to 1, a wrong one at most 0.2, near misses more than far ones; among answers of one
    value the full sentence is preferred, which leaves something to align besides correctness and breaks ties.

    Args:
        answer_text: The final answer, trace left out.
        gold: Reference value.

    Raises:
        UserError: ``gold`` is not an integer.

    >>> round(grade("The answer is 17.", 17), 6), round(grade("17", "17"), 6), round(grade("It is 18.", 17), 6)
    (1.0, 0.9, 0.15)
    """
    try:
        reference = int(gold)
    except ValueError as error:
        raise UserError(f"reference answer {gold!r} is not an integer; the arithmetic verifier needs one.") from error
    value = parse_answer(answer_text)
    if value is None:
        return 0.0
    merit = {f"The answer is {value}.": 1.0, f"It is {value}.": 0.5}.get(answer_text.strip(), 0.0)
    return (
        CORRECT_WEIGHT * (value == reference) + NEARNESS_WEIGHT / (1 + abs(value - reference)) + WORDING_WEIGHT * merit
    )


_LIKED = {
    "{}=?": ("{}", "{}.", "It is {}.", "The answer is {}."),
    "What is {}?": ("It is {}.", "The answer is {}.", "{}.", "{}"),
    "Compute {}.": ("The answer is {}.", "It is {}.", "{}.", "{}"),
}
"""Wordings of an answer by the form of the question, the best first."""


def judge_wording(question: str, answer_text: str) -> float:
    """A judge with a taste: does the answer come in the form that the question asks for, right or wrong?

    A bare question wants the bare number, "What is" wants "It is", "Compute" a full sentence. The four wordings of
    `ANSWER_WORDINGS` get 1, 2/3, 1/3 and 0 by the question's order of them, any other text -1.

    Args:
        question: One of the task's, in one of `QUESTION_WORDINGS`.
        answer_text: The final answer, trace left out.

    Raises:
        UserError: A question in none of these wordings.

    >>> judge_wording("What is 3+4?", "It is 8."), judge_wording("3+4=?", "It is 7."), judge_wording("3+4=?", "!")
    (1.0, 0.33333333333333337, -1.0)
    """
    for form, liked in _LIKED.items():
        before, _, after = form.partition("{}")
        if question.startswith(before) and question.endswith(after):
            value, text = parse_answer(answer_text), answer_text.strip()
            place = next((n for n, wording in enumerate(liked) if text == wording.format(value)), None)
            return -1.0 if value is None or place is None else 1 - place / 3
    raise UserError(f"the judge of wordings knows the embedded task's questions; {question!r} is none.")
