"""The interface of a sampling engine."""

from __future__ import annotations

import hashlib
import math
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from bvpo_stats.errors import UserError, check_number, check_whole
from bvpo_stats.options import Option, check_options
from bvpo_stats.records import FinishReason, Mode, Prompt, Vocabulary, draw_key


@dataclass(frozen=True)
class SamplingOptions:
    """How responses are drawn.

    Attributes:
        samples: Responses per prompt and mode.
        temperature: Softmax temperature of the draw.
        top_p: Nucleus mass; 1 samples the whole distribution, which is what makes b_t = 0 at the reference point.
        max_new_tokens: Cut-off in tokens.
        seed: Decides every draw, together with prompt id, mode and sample index.
    """

    samples: int = 5
    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("samples", self.samples)
        check_number("temperature", self.temperature)
        check_number("top_p", self.top_p)
        check_whole("max_new_tokens", self.max_new_tokens)
        check_whole("seed", self.seed, low=0)
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"`temperature={self.temperature}`: must be positive. At 0 every sample is the same, so there is "
                "nothing to measure; the paper uses 0.8."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"`top_p={self.top_p}`: must lie in (0, 1]; 1 switches nucleus sampling off.")

    @property
    def plain(self) -> bool:
        """Whether draws are of the model's own distribution: temperature 1, no nucleus."""
        return self.temperature == 1 and self.top_p == 1


@dataclass(frozen=True)
class ServerOptions:
    """How to reach OpenAI-compatible servers.

    Attributes:
        base_url: Address, with or without the final ``/v1``; of several servers of one model, all of them.
        api_key_env: Environment variable that holds the API key, None for no key. The key itself is never stored.
        served_model: Name under which the server knows the model; None to ask the server.
        endpoint: ``auto``, ``completions`` or ``chat``.
        concurrency: Requests in flight at once, at each server.
        timeout: Seconds after which an unfinished request counts as failed.
        retries: How often a failed request is tried again before the server is given up.
    """

    base_url: Annotated[
        str | tuple[str, ...],
        Option(
            "Address of the server, e.g. http://localhost:8000/v1 (openai engine). Repeatable: several servers of the "
            "same model share the work."
        ),
    ]
    api_key_env: Annotated[
        str | None, Option("Environment variable that holds the server's API key.", shown="no key is sent")
    ] = None
    served_model: Annotated[
        str | None, Option("The server's name for the model.", shown="the one model that it lists")
    ] = None
    endpoint: Annotated[
        Literal["auto", "completions", "chat"],
        Option("auto, completions or chat (chat only where it gives exact prompts)."),
    ] = "auto"
    concurrency: Annotated[int, Option("Requests in flight at once, at each server.", low=1, high=10_000)] = 128
    timeout: Annotated[float, Option("Seconds for one answer of the server.", above=0, high=1e6)] = 600.0
    retries: Annotated[
        int,
        Option(
            "Repetitions of a failed request, up to a minute apart, before the server is given up; 10 outlast a "
            "restart of about four minutes.",
            low=0,
            high=10**4,
        ),
    ] = 10

    def __post_init__(self) -> None:
        check_options(self)
        if not self.urls:
            raise UserError("`base_url=()`: give an address such as http://localhost:8000/v1.")
        for url in self.urls:
            try:
                parts = urllib.parse.urlsplit(url)
                _ = parts.port  # refuses what is no number
            except ValueError:
                parts = urllib.parse.urlsplit("")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UserError(f"`base_url={url!r}`: give an address such as http://localhost:8000/v1.")
            if parts.username is not None or parts.password is not None:
                raise UserError(
                    "`base_url` must not hold a password. Put the key in a variable and name it: `api_key_env`."
                )
        roots = [server_root(url) for url in self.urls]
        for url in self.urls:
            if roots.count(server_root(url)) > 1:
                raise UserError(f"`base_url={url!r}` is there twice; name each server once.")

    @property
    def urls(self) -> tuple[str, ...]:
        """The address of every server."""
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url


