"""An HTTP server that says what a test has it say: what no agent would."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Optional, Union

STATE: dict[str, Any] = {
    "schema": "sglang-weight-state",
    "schema_version": 1,
    "state": "ready",
    "layout_generation": 1,
    "content_generation": 1,
    "pid": 1,
    "process_start_ticks": 2,
    "boot_id": "b",
    "instance": "i",
}


def an_entry(id: object = "0", **changes: Any) -> dict[str, Any]:
    """A slot as an agent lists it."""
    return {
        "id": id,
        "slot": id,
        "directory": "/maps",
        "owner_alive": True,
        "certain": True,
        "why": "its lock is held, and its process runs",
        "problem": None,
        "state": STATE,
        "summary": {},
        "layout": None,
        "checked_at": None,
        **changes,
    }


def a_listing(*slots: Any, **changes: Any) -> dict[str, Any]:
    return {
        "schema": "sglang-weight-agent",
        "schema_version": 1,
        "hostname": "node1",
        "boot_id": "b",
        "agent": {"id": "a", "node": "node1"},
        "time": 1.0,
        "directories": [{"path": "/maps", "problem": None}],
        "slots": list(slots),
        **changes,
    }


class Reply(NamedTuple):
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = {}
    pause: float = 0.0  # seconds before each byte
    cut: Optional[int] = None  # only so many bytes of the length that is told


Told = Union[Reply, bytes, Mapping[str, Any]]


class Server:
    """``said``: what is answered, by path."""

    def __init__(self, said: Mapping[str, Told]) -> None:
        self.said = dict(said)
        self.identity: Optional[str] = "a/node1"  # of the agent that is played, in each answer
        self.asked: list[tuple[str, dict[str, str]]] = []  # paths, and headers in lower case
        self.ended = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append((self.path, headers))
                with contextlib.suppress(OSError):
                    server.answer(self, self.path)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def answer(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        found = self.said.get(path.partition("?")[0])
        if found is None:
            found = Reply(b'{"error": "no such path"}', 404)
        if isinstance(found, Mapping):
            found = json.dumps(found).encode()
        reply = Reply(found) if isinstance(found, bytes) else found
        handler.send_response(reply.status)
        told = {} if self.identity is None else {"Sglang-Weight-Agent": self.identity}
        told["Content-Length"] = str(len(reply.body))
        for name, value in {**told, **reply.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if reply.cut is not None:
            handler.close_connection = True
        for piece in self._pieces(reply):
            handler.wfile.write(piece)
            handler.wfile.flush()

    def _pieces(self, reply: Reply) -> Iterator[bytes]:
        body = reply.body if reply.cut is None else reply.body[: reply.cut]
        if not reply.pause:
            yield body
            return
        for at in range(len(body)):
            if self.ended.wait(reply.pause):
                return
            yield body[at : at + 1]

    def close(self) -> None:
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class Stopwatch:
    """How long a block took, in seconds."""

    def __enter__(self) -> Stopwatch:
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started
