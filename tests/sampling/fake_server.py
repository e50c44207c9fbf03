"""A server on loopback that answers as a script tells it, faults included."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server sends back.

    Attributes:
        status: HTTP status.
        body: JSON-ready object, or raw bytes.
        headers: Further headers.
        cut: Send only this many bytes of the body, then drop the connection.
        wait: Seconds before answering; ends at once when the server closes.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    wait: float = 0.0


@dataclass
class Call:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class FakeServer:
    """Handle on a running server.

    Attributes:
        url: Its base URL.
        calls: Every POST so far, in order of arrival.
        most_at_once: Most POSTs whose replies were being made up (by the script) at the same moment.
    """

    url: str
    calls: list[Call] = field(default_factory=list)
    most_at_once: int = 0


Script = Callable[[Call, int], Reply]
"""From a POST and its number (from 0) to the reply."""


@contextmanager
def serve(script: Script, models: Reply | None = None, port: int = 0) -> Iterator[FakeServer]:
    """Runs a server for the time of the block; on a free port, unless one is given."""
    closing = threading.Event()
    lock = threading.Lock()
    listed = models or Reply(body={"data": [{"id": "toy"}]})

    class Handler(BaseHTTPRequestHandler):
        active = 0

        def do_GET(self) -> None:
            self._send(listed if self.path == "/v1/models" else Reply(404, {"error": "no such page"}))

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            call = Call("POST", self.path, dict(self.headers), json.loads(raw))
            with lock:
                number = len(state.calls)
                state.calls.append(call)
                Handler.active += 1
                state.most_at_once = max(state.most_at_once, Handler.active)
            try:
                reply = script(call, number)
            finally:  # before the reply goes out: a client may send its next request the moment it has read this one
                with lock:
                    Handler.active -= 1
            self._send(reply)

        def _send(self, reply: Reply) -> None:
            if reply.wait:
                closing.wait(reply.wait)
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: reply.cut])
            except OSError:
                pass  # the client has left

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    state = FakeServer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: str, **fields: Any) -> Reply:
    """A well-formed answer of ``/v1/completions``."""
    usage = {name: fields.pop(name) for name in ("prompt_tokens", "completion_tokens") if name in fields}
    choice = {"index": 0, "text": text, "finish_reason": "stop", **fields}
    return Reply(body={"object": "text_completion", "choices": [choice], "usage": usage})


def chat(text: str | None, **fields: Any) -> Reply:
    """A well-formed answer of ``/v1/chat/completions``."""
    usage = {name: fields.pop(name) for name in ("prompt_tokens", "completion_tokens") if name in fields}
    message = {"role": "assistant", "content": text, **fields}
    return Reply(body={"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})
