import random
import re

import pytest

from bvpo_stats.embedded.task import (
    ANSWER_WORDINGS,
    Difficulty,
    draw_example,
    draw_terms,
    generate_prompts,
    grade,
    parse_answer,
    render_terms,
    split_of,
    value_of,
    write_trace,
)
from bvpo_stats.errors import UserError

STEP = re.compile(r"(-?\d+(?:[-+*]\d+)+)=(-?\d+)")
REMAINDER = re.compile(r"(?:, |leaving )(-?\d+(?:[-+*]\d+)*)")


def evaluate_text(expression: str) -> int:
    """Python's own arithmetic is the reference."""
    assert re.fullmatch(r"[-+*\d]+", expression)
    return eval(expression)


@pytest.fixture(scope="module")
def problems():
    rng = random.Random(5)
    return [draw_terms(rng, Difficulty()) for _ in range(400)]


def test_value_agrees_with_python(problems):
    for terms in problems:
        assert value_of(terms) == evaluate_text(render_terms(terms))


def test_every_step_and_every_remainder_of_a_trace_is_true(problems):
    rng = random.Random(6)
    for terms in problems:
        trace, value = write_trace(terms, rng), value_of(terms)
        steps = STEP.findall(trace)
        assert steps
        for expression, result in steps:
            assert evaluate_text(expression) == int(result), trace
        for remainder in REMAINDER.findall(trace):
            assert evaluate_text(remainder) == value, trace
        # The last step is the value itself, and nothing in the trace is left unexplained by steps and remainders.
        assert int(steps[-1][1]) == value, trace
        rest = re.sub(r"First|Then|Check|Again|leaving|[\s,.:]", "", REMAINDER.sub("", STEP.sub("", trace)))
        assert rest == "", trace


def test_traces_of_one_question_differ_in_order_and_length():
    terms = ((1, (4,)), (1, (3, 5)), (-1, (2,)), (-1, (6, 2)))
    rng = random.Random(0)
    traces = [write_trace(terms, rng) for _ in range(300)]
    orders = {tuple(step for step, _ in STEP.findall(trace.partition("Again")[0])) for trace in traces}
    # Products first or as met, from the left or from the right, before any re-check: four orders.
    assert {order for order in orders if len(order) == len(set(order)) == 5} == {
        ("3*5", "6*2", "4+15", "19-2", "17-12"),
        ("6*2", "3*5", "-2-12", "15-14", "4+1"),
        ("3*5", "4+15", "19-2", "6*2", "17-12"),
        ("6*2", "-2-12", "3*5", "15-14", "4+1"),
    }
    lengths = [len(trace) for trace in traces]
    assert max(lengths) >= 3 * min(lengths)
    assert any("Check" in trace for trace in traces)
    assert any("Again" in trace for trace in traces)


def test_splits_are_disjoint_and_of_the_stated_size(problems):
    expressions = {s: {expression_of(p.prompt) for p in generate_prompts(600, 3, s)} for s in ("train", "held-out")}
    assert not expressions["train"] & expressions["held-out"]
    assert all(split_of(e) == s for s, found in expressions.items() for e in found)
    share = sum(split_of(render_terms(t)) == "held-out" for t in problems) / len(problems)
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / len(problems)) ** 0.5


def expression_of(prompt: str) -> str:
    (found,) = re.findall(r"\d[-+*\d]*\d", prompt)
    return found


def test_training_examples_are_of_the_train_split_and_right():
    rng = random.Random(8)
    examples = [draw_example(rng, Difficulty(), 0.5) for _ in range(400)]
    for example in examples:
        expression = expression_of(example.question)
        assert split_of(expression) == "train"
        assert parse_answer(example.answer) == evaluate_text(expression)
    empty = sum(example.trace is None for example in examples)
    assert abs(empty - 200) < 4 * 10
    wordings = {re.sub(r"-?\d+", "{}", example.answer) for example in examples}
    assert wordings == set(ANSWER_WORDINGS)


def test_prompts_carry_gold_and_are_reproducible():
    prompts = generate_prompts(50, 2, "held-out")
    assert prompts == generate_prompts(50, 2, "held-out")
    assert prompts[:20] == generate_prompts(20, 2, "held-out")
    assert prompts != generate_prompts(50, 3, "held-out")
    assert len({p.prompt_id for p in prompts}) == len({expression_of(p.prompt) for p in prompts}) == 50
    assert all(p.gold == str(evaluate_text(expression_of(p.prompt))) for p in prompts)


def test_impossible_requests_are_user_errors():
    with pytest.raises(UserError, match="at least 1"):
        generate_prompts(0, 0, "train")
    with pytest.raises(UserError, match="unknown split"):
        generate_prompts(1, 0, "test")
    single = Difficulty(operand_weights=((2, 1.0),), product_share=1.0)
    with pytest.raises(UserError, match="different held-out expressions"):
        generate_prompts(100, 0, "held-out", single)


@pytest.mark.parametrize(
    ("text", "value"),
    [("17", 17), ("-3.", -3), ("The answer is -17.", -17), ("It is 5.", 5), ("3+4=7", 7), ("9-4", 4), ("", None)],
)
def test_parse_answer(text, value):
    assert parse_answer(text) == value


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("The answer is 17.", "17", 1.0),
        ("It is 17.", "17", 0.95),
        ("17.", "17", 0.9),
        ("17", 17, 0.9),
        ("The answer is 18.", "17", 0.2 / 2 + 0.1),
        ("20", "17", 0.2 / 4),
        ("It is -17.", "17", 0.2 / 35 + 0.05),
        ("I do not know.", "17", 0.0),
        ("", "17", 0.0),
    ],
)
def test_grade_is_the_documented_formula(answer, gold, expected):
    assert grade(answer, gold) == pytest.approx(expected, abs=1e-12)


def test_correctness_outweighs_nearness_and_wording():
    assert grade("17", "17") > max(grade(f"The answer is {v}.", "17") for v in range(-50, 50) if v != 17)
    with pytest.raises(UserError, match="not an integer"):
        grade("17", "seventeen")
