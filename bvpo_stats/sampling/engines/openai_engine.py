"""Sampling from any server that speaks OpenAI's HTTP interface: vLLM, SGLang, ``transformers serve``, ...

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
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.records import FinishReason, Mode, chat_turns, read_finish_reason
from bvpo_stats.sampling.engines.base import Outcome, Request, SamplingOptions, SetAside, draw_seed, whole_draw
from bvpo_stats.sampling.engines.server import (
    NO_SUCH_PATH,
    RefusedError,
    Server,
    ServerOptions,
    Servers,
    UnreachableError,
)

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
        logps: Whether the log-probabilities of the tokens are asked for.
    """

    path: str
    prompt: Literal["ids", "text", "messages"]
    extras: Literal["vllm", "transformers", "plain"]
    leading: str = ""
    logps: bool = False

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
        finish_reason: The server's word for why it ended, in its own shape.
        token_ids: Token ids of the completion, None where the server keeps them.
        prompt_token_ids: Token ids of the prompt as the server saw it, None where it keeps them.
        prompt_tokens: Their number, None where unknown.
        completion_tokens: Number of completion tokens, None where unknown.
        reasoning: Whether the server has split the trace off the text.
        logps: Log-probability of each completion token, None where the server was not asked or does not say.
    """

    text: str
    finish_reason: object
    token_ids: tuple[int, ...] | None
    prompt_token_ids: tuple[int, ...] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    reasoning: bool = False
    logps: tuple[float | None, ...] | None = None


ChatRule = dict[Mode, dict[str, Any]]
"""Template arguments that make each mode's exact prompt at a chat endpoint; a mode without an entry cannot be made."""


def chat_rule(policy: ServedPolicy) -> ChatRule:
    """Finds out which prompts the model's chat template renders exactly, by rendering one here."""
    found: ChatRule = {}
    attempts: tuple[tuple[Mode, dict[str, Any]], ...] = (
        ("thinking", {}),
        ("thinking", dict(policy.template.switch)),
        ("nothinking", {"enable_thinking": False}),
        ("nothinking", {"thinking": False}),
    )
    for mode, arguments in attempts:
        rendered = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": _PROBE}], tokenize=False, add_generation_prompt=True, **arguments
        )
        if rendered == policy.template.prompt_text(_PROBE, mode):
            found.setdefault(mode, arguments)
    return found


def check_chat_modes(rule: ChatRule, modes: tuple[Mode, ...], template: str) -> None:
    """Refuses modes whose prompts a chat endpoint cannot make exactly.

    Raises:
        UserError: Naming the mode and the way out.
    """
    for mode in modes:
        if mode not in rule:
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
        body["messages"] = chat_turns(request.prompt.question)
        if rule[request.mode]:
            body["chat_template_kwargs"] = rule[request.mode]
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
        if dialect.logps:
            body["logprobs"] = True if dialect.prompt == "messages" else 1
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
        if isinstance(text, str):
            text.encode()
        usage = reply.get("usage") or {}
        ids, prompt_ids = choice.get("token_ids"), choice.get("prompt_token_ids", reply.get("prompt_token_ids"))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("an answer without a completion in it") from error
    except UnicodeEncodeError as error:
        raise ValueError("an answer with half a character in it (a lone surrogate)") from error
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
        logps=_logps(choice.get("logprobs")),
    )


def _logps(value: Any) -> tuple[float | None, ...] | None:
    """Log-probabilities of the completion's tokens, as either endpoint writes them; what is no number is None."""
    if not isinstance(value, dict):
        return None
    found = value.get("token_logprobs")
    content = value.get("content")
    if isinstance(content, list):
        found = [entry.get("logprob") if isinstance(entry, dict) else None for entry in content]
    if not isinstance(found, list):
        return None
    return tuple(float(each) if type(each) in (int, float) else None for each in found)