def server_root(url: str) -> str:
    """An address without ``/v1``."""
    return url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is run in this process.

    Attributes:
        tensor_parallel: GPUs that share one copy of the model.
        gpu_memory: Share of the memory of each that vLLM may take.
        in_flight: Requests handed to vLLM at once; its scheduler decides how many run together.
    """

    tensor_parallel: Annotated[
        int, Option("GPUs that share one copy of the model (vllm engine).", low=1, high=1024)
    ] = 1
    gpu_memory: Annotated[
        float, Option("Share of a GPU's memory that vLLM may take (vllm engine).", above=0, high=1)
    ] = 0.9
    in_flight: int = 512

    def __post_init__(self) -> None:
        check_options(self)
        check_whole("in_flight", self.in_flight)


@dataclass(frozen=True)
class Request:
    """One response to be drawn.

    Attributes:
        prompt: The prompt.
        mode: With or without a trace.
        sample_index: 0 .. samples-1.
        prompt_ids: Token ids of the generation prompt.
        prompt_text: The same, as text, for engines that tokenise themselves.
    """

    prompt: Prompt
    mode: Mode
    sample_index: int
    prompt_ids: tuple[int, ...]
    prompt_text: str

    @property
    def key(self) -> str:
        """Unique name of the draw, as in :attr:`bvpo_stats.records.Completion.key`."""
        return draw_key(self.prompt.prompt_id, self.mode, self.sample_index)


@dataclass(frozen=True)
class Draw:
    """What an engine returns for a request.

    Attributes:
        completion_ids: Token ids, end-of-sequence included where the model wrote it.
        finish_reason: ``stop`` or ``length``.
        sampler_logp: Log-probability of the ids under what drew them, as in `bvpo_stats.records.Completion`.
    """

    completion_ids: tuple[int, ...]
    finish_reason: FinishReason
    sampler_logp: float | None = None


@dataclass(frozen=True)
class SetAside:
    """A request without a usable draw: counted, put on record with its reason, and not asked for again.

    Attributes:
        reason: Short name of the cause, for counting, e.g. ``ids-differ`` or ``refused``.
        detail: What happened, for people.
    """

    reason: str
    detail: str

    def as_row(self, prompt_id: str, mode: Mode, sample_index: int) -> dict[str, Any]:
        """As it is put on record."""
        return {"prompt_id": prompt_id, "mode": mode, "sample_index": sample_index, **asdict(self)}


Outcome = Draw | SetAside
"""What becomes of a request."""


def whole_draw(
    ids: tuple[int, ...], reason: FinishReason, vocabulary: Vocabulary, logps: Sequence[float | None] | None = None
) -> Outcome:
    """A draw of ids that another engine gives, up to its end of sequence.

    Args:
        ids: Token ids.
        reason: Why they end.
        vocabulary: Of the model.
        logps: Log-probability of each under what drew it; None, or fewer or stranger ones, where it is not known.
    """
    if not ids:
        return SetAside("empty", "an empty completion")
    try:
        whole = vocabulary.response(ids, "the answer", "token_ids")
    except UserError as error:
        return SetAside("ids-differ", str(error))
    return Draw(whole, reason, total_logp(logps, len(whole)))


_IMPOSSIBLE = -9_000.0  # servers write -9999 where JSON has no word for minus infinity
_ABOVE = 1e-4  # nats: what rounding makes of a certain token


def total_logp(logps: Sequence[float | None] | None, tokens: int) -> float | None:
    """The log-probability of a response from those of its tokens; None where one of them is missing or is none.

    >>> total_logp([-1.0, -0.5], 2), total_logp([-1.0], 2), total_logp([-1.0, None], 2)
    (-1.5, None, None)
    """
    if logps is None or len(logps) != tokens:
        return None
    found = [x for x in logps if isinstance(x, int | float) and math.isfinite(x) and _IMPOSSIBLE < x <= _ABOVE]
    return min(0.0, math.fsum(found)) if len(found) == tokens else None


def draw_seed(key: str, seed: int) -> int:
    """The seed of one draw, 31 bits: what a server makes of it is up to the server."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()[:4], "little") >> 1


@runtime_checkable
class Engine(Protocol):
    """Whoever draws completions.

    Attributes:
        name: Name for the records.
        whole_batches: Whether a draw's rounding depends on its batch, so that a batch with anything missing is drawn
            whole again after an interruption.
    """

    name: str
    whole_batches: bool

    @property
    def top_k(self) -> int | None:
        """Tokens that a draw is limited to, 0 for none; None where a server may have a default of its own."""
        ...

    def draw(
        self, batches: Iterable[Sequence[Request]], options: SamplingOptions
    ) -> Iterator[list[tuple[Request, Outcome]]]:
        """Draws one completion for each request, and yields groups of them as they are finished.

        Args:
            batches: Requests that may be drawn together; streamed.
            options: How to draw.

        Raises:
            UserError: The engine cannot go on. What was finished has been yielded before.
        """
        ...
