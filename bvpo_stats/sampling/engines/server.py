"""JSON over HTTP to a server that may be slow, busy, broken or gone: time limits, retries, back-off.

The standard library's client is enough here, one connection a request: a response takes seconds to write, a connection
less than a millisecond to open.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from email.utils import parsedate_to_datetime
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.progress import say
from bvpo_stats.sampling.engines.base import ServerOptions as ServerOptions
from bvpo_stats.sampling.engines.base import server_root

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 300.0
_SAID = 3  # tries of a request after which it is said that a server does not answer
_JITTER = random.Random()  # of its own: waiting must not touch any seeded stream
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


NO_SUCH_PATH = (404, 405, 501)
"""Answers of a server that does not have what it was asked for: an endpoint, a model."""


class RefusedError(Exception):
    """The server understood and said no: the same request would be refused again.

    Attributes:
        status: HTTP status.
        message: The server's own words.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}")
        self.status = status
        self.message = message


class UnreachableError(UserError):
    """A server that does not answer, after all tries."""


class _PassingError(Exception):
    """A failure that another try may mend."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would turn a POST into a GET, and take the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Server:
    """A client that may be used by several threads.

    Args:
        options: How to treat it.
        url: Its address; None for the first of the options.

    Raises:
        UserError: The variable named by ``api_key_env`` is not set.
    """

    def __init__(self, options: ServerOptions, url: str | None = None) -> None:
        self.options = options
        self.url = options.urls[0] if url is None else url
        self._waiting = False
        self._stopped = threading.Event()
        self._key: str | None = None
        if options.api_key_env is not None:
            self._key = os.environ.get(options.api_key_env)
            if not self._key:
                raise UserError(f"`api_key_env={options.api_key_env!r}`: this environment variable is not set.")
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if urllib.parse.urlsplit(self.url).hostname in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's own servers
        self._opener = urllib.request.build_opener(*handlers)

    def stop(self) -> None:
        """Ends all waiting between tries; requests in flight finish, and are not repeated."""
        self._stopped.set()

    def get(self, path: str) -> Any:
        """The JSON answer to a GET; see :meth:`post`. An internal error (500) is final here: no work was asked for."""
        return self._retry("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to a POST.

        Raises:
            RefusedError: The server says no (4xx other than a time-out or too many requests).
            UserError: It cannot be reached, stays busy, or does not answer properly, after all retries.
        """
        return self._retry("POST", path, json.dumps(body, allow_nan=False).encode())

    def _retry(self, method: str, path: str, data: bytes | None) -> Any:
        tries = self.options.retries + 1
        for attempt in range(tries):
            try:
                answer = self._once(method, path, data)
            except _PassingError as error:
                reason, asked = str(error), error.wait
            else:
                self._waiting = False
                return answer
            if attempt + 1 == tries or self._stopped.is_set():
                break
            if attempt + 1 == _SAID and not self._waiting:  # once for all requests that wait
                self._waiting = True
                say(f"The server at {self.url} {self._hide(reason)}; trying again, {tries} times in all.")
            growing = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * _JITTER.uniform(0.75, 1.25)
            if self._stopped.wait(growing if asked is None else max(0.0, min(asked, _LONGEST_RETRY_AFTER))):
                break
        raise UnreachableError(
            f"The server at {self.url} {self._hide(reason)} (tried {attempt + 1} times). Check it, then "
            "run the same command again: it goes on where it stopped."
        )

    def _once(self, method: str, path: str, data: bytes | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "bvpo-stats"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(server_root(self.url) + path, data=data, headers=headers, method=method)
        deadline = time.monotonic() + self.options.timeout
        try:
            with self._opener.open(request, timeout=self.options.timeout) as response:
                body = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._http_error(error, final=data is None and error.code == 500) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UserError(f"The certificate of {self.url} is not valid: {error.reason}.") from error
            raise _PassingError(_reason(error.reason, self.options.timeout)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(_reason(error, self.options.timeout)) from error
        try:
            return json.loads(body)
        except ValueError as error:
            raise _PassingError("gave an answer that is cut off or not JSON") from error

    def _http_error(self, error: urllib.error.HTTPError, *, final: bool) -> Exception:
        try:
            message = _server_words(error.read(65_536))
        except (OSError, http.client.HTTPException):
            message = ""
        message = self._hide(message or str(error.reason))
        if error.code in _BUSY and not final:
            return _PassingError(f"answers {error.code} ({message})", _retry_after(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            hint = "Check the key" if self._key else "Name the variable that holds the key with `api_key_env`"
            return UserError(f"The server at {self.url} answers {error.code} ({message}). {hint}.")
        if 300 <= error.code < 400:
            where = error.headers.get("Location", "elsewhere")
            return UserError(f"The server at {self.url} redirects to {where}. Give that as `base_url`.")
        return RefusedError(error.code, message)

    def _hide(self, text: str) -> str:
        """Servers may repeat the key in their messages; ours never do."""
        return text.replace(self._key, "***") if self._key else text


class Servers:
    """Several servers of one model: each request goes to the one with the fewest in flight.

    One that fails for good is left out, and said; what it was asked is asked of the others.

    Args:
        options: Where they are.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.all = [Server(options, url) for url in options.urls]
        self._in_flight = dict.fromkeys(self.all, 0)
        self._lock = threading.Lock()
        self._stopped = False

    @property
    def left(self) -> list[Server]:
        """Those that have not been left out."""
        return list(self._in_flight)

    def stop(self) -> None:
        """As :meth:`Server.stop`, for all of them."""
        self._stopped = True
        for server in self.all:
            server.stop()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """As :meth:`Server.post`, by the server with the fewest requests in flight.

        Raises:
            RefusedError: The server says no.
            UserError: The last server fails for good.
        """
        while True:
            with self._lock:
                server = min(self._in_flight, key=self._in_flight.__getitem__)
                self._in_flight[server] += 1
            try:
                return server.post(path, body)
            except UserError as error:
                self.leave_out(server, str(error))
            except RefusedError as error:
                if error.status not in NO_SUCH_PATH:
                    raise
                self.leave_out(server, f"The server at {server.url} answers {error}.")  # another model, after a restart
            finally:
                with self._lock:
                    if server in self._in_flight:
                        self._in_flight[server] -= 1

    def leave_out(self, server: Server, reason: str) -> None:
        """Asks a server nothing more.

        Raises:
            UserError: It is the last one, or the run is being stopped.
        """
        with self._lock:
            if self._stopped or self.left == [server]:
                raise UserError(reason)
            if self._in_flight.pop(server, None) is None:
                return  # another request has met the same
            others = len(self.left)
        say(f"{reason.partition(' (tried')[0].rstrip('.')}: left out; {others} of {len(self.all)} servers go on.")


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body; the limit holds for a server that sends a byte now and then, too."""
    promised = response.headers.get("Content-Length")
    parts: list[bytes] = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    body = b"".join(parts)
    if promised is not None and promised.isdigit() and len(body) < int(promised):
        raise http.client.IncompleteRead(body, int(promised) - len(body))
    return body


def _reason(error: object, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"did not answer within {timeout:g} s (`timeout`)"
    if isinstance(error, ConnectionRefusedError):
        return "refuses the connection; is it running?"
    if isinstance(error, http.client.IncompleteRead):
        return "cut its answer short"
    if isinstance(error, (ConnectionError, http.client.HTTPException)):
        return "dropped the connection"
    return f"cannot be reached: {getattr(error, 'strerror', None) or error}"


def _server_words(body: bytes) -> str:
    """The message inside an error answer, one short line of it."""
    text = body.decode("utf-8", errors="replace")
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = text
    while isinstance(found, dict):
        found = next((found[name] for name in ("error", "message", "detail") if found.get(name)), str(found))
    return " ".join(str(found).split())[:300]


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number of seconds or a date."""
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return None
