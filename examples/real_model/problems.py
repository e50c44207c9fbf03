"""Word problems made by a seed: questions, worked traces, answers, and a reward for answers.

python problems.py questions.jsonl --number 96 --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from bvpo_stats.store.jsonl import write_atomic

NAMES = ("Tom", "Anna", "Ben", "Lucy", "Omar", "Sam", "Nora", "Leo", "Kate", "Paul")
THINGS = ("apples", "books", "coins", "pens", "stamps", "cookies", "shells", "cards")
OPENINGS = ("", "", "", "Let me think. ", "Step by step: ")
JOINTS = (". ", "; ", ". Then ")
ANSWERS = ("{name} has {gold} {thing}.", "The answer is {gold}.", "{gold}")
NAMED = 0.25
"""What an answer is worth for saying what was counted; a right number is worth 1."""


@dataclass(frozen=True)
class Problem:
    """A question and one way to answer it.

    Attributes:
        question: What the user asks.
        trace: The reasoning, one of many wordings.
        answer: The final answer, one of three wordings.
        gold: The number asked for.
    """

    question: str
    trace: str
    answer: str
    gold: int


def problem(random_: random.Random) -> Problem:
    """Draws a problem of one or two steps."""
    name, thing = random_.choice(NAMES), random_.choice(THINGS)
    many, few, some = random_.randint(12, 60), random_.randint(2, 9), random_.randint(2, 11)
    kind = random_.randrange(6)
    if kind == 0:
        more = random_.randint(5, 30)
        question = f"{name} has {many} {thing}, buys {more} and gives away {some}. How many {thing} are left?"
        steps, checks = [(many, "+", more), (many + more, "-", some)], [(many + more - some, "+", some)]
    elif kind == 1:
        question = f"{name} has {few} boxes of {some} {thing}. How many {thing} is that?"
        steps, checks = [(few, "*", some)], [(some, "*", few)]
    elif kind == 2:
        lost = random_.randint(3, many - 2)
        question = f"{name} had {many} {thing} and lost {lost}. How many {thing} are left?"
        steps, checks = [(many, "-", lost)], [(many - lost, "+", lost)]
    elif kind == 3:
        question = f"{name} had {many} {thing} and bought {few} bags of {some}. How many {thing} now?"
        steps, checks = [(few, "*", some), (many, "+", few * some)], [(few * some, "+", many)]
    elif kind == 4:
        question = f"{name} shares {few * some} {thing} among {few} friends. How many {thing} does each get?"
        steps, checks = [(few * some, "/", few)], [(few, "*", some)]
    else:
        question = f"{name} has {many} {thing}, Ivy has {some} more. How many {thing} have both?"
        steps, checks = [(many, "+", some), (many, "+", many + some)], [(many + some, "+", many)]
    gold = _value(steps[-1])
    trace = random_.choice(OPENINGS) + random_.choice(JOINTS).join(map(_written, steps)) + "."
    if random_.random() < 0.3:
        trace += f" Check: {_written(checks[0])}."
    answer = random_.choice(ANSWERS).format(name="Each friend" if kind == 4 else name, gold=gold, thing=thing)
    return Problem(question, trace, answer, gold)


def _value(step: tuple[int, str, int]) -> int:
    left, sign, right = step
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]


def _written(step: tuple[int, str, int]) -> str:
    left, sign, right = step
    return f"{left} {sign} {right} = {_value(step)}"


def grade(prompts: list[str], completions: list[str], gold: list[str], **_: object) -> list[float]:
    """The reward, in TRL's convention: the last number is the right one, and the answer names the thing."""
    scores = []
    for question, answer, right in zip(prompts, completions, gold, strict=True):
        numbers = re.findall(r"-?\d+", answer)
        thing = next(thing for thing in THINGS if thing in question)
        scores.append(float(bool(numbers) and int(numbers[-1]) == int(right)) + NAMED * (thing in answer))
    return scores


def main() -> None:
    """Writes a file of different questions with their gold answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True, help="training and test questions need different seeds")
    options = parser.parse_args()
    random_, found = random.Random(f"questions {options.seed}"), {}
    while len(found) < options.number:
        drawn = problem(random_)
        found[drawn.question] = drawn.gold
    rows = [json.dumps({"prompt": question, "gold": str(gold)}) for question, gold in found.items()]
    write_atomic(options.output, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