def _ids(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(entry) is int for entry in value):
        return tuple(value)
    return None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


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
    found = read_finish_reason(answer.finish_reason, policy.eos_ids)
    if found not in ("stop", "length"):
        return SetAside("finish-reason", f"ended for the reason {answer.finish_reason!r}")
    reason: FinishReason = "stop" if found == "stop" else "length"
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
    return whole_draw(ids, reason, policy.template.vocabulary, answer.logps)


def _from_text(answer: Answer, reason: FinishReason, policy: ServedPolicy, counts_eos: bool | None) -> Outcome:
    ids = policy.template.encode(answer.text)
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
    return whole_draw(ids, reason, policy.template.vocabulary, answer.logps)


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


Drawn = tuple[Request, Outcome]


class OpenAIEngine:
    """Draws completions from a server, or from several of one model, many requests at a time.

    The first request settles how the server likes to be asked (:class:`Dialect`); from then
    on a request that it refuses, or whose token ids are in doubt, is set aside. Requests that fail for passing reasons
    are repeated. When the last server is gone for good, everything that arrived has been yielded before the error is
    raised.

    Args:
        policy: Tokenizer and template of the served model.
        options: Where the server is and how to treat it.
        modes: Modes that will be asked for.

    Raises:
        UserError: No server can be reached, one knows no such model, they serve different ones, or exact prompts cannot
            be made.
    """

    name = "openai"
    whole_batches = False

    @property
    def top_k(self) -> int | None:
        """0 where it was switched off; None where the server takes no such field, or has not been asked yet."""
        return 0 if self.dialect is not None and self.dialect.extras != "plain" else None

    def __init__(self, policy: ServedPolicy, options: ServerOptions, modes: tuple[Mode, ...]) -> None:
        self.options = options
        self.dialect: Dialect | None = None
        self._policy = policy
        self._modes = modes
        self._servers = Servers(options)
        self._rule: ChatRule = {}
        self._model = self._served_model()
        if options.endpoint == "chat":
            self._rule = self._exact_chat_rule()

    def _served_model(self) -> str:
        """The one model that all servers serve; those that cannot be reached are left out.

        Raises:
            UserError: They serve different ones, or one does not serve what was asked for.
        """
        names: dict[str, str] = {}
        for server in self._servers.all:
            try:
                if len(self._servers.all) == 1:
                    return self.options.served_model or _only_model(server)
                names[server.url] = _served_by(server, self.options.served_model)
            except UnreachableError as error:
                self._servers.leave_out(server, str(error))
        if len(set(names.values())) > 1:
            offers = ", ".join(f"{name} at {url}" for url, name in names.items())
            raise UserError(
                f"The servers serve different models: {offers}. Give servers of one model, or `served_model`."
            )
        return next(iter(names.values()))

    @property
    def model(self) -> str:
        """Identity for the records: a server tells its model's name, and nothing about its weights."""
        return f"{self._model}@server"

    def draw(self, batches: Iterable[Sequence[Request]], options: SamplingOptions) -> Iterator[list[Drawn]]:
        """Draws in the order in which the server finishes; batches do not matter."""
        requests = chain.from_iterable(batches)
        if self.dialect is None:
            first = next(requests, None)
            if first is None:
                return
            yield [(first, self._settle_all(first, options))]
        yield from self._concurrently(requests, options)

    def _settle_all(self, request: Request, options: SamplingOptions) -> Outcome:
        """The first draw, and whether all servers like to be asked as the one that gives it does."""
        found: dict[Server, tuple[Outcome, Dialect]] = {}
        for server in self._servers.left:
            asked = options if not found else replace(options, max_new_tokens=1)
            self.dialect = None
            try:
                outcome = self._settle(server, request, asked)
            except UnreachableError as error:
                self._servers.leave_out(server, str(error))
                continue
            assert self.dialect is not None
            found[server] = outcome, self.dialect
        (first, (outcome, self.dialect)), *others = found.items()
        for server, (_, dialect) in others:
            if replace(dialect, logps=False) != replace(self.dialect, logps=False):
                raise UserError(
                    f"The servers must be asked in different ways ({self.dialect.name} at {first.url}, {dialect.name} "
                    f"at {server.url}), so their draws may differ in law. Give servers of one kind."
                )
        self.dialect = replace(self.dialect, logps=all(dialect.logps for _, dialect in found.values()))
        return outcome

    def _settle(self, server: Server, request: Request, options: SamplingOptions) -> Outcome:
        """Asks for a draw in one dialect after another until the server takes one."""
        refusals: list[RefusedError] = []
        for dialect in self._spoken(refusals, options):
            try:
                answer = read_answer(self._ask(server, dialect, request, options))
                bos = self._policy.tokenizer.bos_token
                if prompt_mismatch(answer, request) and dialect.prompt == "text" and bos:
                    # many servers put a BOS in front of a text that already has one
                    dialect = replace(dialect, leading=str(bos))
                    answer = read_answer(self._ask(server, dialect, request, options))
            except RefusedError as error:
                refusals.append(error)
                continue
            except ValueError as error:
                raise UserError(f"The server at {server.url} gives {error}.") from error
            if answer.reasoning:
                raise UserError(
                    "The server splits the trace off the response, so its exact tokens are lost. Start it without a "
                    "reasoning parser, or use `endpoint='completions'`."
                )
            difference = prompt_mismatch(answer, request)
            if difference is not None:
                raise UserError(
                    f"{difference.capitalize()}: is `model` the model that it serves, and `template` right?"
                )
            if dialect.prompt == "messages" and answer.prompt_tokens is None and answer.prompt_token_ids is None:
                raise UserError("The chat endpoint does not say how long its prompts are, so they cannot be checked.")
            self.dialect = dialect
            return self._resolve(answer, request)
        last = refusals[-1]
        raise UserError(f"The server at {server.url} refuses request {request.key} ({last.message}).")

    def _spoken(self, refusals: list[RefusedError], options: SamplingOptions) -> Iterator[Dialect]:
        """The dialects to try, with log-probabilities first.

        They are asked for where servers agree on what they are: with a temperature or a nucleus some give those of the
        draw, others the model's own.
        """
        for dialect in self._dialects(refusals):
            if options.plain and dialect.extras == "vllm":
                before = len(refusals)
                yield replace(dialect, logps=True)
                if len(refusals) > before and refusals[-1].status in NO_SUCH_PATH:
                    continue
            yield dialect

    def _dialects(self, refusals: list[RefusedError]) -> Iterator[Dialect]:
        if self.options.endpoint != "chat":
            for dialect in COMPLETION_DIALECTS:
                yield dialect
                if refusals[-1].status in NO_SUCH_PATH:
                    break
            else:
                return
            if self.options.endpoint == "completions" or "model" in refusals[-1].message.lower():
                return  # it is the model's name that the server does not know
            self._rule = self._exact_chat_rule()
        yield from CHAT_DIALECTS

    def _exact_chat_rule(self) -> ChatRule:
        rule = chat_rule(self._policy)
        check_chat_modes(rule, self._modes, self._policy.template.name)
        return rule

    def _ask(self, server: Server | Servers, dialect: Dialect, request: Request, options: SamplingOptions) -> Any:
        body = request_body(
            dialect,
            request,
            options,
            model=self._model,
            seed=draw_seed(request.key, options.seed),
            eos_ids=self._policy.eos_ids,
            rule=self._rule,
        )
        return server.post(dialect.path, body)

    def _resolve(self, answer: Any, request: Request) -> Outcome:
        if self.dialect is None or not self.dialect.logps:
            answer = replace(answer, logps=None)  # what was not asked for may be anything
        counts_eos = True if self.dialect and self.dialect.extras == "transformers" else None
        return resolve(answer, request, self._policy, counts_eos=counts_eos)

    def _outcome(self, request: Request, options: SamplingOptions) -> Outcome:
        assert self.dialect is not None
        try:
            return self._resolve(read_answer(self._ask(self._servers, self.dialect, request, options)), request)
        except RefusedError as error:
            return SetAside("refused", str(error))
        except ValueError as error:
            return SetAside("no-completion", str(error))

    def _concurrently(self, requests: Iterator[Request], options: SamplingOptions) -> Iterator[list[Drawn]]:
        """Keeps ``concurrency`` requests in flight; yields what has arrived since the last group."""
        waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        arrived: queue.SimpleQueue[tuple[Request, Outcome | BaseException]] = queue.SimpleQueue()

        def work() -> None:
            while (request := waiting.get()) is not None:
                try:
                    arrived.put((request, self._outcome(request, options)))
                except BaseException as error:  # handed to the thread that waits for it
                    arrived.put((request, error))

        in_flight = workers = 0
        failure: BaseException | None = None
        try:
            while True:
                while failure is None and in_flight < self.options.concurrency * len(self._servers.left):
                    request = next(requests, None)
                    if request is None:
                        break
                    if workers <= in_flight:
                        # a daemon, so that Ctrl-C does not wait for a server that is busy writing
                        threading.Thread(target=work, daemon=True).start()
                        workers += 1
                    waiting.put(request)
                    in_flight += 1
                if not in_flight:
                    break
                group = []
                for drawn_request, outcome in _take(arrived):
                    in_flight -= 1
                    if isinstance(outcome, BaseException):
                        failure = failure or outcome
                        self._servers.stop()
                    else:
                        group.append((drawn_request, outcome))
                if group:
                    yield group
        finally:
            for _ in range(workers):
                waiting.put(None)
        if failure is not None:
            raise failure


