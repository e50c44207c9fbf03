"""Which responses become a pair, in which form, and what is set aside."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.model.templates import PROTOCOLS, Template
from bvpo_stats.records import Completion
from bvpo_stats.sampling.pairs import Choice, ScoredCompletion, build_pair, choose, reads_back, training_text
from tests.sampling.samples import sample, template, truncated, unclosed
from tests.tokenizers import BOS, EMBEDDED, R1_0528, R1_DISTILL, qwen3, r1


def scored(*rewards: float | None, answers: list[str] | None = None) -> list[ScoredCompletion]:
    texts = answers or [f"{index}" for index in range(len(rewards))]
    return [ScoredCompletion(sample("p", i, texts[i]), reward) for i, reward in enumerate(rewards)]


def chosen_and_rejected(responses: list[ScoredCompletion]) -> tuple[int, int]:
    choice = choose(responses)
    assert isinstance(choice, Choice)
    return choice.chosen.completion.sample_index, choice.rejected.completion.sample_index


def test_best_and_worst() -> None:
    assert chosen_and_rejected(scored(0.2, 0.9, -1.0, 0.5)) == (1, 2)


def test_of_equals_the_lowest_sample_index_whatever_the_order() -> None:
    responses = scored(0.1, 1.0, 0.1, 1.0)
    for order in (responses, responses[::-1], [responses[i] for i in (2, 3, 0, 1)]):
        assert chosen_and_rejected(order) == (1, 0)
    choice = choose(responses)
    assert isinstance(choice, Choice)
    assert (choice.n_best, choice.n_worst) == (2, 2)


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        (scored(0.5, 0.5, 0.5), "tie"),
        (scored(0.5, 0.7, answers=["17", "17"]), "identical"),
        (scored(0.5, 0.5, answers=["17", "17"]), "identical"),
        (scored(1.0, 0.5, 0.0, answers=["17", "18", "17"]), "identical"),  # only a reward that is no function of y
        (scored(0.5), "too few"),
        (scored(0.5, None), "too few"),
        ([], "too few"),
    ],
)
def test_what_makes_no_pair(responses: list[ScoredCompletion], reason: str) -> None:
    assert choose(responses) == reason


def test_a_least_gap_leaves_out_what_is_nearer() -> None:
    responses = scored(0.3, 0.1, 0.2)
    for least in (0.0, 0.1, 0.2):  # 0.3 - 0.1 is a little less than 0.2 in floating point
        assert isinstance(choose(responses, least), Choice)
    assert choose(responses, 0.21) == "small gap"
    assert choose(scored(0.5, 0.5), 0.21) == "tie"


def test_incomplete_responses_never_take_part_even_with_a_reward() -> None:
    cut, open_ended = truncated("p", 0), unclosed("p", 3)
    assert not cut.complete
    assert not open_ended.complete
    responses = [ScoredCompletion(cut, 9.0), *scored(0.2, 0.4)[1:], ScoredCompletion(sample("p", 2, "18"), 0.1)]
    assert chosen_and_rejected([*responses, ScoredCompletion(open_ended, -9.0)]) == (1, 2)


def pair_of(chosen: Completion, rejected: Completion, by: Template | None = None):
    return build_pair(Choice(ScoredCompletion(chosen, 1.0), ScoredCompletion(rejected, 0.0), 1, 1), by or template())


def test_a_thinking_pair_is_what_the_sampler_saw() -> None:
    chosen, rejected = sample("p", 0, "17.", trace="8+9=17"), sample("p", 4, "18", trace="First 8+9=18.")
    pair = pair_of(chosen, rejected)
    assert (pair.chosen_ids, pair.rejected_ids) == (chosen.completion_ids, rejected.completion_ids)
    assert pair.prompt_ids == chosen.prompt_ids
    tokenizer = template().tokenizer
    assert pair.prompt == "<｜begin▁of▁sentence｜><｜User｜>What is 8+9?<｜Assistant｜><think>"
    assert pair.chosen == f"8+9=17</think>17.{tokenizer.eos_token}"
    assert tokenizer.decode(pair.chosen_ids[: pair.chosen_answer_start]) == "8+9=17</think>"
    assert (pair.chosen_answer, pair.rejected_answer) == ("17.", "18")
    assert (pair.chosen_index, pair.rejected_index) == (0, 4)
    assert reads_back(pair, tokenizer)


def test_a_nothinking_pair_has_the_thinking_prompt_and_closes_the_trace_in_its_completions() -> None:
    chosen, rejected = sample("p", 0, "17.", mode="nothinking"), sample("p", 1, "18", mode="nothinking")
    pair = pair_of(chosen, rejected)
    thinking = sample("p", 0, "17.")
    close = template().tokenizer.convert_tokens_to_ids("</think>")
    assert pair.prompt_ids == thinking.prompt_ids
    assert pair.prompt_ids + pair.chosen_ids == chosen.prompt_ids + chosen.completion_ids
    assert pair.chosen_ids == (close, *chosen.completion_ids)
    assert (pair.chosen_answer_start, pair.rejected_answer_start) == (1, 1)
    assert pair.chosen == f"</think>17.{template().tokenizer.eos_token}"
    assert reads_back(pair, template().tokenizer)


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("r1-distill", r1(R1_DISTILL)), ("r1-0528", r1(R1_0528)), ("qwen3", qwen3()), ("embedded", r1(EMBEDDED))],
)
@pytest.mark.parametrize("mode", ["thinking", "nothinking"])
def test_every_protocol_gives_pairs_that_read_back(name: str, tokenizer, mode) -> None:
    by = Template(PROTOCOLS[name], tokenizer)

    def response(index: int, answer: str) -> Completion:
        text = f"so\n</think>\n\n{answer}" if mode == "thinking" else answer
        ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
        start, trace, final = by.split(ids, mode)
        plain = sample("p", index, answer, mode=mode)
        return replace(
            plain,
            prompt_ids=by.prompt_ids(plain.prompt, mode),
            completion_ids=ids,
            answer_start=start,
            trace=trace,
            answer=final,
            template=name,
        )

    pair = pair_of(response(0, "17"), response(1, "18"), by)
    assert reads_back(pair, tokenizer)
    assert pair.prompt_ids + pair.chosen_ids == response(0, "17").prompt_ids + response(0, "17").completion_ids
    tail = tokenizer.decode(pair.chosen_ids[pair.chosen_answer_start :]).strip()
    assert tail == f"17{tokenizer.eos_token}"


def test_a_tokenizer_that_adds_bos_itself_gets_a_prompt_without_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = r1(R1_DISTILL)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    by = Template(PROTOCOLS["r1-distill"], tokenizer)
    plain = [sample("p", index, "17") for index in range(2)]
    ids = [(*tokenizer.encode(f"r</think>{n}", add_special_tokens=False), tokenizer.eos_token_id) for n in (17, 18)]
    both = [
        replace(c, prompt_ids=by.prompt_ids(c.prompt, "thinking"), completion_ids=i)
        for c, i in zip(plain, ids, strict=True)
    ]
    pair = pair_of(*both, by)
    assert pair.prompt_ids[0] == bos
    assert pair.prompt_ids[1] != bos
    assert not pair.prompt.startswith(BOS)
    assert tuple(tokenizer(pair.prompt)["input_ids"]) == pair.prompt_ids
    assert reads_back(pair, tokenizer)


def test_text_that_the_tokenizer_would_spell_otherwise_is_noticed() -> None:
    tokenizer = template().tokenizer
    canonical = sample("p", 0, "The answer is 17.")
    letters = [
        i for piece in ("T", "h", "e", " answer is 17.") for i in tokenizer.encode(piece, add_special_tokens=False)
    ]
    ids = (*canonical.completion_ids[: canonical.answer_start], *letters, tokenizer.eos_token_id)
    spelled = replace(canonical, completion_ids=ids)
    assert tokenizer.decode(spelled.completion_ids) == tokenizer.decode(canonical.completion_ids)
    assert reads_back(pair_of(canonical, sample("p", 1, "18")), tokenizer)
    assert not reads_back(pair_of(spelled, sample("p", 1, "18")), tokenizer)
    assert training_text(spelled.completion_ids, tokenizer) == training_text(canonical.completion_ids, tokenizer)


@pytest.mark.parametrize("mode", ["thinking", "nothinking"])
def test_samples_of_another_template_are_refused(mode) -> None:
    chosen = sample("p", 0, "17", mode=mode)
    other = replace(chosen, prompt_ids=(1, *chosen.prompt_ids))
    with pytest.raises(UserError, match=r"p/\w+/0 was drawn from another prompt.*`template`"):
        pair_of(other, replace(sample("p", 1, "18", mode=mode), prompt_ids=other.prompt_ids))
