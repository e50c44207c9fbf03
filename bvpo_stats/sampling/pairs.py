"""Preference pairs: best and worst response of a prompt by the reward of the final answer (Sections 3.3, 5.1, C.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bvpo_stats.errors import UserError
from bvpo_stats.records import Completion, PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bvpo_stats.model.templates import Template

SetAside = Literal["too few", "identical", "tie"]


@dataclass(frozen=True)
class ScoredCompletion:
    """A response and the reward of its final answer, None where it has none or was not scored."""

    completion: Completion
    reward: float | None


@dataclass(frozen=True)
class Choice:
    """The pair of a prompt.

    Attributes:
        chosen: A response of the largest reward, the one of lowest ``sample_index`` among several.
        rejected: A response of the smallest reward, the one of lowest ``sample_index`` among several.
        n_best: Responses that share the largest reward.
        n_worst: Responses that share the smallest reward.
    """

    chosen: ScoredCompletion
    rejected: ScoredCompletion
    n_best: int
    n_worst: int


def choose(responses: Sequence[ScoredCompletion]) -> Choice | SetAside:
    """Best and worst of the responses to one prompt in one mode; ties are never paired.

    Only complete responses with a reward take part. The choice looks at rewards and sample indices alone, so given the
    answers, traces stay independent draws of pi(r | x, y): that is what makes b_t = 0 at the reference point.

    Returns:
        The choice, or why there is none: ``too few`` (fewer than two responses take part), ``identical`` (all answers,
        or the best and the worst one, are the same text), ``tie`` (different answers of the same reward).
    """
    taking_part = [r for r in responses if r.completion.complete and r.reward is not None]
    if len(taking_part) < 2:
        return "too few"
    if len({r.completion.answer for r in taking_part}) == 1:
        return "identical"
    ordered = sorted(taking_part, key=lambda r: r.completion.sample_index)
    rewards = [_reward(r) for r in ordered]
    best, worst = max(rewards), min(rewards)
    if best == worst:
        return "tie"
    chosen, rejected = ordered[rewards.index(best)], ordered[rewards.index(worst)]
    if chosen.completion.answer == rejected.completion.answer:
        return "identical"  # a reward that is not a function of the answer, e.g. scores from a file
    return Choice(chosen, rejected, rewards.count(best), rewards.count(worst))


def _reward(response: ScoredCompletion) -> float:
    assert response.reward is not None
    return response.reward


def build_pair(choice: Choice, template: Template) -> PreferencePair:
    """The record of a choice in training form.

    In both modes the prompt is the D_t prompt. A ``nothinking`` response begins with the tokens that close the empty
    trace (Appendix C.3: ``</think>`` is prepended), so D_e holds points (r = empty, y) of the law that D_t's come from.

    Args:
        choice: Best and worst response.
        template: The sampling model's template.

    Raises:
        UserError: The template does not give the prompt ids that the sampler saw.
    """
    chosen, rejected = choice.chosen.completion, choice.rejected.completion
    prompt_ids, closing = _prompt_and_closing(chosen, template)
    sides = [_side(response, closing, template) for response in (chosen, rejected)]
    return PreferencePair(
        prompt_id=chosen.prompt_id,
        mode=chosen.mode,
        prompt=training_text(prompt_ids, template.tokenizer, is_prompt=True),
        chosen=sides[0].text,
        rejected=sides[1].text,
        prompt_ids=prompt_ids,
        chosen_ids=sides[0].ids,
        rejected_ids=sides[1].ids,
        chosen_answer_start=sides[0].answer_start,
        rejected_answer_start=sides[1].answer_start,
        chosen_answer=chosen.answer or "",
        rejected_answer=rejected.answer or "",
        chosen_reward=_reward(choice.chosen),
        rejected_reward=_reward(choice.rejected),
        chosen_index=chosen.sample_index,
        rejected_index=rejected.sample_index,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        model=chosen.model,
        template=chosen.template,
    )


@dataclass(frozen=True)
class _Side:
    ids: tuple[int, ...]
    text: str
    answer_start: int


def _prompt_and_closing(response: Completion, template: Template) -> tuple[tuple[int, ...], tuple[int, ...]]:
    closing: tuple[int, ...] = ()
    if response.mode == "thinking":
        prompt_ids = template.prompt_ids(response.prompt, "thinking")
    else:
        prompt_ids, closing = template.empty_trace_ids(response.prompt)
    if prompt_ids + closing != response.prompt_ids:
        raise UserError(
            f"The sample {response.key} was drawn from another prompt than template {template.name} renders. Give "
            "`model` (and `template`, `empty_trace`) as in sampling."
        )
    return prompt_ids, closing


def _side(response: Completion, closing: tuple[int, ...], template: Template) -> _Side:
    ids = closing + response.completion_ids
    assert response.answer_start is not None  # complete responses only
    return _Side(ids, training_text(ids, template.tokenizer), len(closing) + response.answer_start)


def training_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, is_prompt: bool = False) -> str:
    """Token ids as text for trainers that tokenise themselves, special tokens included.

    Args:
        ids: Token ids.
        tokenizer: The model's tokenizer.
        is_prompt: Leave out a leading BOS where the tokenizer puts one in front of any text by itself; otherwise such
            trainers would train on two.
    """
    bos = tokenizer.bos_token_id
    if is_prompt and bos is not None and ids[:1] == (bos,) and list(tokenizer("a")["input_ids"])[:1] == [bos]:
        ids = ids[1:]
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def reads_back(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a trainer that tokenises ``prompt`` and ``prompt + completion`` itself (TRL) gets the sampler's own ids.

    Samplers may write a text in other tokens than the tokenizer would (`` fi`` + ``ve`` for `` five``).
    """
    eos = str(tokenizer.eos_token)  # TRL appends it where a completion does not end in it
    texts = [text if text.endswith(eos) else text + eos for text in (pair.chosen, pair.rejected)]
    encoded = tokenizer([pair.prompt, *(pair.prompt + text for text in texts)])["input_ids"]
    wanted = (pair.prompt_ids, pair.prompt_ids + pair.chosen_ids, pair.prompt_ids + pair.rejected_ids)
    return all(tuple(ids) == expected for ids, expected in zip(encoded, wanted, strict=True))
