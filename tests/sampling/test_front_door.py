"""sample, make_pairs and make_traces in memory: the records that the runs put on file, from the same code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import datasets
import pytest

from bvpo_stats.embedded.assets import embedded_prompts
from bvpo_stats.embedded.task import grade
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, PolicyOptions, load_policy
from bvpo_stats.records import Completion, PreferencePair, Prompt, TraceRecord
from bvpo_stats.sampling.pairs import make_pairs
from bvpo_stats.sampling.sample import Samples, sample
from bvpo_stats.sampling.traces import make_traces
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.pairs.config import PairsConfig
from bvpo_stats.studies.pairs.run import run_pairs
from bvpo_stats.studies.sample.run import SampleConfig, run_sample
from bvpo_stats.studies.traces.config import TracesConfig
from bvpo_stats.studies.traces.run import run_traces
from tests.sampling.samples import both_modes, template, unclosed

POLICY = PolicyOptions(device="cpu")
PROMPTS, N = 5, 4


@dataclass(frozen=True)
class Runs:
    """The three runs on the embedded model, and what the front door gives for the same settings."""

    samples: list[Completion]
    pairs: list[PreferencePair]
    traces: list[TraceRecord]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(POLICY)


@pytest.fixture(scope="module")
def drawn(policy: Policy) -> Samples:
    return sample(policy, embedded_prompts(PROMPTS), N, max_new_tokens=96, seed=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    drawing = SampleConfig(POLICY, samples=N, temperature=1.0, max_new_tokens=96, seed=3, limit=PROMPTS)
    run_sample(drawing, folder / "s")
    run_pairs(PairsConfig(folder / "s", "embedded", POLICY, ref_logps=True), folder / "p")
    run_traces(TracesConfig(folder / "p", folder / "s", 3, policy=POLICY, seed=3), folder / "t")
    return Runs(
        list(read_records(folder / "s", Completion)),
        list(read_records(folder / "p", PreferencePair)),
        list(read_records(folder / "t", TraceRecord)),
    )


def test_samples_are_those_of_the_run(drawn: Samples, runs: Runs) -> None:
    assert {c.key: c for c in drawn} == {c.key: c for c in runs.samples}
    assert [c.key for c in drawn[: N + 1]] == [
        *(f"{embedded_prompts(1)[0].prompt_id}/thinking/{i}" for i in range(N)),
        f"{embedded_prompts(1)[0].prompt_id}/nothinking/0",
    ]


def test_pairs_are_those_of_the_run(drawn: Samples, runs: Runs, policy: Policy) -> None:
    def key(pair: PreferencePair) -> tuple[str, str]:
        return pair.mode, pair.prompt_id

    assert len(runs.pairs) > 5
    made = make_pairs(drawn, "embedded", policy=policy, ref_logps=True)
    assert sorted(made, key=key) == sorted(runs.pairs, key=key)
    golds = {prompt.prompt: prompt.gold for prompt in embedded_prompts(PROMPTS)}
    by_function = make_pairs(drawn, lambda question, answer: grade(answer, golds[question] or ""))
    assert by_function == [replace(pair, ref_chosen_logps=None, ref_rejected_logps=None) for pair in made]


def test_traces_are_those_of_the_run(drawn: Samples, runs: Runs, policy: Policy) -> None:
    pairs = make_pairs(drawn, "embedded")
    found = make_traces(policy, drawn, pairs, k=3, seed=3)
    exact = [(t.prompt_id, t.side, t.source, t.index, t.completion_ids) for t in runs.traces]
    assert sorted((t.prompt_id, t.side, t.source, t.index, t.completion_ids) for t in found) == sorted(exact)
    assert {t.source for t in found} >= {"anchor", "mh", "prior"}
    only = make_traces(policy, drawn, pairs, k=2, sources=("anchor",))
    assert len(only) == 2 * sum(pair.mode == "thinking" for pair in pairs)


def test_prompts_in_every_form(policy: Policy) -> None:
    texts = ["What is 1+2?", "Compute 3+4."]
    forms = [texts, [Prompt("a", texts[0]), Prompt("b", texts[1])], [{"question": text} for text in texts]]
    forms.append(datasets.Dataset.from_list(forms[2]))  # type: ignore[arg-type]
    for form in forms:
        found = sample(policy, form, 1, modes=("nothinking",), max_new_tokens=8)  # type: ignore[arg-type]
        assert [c.prompt for c in found] == texts
        assert {(c.temperature, c.top_p) for c in found} == {(1.0, 1.0)}
    whole = sample(policy, texts[:1], 1, modes=("nothinking",))
    assert whole[0].max_new_tokens == 256


def test_a_policy_that_has_moved_is_not_taken_for_the_reference() -> None:
    moved = load_policy("embedded", lora=2, device="cpu")
    assert sample(moved, ["What is 1+2?"], 1, max_new_tokens=4)[0].model == moved.identity
    for name, weight in moved.model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(1e-3)
    drawn = sample(moved, ["What is 1+2?"], 1, max_new_tokens=4)
    assert {completion.model for completion in drawn} == {f"{moved.identity}+adapter"}


def test_wrong_settings_are_named(policy: Policy) -> None:
    for settings, words in (
        ({"n": 0}, "n=0"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"modes": ("dreaming",)}, "modes="),
        ({"modes": "thinking"}, "modes="),
        ({"batch_size": 0}, "batch_size=0"),
        ({"prompts": []}, "holds no prompts"),
        ({"prompts": [3]}, "`prompts`, row 1: a int"),
        ({"prompts": ["a", "a"]}, "occurs twice"),
    ):
        with pytest.raises(UserError, match=words):
            sample(policy, **({"prompts": ["1+1?"]} | settings))  # type: ignore[arg-type]


SAMPLES = Samples([*both_modes("a", ["17", "16", "It is 17."]), unclosed("a", 9)], template())


def test_rewards_of_every_kind() -> None:
    def length(question: str, answer: str) -> float:
        return float(len(answer))

    def lists(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return [float(len(completion)) for completion in completions]

    asked: list[str] = []

    def picky(question: str, answer: str) -> float | None:
        asked.append(answer)
        return None if answer == "16" else float(len(answer))

    pairs = make_pairs(SAMPLES, length)
    assert [(p.mode, p.chosen_answer, p.rejected_answer, p.chosen_reward) for p in pairs] == [
        ("thinking", "It is 17.", "17", 9.0),
        ("nothinking", "It is 17.", "17", 9.0),
    ]
    assert make_pairs(SAMPLES, lists) == pairs == make_pairs(list(SAMPLES), length, policy=template())
    assert make_pairs(SAMPLES, picky) == pairs
    assert sorted(asked) == ["16", "17", "It is 17."]  # equal answers once, traces and unclosed responses never


def test_rewards_that_do_not_fit_are_refused_in_one_line() -> None:
    def short(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return [1.0]

    def broken(question: str, answer: str) -> float:
        raise ValueError("no\nidea")

    for reward, words in (
        (short, "gave 1 scores for 3 answers"),
        (lambda question, answer: math.nan, "gave nan to the sample a/thinking/0"),
        (broken, "fails with ValueError: no"),
        (lambda question: 1.0, "called as function\\(question, answer\\)"),
        (lambda question, answer: 1.0, "No prompt gives a pair \\(2 tie\\)"),
        ("magic", "unknown"),
        (3, "a int. Give a function"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            make_pairs(SAMPLES, reward)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_samples_that_do_not_fit_are_refused(policy: Policy, drawn: Samples) -> None:
    for call, words in (
        (lambda: make_pairs(list(SAMPLES), "embedded"), "do not bring their template"),
        (lambda: make_pairs(SAMPLES, "embedded", ref_logps=True), "needs the sampling model itself"),
        (lambda: make_pairs([], "embedded", policy=template()), "no samples"),
        (lambda: make_traces(policy, drawn, make_pairs(SAMPLES, "embedded")[1:]), "no thinking pairs"),
        (lambda: make_traces(policy, drawn, make_pairs(SAMPLES, "embedded")), "is not in `samples`"),
        (
            lambda: make_traces(policy, drawn, [replace(make_pairs(SAMPLES, "embedded")[0], temperature=None)]),
            "are not recorded",
        ),
    ):
        with pytest.raises(UserError, match=words):
            call()
    foreign = [replace(c, model="other@1") for c in drawn]
    with pytest.raises(UserError, match="drawn by other@1"):
        make_traces(policy, foreign, make_pairs(drawn, "embedded"))


def test_conversations_go_all_the_way(policy: Policy) -> None:
    """System prompt and earlier turns stand in both prompts, and come back in every record."""
    turns = [
        {"role": "system", "content": "Compute."},
        {"role": "user", "content": "What is 1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Compute 8+9."},
    ]
    drawn = sample(policy, [turns, "Compute 1+2."], 2, max_new_tokens=32)
    first = [completion for completion in drawn if completion.messages]
    assert len(first) == 4
    for completion in first:
        text = policy.tokenizer.decode(completion.prompt_ids)
        assert text.startswith(
            "<｜begin▁of▁sentence｜>Compute.<｜User｜>What is 1+1?<｜Assistant｜>2<｜end▁of▁sentence｜><｜User｜>"
        )
        assert completion.prompt == "Compute 8+9."
    finished = [
        replace(c, answer=str(c.sample_index), answer_start=0 if c.mode == "nothinking" else 1, finish_reason="stop")
        for c in drawn
    ]
    thinking, empty = [
        p for p in make_pairs(finished, lambda _, y: float(y), policy=policy) if p.prompt_id == first[0].prompt_id
    ]
    assert thinking.prompt_ids == empty.prompt_ids == first[0].prompt_ids
    assert (thinking.mode, empty.mode) == ("thinking", "nothinking")


def test_prompts_that_cannot_be_put_are_set_aside_by_name(policy: Policy) -> None:
    rows = [Prompt("good", "Compute 1+2."), Prompt("long", "1+" * 600 + "1"), Prompt("tag", "What is </think>?")]
    with pytest.warns(UserWarning, match="Set aside: Prompt") as caught:
        drawn = sample(policy, rows, 1, max_new_tokens=8)
    assert {completion.prompt_id for completion in drawn} == {"good"}
    assert len(caught) == len(drawn.set_aside) == 2
    assert drawn.set_aside["long"].endswith("leave no room in the model's 512 positions.")
    assert "holds </think>" in drawn.set_aside["tag"]
    with pytest.raises(UserError, match=r"None of the 2 prompts can be used\. Prompt long: "):
        sample(policy, rows[1:], 1, max_new_tokens=8)