def _take(arrived: queue.SimpleQueue[tuple[Request, Outcome | BaseException]]) -> Iterator[Any]:
    """Waits for one result, and takes whatever else is there."""
    yield arrived.get()
    while True:
        try:
            yield arrived.get_nowait()
        except queue.Empty:
            return


def check_served(options: ServerOptions, names: Sequence[str]) -> None:
    """Refuses names of models that the server does not list, before anything is drawn.

    Args:
        options: Where the server is.
        names: Names of models. A server that lists none is not asked further.

    Raises:
        UserError: The server cannot be reached, or lists other models.
    """
    for url in options.urls:
        try:
            listed = _listed_models(Server(options, url))
        except (RefusedError, KeyError, TypeError):
            continue
        except UnreachableError:
            if len(options.urls) == 1:
                raise
            continue
        unknown = [name for name in names if name not in listed]
        if unknown and listed:
            raise UserError(
                f"The server at {url} has no model {', '.join(unknown)}; it offers {', '.join(listed[:8])}."
            )


def _listed_models(server: Server) -> list[str]:
    return [str(entry["id"]) for entry in server.get("/v1/models")["data"]]


def _served_by(server: Server, wanted: str | None) -> str:
    """The name of the model that one of several servers is asked for: the only one, or the one wanted."""
    if wanted is None:
        return _only_model(server)
    try:
        listed = _listed_models(server)
    except (RefusedError, KeyError, TypeError):
        return wanted  # it does not say; the first request does
    if wanted not in listed:
        raise UserError(
            f"The server at {server.url} does not serve {wanted}; it offers {', '.join(listed[:8]) or 'no models'}. "
            "Give servers of one model."
        )
    return wanted


def _only_model(server: Server) -> str:
    """The name of the one model that the server offers."""
    where = server.url
    try:
        names = _listed_models(server)
    except RefusedError as error:
        raise UserError(f"The server at {where} does not list its models ({error}). Give `served_model`.") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"The server at {where} does not list its models. Give `served_model`.") from error
    if len(names) != 1:
        offer = f"offers {', '.join(names[:8])}" if names else "lists no models"
        raise UserError(f"The server at {where} {offer}. Choose one with `served_model`.")
    return names[0]
