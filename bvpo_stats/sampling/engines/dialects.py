"""What OpenAI-compatible servers understand: the same draw asked for in each server's own words.

"OpenAI-compatible" fixes the shape of a request, not how exactly it can be put. Best first, per endpoint:

- ``vllm`` (vLLM, SGLang and others): the prompt as token ids or text, top-k, min-p and the repetition penalty switched
  off explicitly (these servers otherwise take them from the model's ``generation_config.json``), token ids in return;
- ``transformers`` (``transformers serve``): text only, and a whole ``generation_config`` instead of those switches;
- ``plain``: the fields of OpenAI's own interface. Whatever else the server applies by default stays on.

**Prompts at a chat endpoint.** There the server renders the prompt itself. That is exact only where the model's chat
template, rendered here with the same arguments, gives the very text of the D_t or D_e prompt, and the server counts as
many prompt tokens. For Thinking this holds for templates that end where D_t begins (Qwen3, the embedded model); for
NoThinking only where the template has a switch, ``enable_thinking=False`` (Qwen3). A prefilled assistant turn
``<think></think>`` is never sent: the templates of reasoning models strip it. Everything else is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.records import Mode
from bvpo_stats.sampling.engines.base import Request, SamplingOptions

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
_PROBE = "What is 1+2?"


@dataclass(frozen=True)
class Dialect:
    """One way to put a request.

    Attributes:
        path: Endpoint.
        prompt: The prompt as token ids, as rendered text, or as chat messages.
        extras: Whose words beyond OpenAI's are used.
        leading: Text taken off a rendered prompt, because the server's tokenizer puts it in front by itself (a BOS).
    """

    path: str
    prompt: Literal["ids", "text", "messages"]
    extras: Literal["vllm", "transformers", "plain"]
    leading: str = ""

    @property
    def name(self) -> str:
        """For the report, e.g. ``/v1/completions ids vllm``."""
        return f"{self.path} {self.prompt} {self.extras}"


COMPLETION_DIALECTS = (
    Dialect(COMPLETIONS, "ids", "vllm"),
    Dialect(COMPLETIONS, "text", "vllm"),
    Dialect(COMPLETIONS, "text", "transformers"),
    Dialect(COMPLETIONS, "ids", "plain"),
    Dialect(COMPLETIONS, "text", "plain"),
)
CHAT_DIALECTS = (
    Dialect(CHAT, "messages", "vllm"),
    Dialect(CHAT, "messages", "transformers"),
    Dialect(CHAT, "messages", "plain"),
)


@dataclass(frozen=True)
class Answer:
    """What a server says about one draw.

    Attributes:
        text: The completion as text.
        finish_reason: The server's word for why it ended.
        token_ids: Token ids of the completion, None where the server keeps them.
        prompt_token_ids: Token ids of the prompt as the server saw it, None where it keeps them.
        prompt_tokens: Their number, None where unknown.
        completion_tokens: Number of completion tokens, None where unknown.
        reasoning: Whether the server has split the trace off the text.
    """

    text: str
    finish_reason: str | None
    token_ids: tuple[int, ...] | None
    prompt_token_ids: tuple[int, ...] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    reasoning: bool = False


@dataclass(frozen=True)
class ChatRule:
    """How each mode's prompt is made at a chat endpoint.

    Attributes:
        arguments: Template arguments by mode; a mode without an entry cannot be made exactly.
    """

    arguments: dict[Mode, dict[str, Any]] = field(default_factory=dict)


def chat_rule(policy: ServedPolicy) -> ChatRule:
    """Finds out which prompts the model's chat template renders exactly, by rendering one here."""
    found: dict[Mode, dict[str, Any]] = {}
    attempts: tuple[tuple[Mode, dict[str, Any]], ...] = (
        ("thinking", {}),
        ("thinking", {"enable_thinking": True}),
        ("nothinking", {"enable_thinking": False}),
    )
    for mode, arguments in attempts:
        rendered = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": _PROBE}], tokenize=False, add_generation_prompt=True, **arguments
        )
        if rendered == policy.template.prompt_text(_PROBE, mode):
            found.setdefault(mode, arguments)
    return ChatRule(found)


def check_chat_modes(rule: ChatRule, modes: tuple[Mode, ...], template: str) -> None:
    """Refuses modes whose prompts a chat endpoint cannot make exactly.

    Raises:
        UserError: Naming the mode and the way out.
    """
    for mode in modes:
        if mode not in rule.arguments:
            raise UserError(
                f"A chat endpoint cannot make the exact {mode} prompt of template {template}: the server renders its "
                "own. Use a server with /v1/completions (vLLM, SGLang, transformers serve), or leave that mode out."
            )


def request_body(
    dialect: Dialect,
    request: Request,
    options: SamplingOptions,
    *,
    model: str,
    seed: int,
    eos_ids: tuple[int, ...],
    rule: ChatRule,
) -> dict[str, Any]:
    """The JSON body that asks for one draw.

    Args:
        dialect: How to put it.
        request: The draw.
        options: Temperature, nucleus and length.
        model: The server's name for the model.
        seed: Seed of this draw alone.
        eos_ids: Tokens that end a completion.
        rule: Template arguments for chat endpoints.
    """
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": seed,
    }
    if dialect.prompt == "ids":
        body["prompt"] = list(request.prompt_ids)
    elif dialect.prompt == "text":
        body["prompt"] = request.prompt_text.removeprefix(dialect.leading)
    else:
        body["messages"] = [{"role": "user", "content": request.prompt.prompt}]
        if rule.arguments[request.mode]:
            body["chat_template_kwargs"] = rule.arguments[request.mode]
    if dialect.extras == "vllm":
        body |= {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
        }
        if dialect.prompt == "text":
            body["add_special_tokens"] = False
    elif dialect.extras == "transformers":
        body["generation_config"] = json.dumps(
            {
                "do_sample": True,
                "temperature": options.temperature,
                "top_p": options.top_p,
                "top_k": 0,
                "max_new_tokens": options.max_new_tokens,
                "eos_token_id": list(eos_ids),
                "pad_token_id": eos_ids[0],
            }
        )
    return body


def read_answer(reply: Any) -> Answer:
    """Reads the JSON answer of any dialect.

    Raises:
        ValueError: It has no completion in it.
    """
    try:
        choice = reply["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content")
        usage = reply.get("usage") or {}
        ids, prompt_ids = choice.get("token_ids"), choice.get("prompt_token_ids", reply.get("prompt_token_ids"))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("an answer without a completion in it") from error
    reasoning = isinstance(message, dict) and bool(message.get("reasoning_content") or message.get("reasoning"))
    if not isinstance(text, str) and not reasoning:
        raise ValueError("an answer without text")
    return Answer(
        text=text or "",
        finish_reason=choice.get("finish_reason"),
        token_ids=_ids(ids),
        prompt_token_ids=_ids(prompt_ids),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        reasoning=reasoning,
    )


def _ids(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(isinstance(entry, int) for entry in value):
        return tuple(value)
    return None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
