"""Sampling from any server that speaks OpenAI's HTTP interface: vLLM, SGLang, ``transformers serve``, ..."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import ServedPolicy
from bvpo_stats.records import Mode
from bvpo_stats.sampling.engines.base import Outcome, Request, SamplingOptions, SetAside
from bvpo_stats.sampling.engines.dialects import (
    CHAT_DIALECTS,
    COMPLETION_DIALECTS,
    ChatRule,
    Dialect,
    chat_rule,
    check_chat_modes,
    read_answer,
    request_body,
)
from bvpo_stats.sampling.engines.server import RefusedError, Server, ServerOptions
from bvpo_stats.sampling.engines.token_ids import prompt_mismatch, resolve

Drawn = tuple[Request, Outcome]
_NO_SUCH_PATH = (404, 405, 501)


def draw_seed(key: str, seed: int) -> int:
    """The seed of one draw, 31 bits: what the server makes of it is up to the server."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()[:4], "little") >> 1


class OpenAIEngine:
    """Draws completions from a server, many requests at a time.

    The first request settles how the server likes to be asked (:mod:`~bvpo_stats.sampling.engines.dialects`); from then
    on a request that it refuses, or whose token ids are in doubt, is set aside. Requests that fail for passing reasons
    are repeated. When the server is gone for good, everything that arrived has been yielded before the error is raised.

    Args:
        policy: Tokenizer and template of the served model.
        options: Where the server is and how to treat it.
        modes: Modes that will be asked for.

    Raises:
        UserError: The server cannot be reached, knows no such model, or cannot make exact prompts.
    """

    name = "openai"
    whole_batches = False

    def __init__(self, policy: ServedPolicy, options: ServerOptions, modes: tuple[Mode, ...]) -> None:
        self.options = options
        self.dialect: Dialect | None = None
        self._policy = policy
        self._modes = modes
        self._server = Server(options)
        self._rule = ChatRule()
        self._model = options.served_model or _only_model(self._server)
        if options.endpoint == "chat":
            self._rule = self._exact_chat_rule()

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
            yield [(first, self._settle(first, options))]
        yield from self._concurrently(requests, options)

    def _settle(self, request: Request, options: SamplingOptions) -> Outcome:
        """Asks for the first draw in one dialect after another until the server takes one."""
        refusals: list[RefusedError] = []
        for dialect in self._dialects(refusals):
            try:
                answer = read_answer(self._ask(dialect, request, options))
                bos = self._policy.tokenizer.bos_token
                if prompt_mismatch(answer, request) and dialect.prompt == "text" and bos:
                    # many servers put a BOS in front of a text that already has one
                    dialect = replace(dialect, leading=str(bos))
                    answer = read_answer(self._ask(dialect, request, options))
            except RefusedError as error:
                refusals.append(error)
                continue
            except ValueError as error:
                raise UserError(f"The server at {self.options.base_url} gives {error}.") from error
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
        raise UserError(f"The server at {self.options.base_url} refuses request {request.key} ({last.message}).")

    def _dialects(self, refusals: list[RefusedError]) -> Iterator[Dialect]:
        if self.options.endpoint != "chat":
            for dialect in COMPLETION_DIALECTS:
                yield dialect
                if refusals[-1].status in _NO_SUCH_PATH:
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

    def _ask(self, dialect: Dialect, request: Request, options: SamplingOptions) -> Any:
        body = request_body(
            dialect,
            request,
            options,
            model=self._model,
            seed=draw_seed(request.key, options.seed),
            eos_ids=self._policy.eos_ids,
            rule=self._rule,
        )
        return self._server.post(dialect.path, body)

    def _resolve(self, answer: Any, request: Request) -> Outcome:
        counts_eos = True if self.dialect and self.dialect.extras == "transformers" else None
        return resolve(answer, request, self._policy, counts_eos=counts_eos)

    def _outcome(self, request: Request, options: SamplingOptions) -> Outcome:
        assert self.dialect is not None
        try:
            return self._resolve(read_answer(self._ask(self.dialect, request, options)), request)
        except RefusedError as error:
            if error.status in _NO_SUCH_PATH:
                raise UserError(f"The server at {self.options.base_url} answers {error}.") from error
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
                while failure is None and in_flight < self.options.concurrency:
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
                        self._server.stop()
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
    try:
        listed = _listed_models(Server(options))
    except (RefusedError, KeyError, TypeError):
        return
    unknown = [name for name in names if name not in listed]
    if unknown and listed:
        raise UserError(
            f"The server at {options.base_url} has no model {', '.join(unknown)}; it offers {', '.join(listed[:8])}."
        )


def _listed_models(server: Server) -> list[str]:
    return [str(entry["id"]) for entry in server.get("/v1/models")["data"]]


def _only_model(server: Server) -> str:
    """The name of the one model that the server offers."""
    where = server.options.base_url
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
