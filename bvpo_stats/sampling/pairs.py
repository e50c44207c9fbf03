"""Preference pairs: best and worst response of a prompt by the reward of the final answer (Sections 3.3, 5.1, C.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from bvpo_stats.errors import UserError, check_kind, check_number, rows_of
from bvpo_stats.records import Completion, Mode, PreferencePair, Truncation
from bvpo_stats.sampling.rewards.base import Answer, Reward, score_answers
from bvpo_stats.sampling.sample import check_one_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bvpo_stats.model.policy import Policy
    from bvpo_stats.model.templates import Template

SetAside = Literal["too few", "identical", "tie", "small gap"]
Number = TypeVar("Number", int, float)


def make_pairs(
    samples: Sequence[Completion],
    reward: Callable[..., Any] | str | Reward,
    *,
    policy: Policy | Template | None = None,
    ref_logps: bool = False,
    min_gap: float = 0.0,
) -> list[PreferencePair]:
    """Preference pairs, in memory: what ``bvpo-stats pairs`` makes of the same responses and rewards.

    Of each prompt and mode, the best and the worst complete response by the reward of the final answer. Prompts with
    fewer than two answers, the same answers, or a tie give no pair.

    Args:
        samples: What `sample` returned, or completions from elsewhere.
        reward: A function ``(question, answer) -> number`` (None leaves a response out), one in the convention of TRL's
            reward functions, or a name as `load_reward` knows it, e.g. ``embedded`` or ``model:PATH``. It sees the
            final answer alone, never the trace.
        policy: The sampling model or its template; not needed for what `sample` returned.
        ref_logps: Store the reference log-probabilities of both sides; needs the policy itself.
        min_gap: Least difference of the rewards of a pair.

    Returns:
        Pairs in training form, by prompt in the order of the samples, D_t (``thinking``) before D_e.

    Raises:
        UserError: A wrong number of rewards, one that is NaN or infinite, no pairs at all (with the counts of why),
            samples of several models or of another template, or no template to render the prompts with.
    """
    from bvpo_stats.model.policy import Policy
    from bvpo_stats.model.templates import Template
    from bvpo_stats.sampling.rewards import as_reward

    if policy is not None:
        check_kind("policy", policy, (Policy, Template), "a Policy or its Template")
    check_number("min_gap", min_gap)
    if min_gap < 0:
        raise UserError(f"`min_gap={min_gap}`: must not be negative.")
    known = policy.template if isinstance(policy, Policy) else policy or getattr(samples, "template", None)
    samples = samples if isinstance(samples, list) else list(rows_of("samples", samples))
    if not isinstance(known, Template):
        raise UserError("These samples do not bring their template; give the sampling model: `policy`.")
    if ref_logps and not isinstance(policy, Policy):
        raise UserError("`ref_logps=True` needs the sampling model itself: `policy`.")
    if not samples:
        raise UserError("There are no samples to make pairs from.")
    check_one_source(samples)
    truncation = Truncation.by_mode(samples)
    by_prompt: dict[str, list[Completion]] = {}
    for completion in samples:
        by_prompt.setdefault(completion.prompt_id, []).append(completion)
    answers = [answer for responses in by_prompt.values() for answer in final_answers(responses)]
    scores = iter(score_answers(as_reward(reward), answers))
    pairs: list[PreferencePair] = []
    set_aside: dict[str, int] = {}
    for responses in by_prompt.values():
        scored = [ScoredCompletion(c, next(scores) if c.complete else None) for c in responses]
        for _, _, choice, pair in prompt_pairs(scored, truncation, known, min_gap):
            if pair is not None:
                pairs.append(pair)
            elif not isinstance(choice, Choice):
                set_aside[choice] = set_aside.get(choice, 0) + 1
    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(set_aside.items()))
        raise UserError(f"No prompt gives a pair ({reasons}). Draw more responses, or use a finer reward.")
    if ref_logps and isinstance(policy, Policy):
        values = reference_logps(policy, pairs)
        pairs = [replace(pair, **row) for pair, row in zip(pairs, values, strict=True)]  # type: ignore[arg-type]
    return pairs


def final_answers(responses: Iterable[Completion]) -> list[Answer]:
    """What a reward is asked to score: the final answers of those responses that have one."""
    return [
        Answer(c.prompt_id, c.mode, c.sample_index, c.prompt, c.answer or "", c.gold, c.messages)
        for c in responses
        if c.complete
    ]


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


def choose(responses: Sequence[ScoredCompletion], min_gap: float = 0.0) -> Choice | SetAside:
    """Best and worst of the responses to one prompt in one mode; ties are never paired.

    Only complete responses with a reward take part. The choice looks at rewards and sample indices alone, so given the
    answers, traces stay independent draws of pi(r | x, y): that is what makes b_t = 0 at the reference point.

    Args:
        responses: The responses.
        min_gap: Least difference of the two rewards, up to rounding.

    Returns:
        The choice, or why there is none: ``too few`` (fewer than two responses take part), ``identical`` (all answers,
        or the best and the worst one, are the same text), ``tie`` (different answers of the same reward), ``small gap``
        (their rewards differ by less than ``min_gap``).
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
    if best - worst < min_gap and not math.isclose(best - worst, min_gap, rel_tol=1e-9):  # 0.3 - 0.1 is 0.2
        return "small gap"
    return Choice(chosen, rejected, rewards.count(best), rewards.count(worst))


