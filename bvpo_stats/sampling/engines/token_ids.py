"""From a server's answer to token ids that are certain, or to nothing."""

from __future__ import annotations

from collections.abc import Sequence

from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.sampling.engines.base import Draw, FinishReason, Outcome, Request, SetAside
from bvpo_stats.sampling.engines.dialects import Answer

_SHOWN = 200


def prompt_mismatch(answer: Answer, request: Request) -> str | None:
    """How the prompt the server saw differs from the one that was meant; None where it does not, as far as known."""
    meant = len(request.prompt_ids)
    if answer.prompt_token_ids is not None and answer.prompt_token_ids != request.prompt_ids:
        return (
            f"the server's tokenizer reads the prompt as other token ids ({len(answer.prompt_token_ids)} for {meant})"
        )
    if answer.prompt_tokens is not None and answer.prompt_tokens != meant:
        return f"the server reads the prompt as {answer.prompt_tokens} tokens, not {meant}"
    return None


def resolve(answer: Answer, request: Request, policy: ServedPolicy, *, counts_eos: bool | None = None) -> Outcome:
    """Turns an answer into a draw if its token ids are beyond doubt.

    Token ids that the server gives must decode to the text it gives. Where it gives none, the text is tokenised here;
    that stands if the ids decode back to the same text, and their number is the one that the server counted. (Sampling
    may spell a text in another way than the tokenizer would. Such a response cannot be recovered from its text.)

    Args:
        answer: What the server said.
        request: What it was asked.
        policy: Tokenizer and end-of-sequence tokens.
        counts_eos: Whether the server's number of tokens includes the end-of-sequence token; None where unknown.
    """
    difference = prompt_mismatch(answer, request)
    if difference is not None:
        return SetAside("prompt-differs", difference)
    if answer.reasoning:
        return SetAside("trace-split-off", "the server has split the trace off the text (a reasoning parser)")
    if answer.finish_reason not in ("stop", "length"):
        return SetAside("finish-reason", f"ended for the reason {answer.finish_reason!r}")
    reason: FinishReason = "stop" if answer.finish_reason == "stop" else "length"
    if answer.token_ids is not None:
        return _from_ids(answer, answer.token_ids, reason, policy)
    return _from_text(answer, reason, policy, counts_eos)


def _from_ids(answer: Answer, given: tuple[int, ...], reason: FinishReason, policy: ServedPolicy) -> Outcome:
    ids = given
    if ids and ids[-1] in policy.eos_ids:
        reason = "stop"
    elif reason == "stop":
        ids = (*ids, policy.eos_ids[0])  # servers may keep the final token to themselves
    if not _spells(given, answer.text, policy):
        return SetAside("ids-differ", f"the token ids do not spell the text {_short(answer.text)}")
    return _checked(ids, reason, policy)


def _from_text(answer: Answer, reason: FinishReason, policy: ServedPolicy, counts_eos: bool | None) -> Outcome:
    ids = tuple(policy.tokenizer.encode(answer.text, add_special_tokens=False))
    if _decode(ids, policy) != answer.text:
        return SetAside("ids-differ", f"the text does not survive tokenising: {_short(answer.text)}")
    if reason == "stop" and ids[-1:] not in [(eos,) for eos in policy.eos_ids]:
        ids = (*ids, policy.eos_ids[0])
    counted = answer.completion_tokens
    hidden = {True: (0,), False: (1,), None: (0, 1)}[counts_eos] if reason == "stop" else (0,)
    if counted is not None and len(ids) - counted not in hidden:
        return SetAside(
            "ids-differ", f"the server wrote {counted} tokens, its text has {len(ids)}: {_short(answer.text)}"
        )
    return _checked(ids, reason, policy)


def _checked(ids: tuple[int, ...], reason: FinishReason, policy: ServedPolicy) -> Outcome:
    if not ids:
        return SetAside("empty", "an empty completion")
    if any(token in policy.eos_ids for token in ids[:-1]):
        return SetAside("ids-differ", "an end-of-sequence token in the middle")
    return Draw(ids, reason)


def _spells(ids: Sequence[int], text: str, policy: ServedPolicy) -> bool:
    """Whether the ids decode to the text, with or without special tokens and the final end-of-sequence."""
    shorter = ids[:-1] if ids and ids[-1] in policy.eos_ids else ids
    for tokens in (ids, shorter):
        for skip in (False, True):
            decoded = _decode(tokens, policy, skip=skip)
            # a character cut in the middle shows as U+FFFD, or is held back
            if text == decoded or text.rstrip("\ufffd") == decoded.rstrip("\ufffd"):
                return True
    return False


def _decode(ids: Sequence[int], policy: ServedPolicy, *, skip: bool = False) -> str:
    return str(policy.tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