def _reward(response: ScoredCompletion) -> float:
    assert response.reward is not None
    return response.reward


def prompt_pairs(
    responses: Sequence[ScoredCompletion],
    truncation: Mapping[Mode, Truncation],
    template: Template,
    min_gap: float = 0.0,
) -> Iterator[tuple[Mode, list[ScoredCompletion], Choice | SetAside, PreferencePair | None]]:
    """Chooses and builds the pairs of one prompt.

    Args:
        responses: All its responses.
        truncation: Which sets to make, and how many of all responses in that mode have no answer.
        template: The sampling model's template.
        min_gap: See :func:`choose`.

    Yields:
        Mode, the responses in that mode, what was chosen or why nothing was, and the pair. Modes without responses are
        left out.

    Raises:
        UserError: The prompt id stands for several questions or gold answers; or see :func:`build_pair`.
    """
    questions = {r.completion.question for r in responses}
    if len(questions) > 1:
        raise UserError(
            f"The prompt id {responses[0].completion.prompt_id} stands for {len(questions)} different prompts in the "
            "samples. Make ids unique and sample again."
        )
    golds = {r.completion.gold for r in responses} - {None}
    if len(golds) > 1:
        raise UserError(
            f"The responses to prompt {responses[0].completion.prompt_id} come with {len(golds)} different gold "
            "answers. Keep the right one."
        )
    for mode, lost in truncation.items():
        mine = [r for r in responses if r.completion.mode == mode]
        if mine:
            choice = choose(mine, min_gap)
            yield mode, mine, choice, build_pair(choice, template, lost) if isinstance(choice, Choice) else None


def reference_logps(policy: Policy, pairs: Sequence[PreferencePair]) -> list[dict[str, float]]:
    """Log pi_ref(completion | prompt) of both sides of each pair, summed over tokens in float64, by field name."""
    from bvpo_stats.model.batching import TokenSequence
    from bvpo_stats.model.scores import completion_logprobs

    sides = [
        (pair, ids, side)
        for pair in pairs
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids))
    ]
    logps = completion_logprobs(
        policy,
        [TokenSequence(pair.prompt_ids, ids) for pair, ids, _ in sides],
        [f"pair {pair.prompt_id}/{pair.mode} ({side})" for pair, _, side in sides],
    )
    sums = [float(values.sum()) for values in logps]
    return [
        {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        for chosen, rejected in zip(sums[::2], sums[1::2], strict=True)
    ]


def build_pair(choice: Choice, template: Template, truncation: Truncation | None = None) -> PreferencePair:
    """The record of a choice in training form.

    In both modes the prompt is the D_t prompt. A ``nothinking`` response begins with the tokens that close the empty
    trace (Appendix C.3: ``</think>`` is prepended), so D_e holds points (r = empty, y) of the law that D_t's come from.

    Args:
        choice: Best and worst response.
        template: The sampling model's template.
        truncation: How many of all responses in this mode have no answer; None where that is not known.

    Raises:
        UserError: The template does not give the prompt ids that the sampler saw.
    """
    chosen, rejected = choice.chosen.completion, choice.rejected.completion
    prompt_ids, closing = _prompt_and_closing(chosen, template)
    if rejected.prompt_ids != chosen.prompt_ids:
        raise UserError(
            f"The samples {chosen.key} and {rejected.key} were drawn from different prompts: their `prompt_ids` differ."
        )
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
        temperature=_common(chosen.temperature, rejected.temperature),
        top_p=_common(chosen.top_p, rejected.top_p),
        top_k=_common(_top_k(chosen), _top_k(rejected)),
        cut_share=None if truncation is None else truncation.cut_share,
        unclosed_share=None if truncation is None else truncation.unclosed_share,
        model=chosen.model,
        template=chosen.template,
        **_sampler_logps(chosen, rejected),
    )


def _sampler_logps(chosen: Completion, rejected: Completion) -> dict[str, float | None]:
    """Log q of both sides. Of D_e, where the closing tag was given and not drawn, there is none."""
    if chosen.mode != "thinking":
        return {}
    return {"sampler_chosen_logps": chosen.sampler_logp, "sampler_rejected_logps": rejected.sampler_logp}


def _top_k(response: Completion) -> int | None:
    """Our own engine never limits a draw, and said so nowhere before records had the field."""
    return 0 if response.top_k is None and response.engine == "transformers" else response.top_k


def _common(chosen: Number | None, rejected: Number | None) -> Number | None:
    """What is true of both sides; unknown where they differ."""
    return chosen if chosen == rejected else None


@dataclass(frozen=True)
class _Side:
    ids: tuple[int, ...]
    text: str
    answer_start: int


def _prompt_and_closing(response: Completion, template: Template) -> tuple[tuple[int, ...], tuple[int, ...]]:
    closing: tuple[int, ...] = ()
    try:
        if response.mode == "thinking":
            prompt_ids = template.prompt_ids(response.question, "thinking")
        else:
            prompt_ids, closing = template.empty_trace_ids(response.question)
    except UserError as error:
        raise UserError(f"The sample {response.key}: {error}") from error
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
