"""The agent's HTTP interface: what each path answers.  Read-only; `openapi` describes it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Optional

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..layout import files, process
from ..reader import Document, HookError
from ..reader.files import MAX_DOCUMENT_BYTES, open_regular
from . import metrics, openapi
from .entry import Entry, checked_at, encoded, etag_of, etag_of_file, file_id
from .feed import Feed
from .guard import HEALTH
from .limits import MAX_WAITING, MAX_WAITING_EACH, Limits, Streams
from .occupied import Occupied
from .representation import answer, failure, file_answer, is_known
from .view import Views

SCHEMA, SCHEMA_VERSION = "sglang-weight-agent", 1

_Handler = Callable[[Request], Awaitable[Response]]

# What drawing raises where a document has not the hook's format.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
_MOST_EVENTS = 10_000
_MOST_STATE_BYTES = 1024 * 1024
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class Presentation(NamedTuple):
    """What is shown as the commands show it; they are above this room, so they are handed in."""

    page: Callable[[Sequence[Document]], str]
    regions: Callable[[Document], dict[str, Any]]
    lookup: Callable[[Document, int], Optional[dict[str, Any]]]  # None: nothing is there


class Refused(Exception):
    """Becomes an answer with a status and a sentence."""

    def __init__(self, status: int, error: str, **headers: str) -> None:
        super().__init__(error)
        self.status, self.error, self.headers = status, error, headers


class Agent:
    """The handlers, and what they share."""

    def __init__(
        self,
        views: Views,
        feed: Feed,
        presentation: Presentation,
        limits: Limits = Limits(),  # noqa: B008  # a constant
        has_token: bool = False,
        registration: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.views, self.feed = views, feed
        self.streams = Streams(limits)
        self._show = presentation
        self._has_token = has_token
        self._registration = registration
        self._occupied = Occupied()
        self._whole = asyncio.Semaphore(1)  # layouts that are read as a whole, one at a time
        self._waiting: Counter[str] = Counter()  # by the client's address
        self._hostname, self._boot_id = socket.gethostname(), process.boot_id()

    def application(self) -> Starlette:
        paths = {
            "/": self.page,
            "/openapi.json": self.description,
            HEALTH: self.health,
            "/slots": self.slots,
            "/slots/{id}": self.slot,
            "/slots/{id}/state": self.state,
            "/slots/{id}/layout": self.layout,
            "/slots/{id}/regions": self.regions,
            "/slots/{id}/history": self.history,
            "/slots/{id}/transport": self.transport,
            "/lookup/{address}": self.lookup,
            "/events": self.events,
            "/metrics": self.metrics,
        }
        routes = [
            Route(path, _asked_as_described(path, handler), methods=["GET"])
            for path, handler in paths.items()
        ]
        # A path is right or wrong; one with another slash at its end is wrong.
        app = Starlette(
            routes=routes,
            exception_handlers={
                HTTPException: _http_failure,
                Refused: _refused,
                HookError: _unreadable,
            },
        )
        app.router.redirect_slashes = False
        return app

    # -- about all slots

    async def health(self, request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def description(self, request: Request) -> Response:
        body = json.dumps(openapi.description(self._has_token)).encode()
        return answer(request, body, etag_of(body))

    async def slots(self, request: Request) -> Response:
        return await anyio.to_thread.run_sync(self._slots, request)

    def _slots(self, request: Request) -> Response:
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "hostname": self._hostname,
            "boot_id": self._boot_id,
            "agent": None if self.feed.identity is None else self.feed.identity._asdict(),
            "directories": [
                {"path": view.directory.path, "problem": view.problem}
                for view in self.views.directories
            ],
            "slots": [_with_check(entry) for entry in self.views.entries()],
        }
        etag = etag_of(encoded(content))
        return answer(request, encoded({**content, "time": time.time()}), etag)

    async def events(self, request: Request) -> Response:
        wanted = request.query_params.get("slot")
        if wanted is not None:
            self._entry(wanted)
        client = request.client.host if request.client else ""
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        refusal = self.streams.take(client)
        if refusal is not None:
            raise Refused(429, refusal, **{"retry-after": "30"})

        async def stream() -> Any:
            async with contextlib.aclosing(
                self.feed.stream(self.views.entries, wanted, request.headers.get("last-event-id"))
            ) as texts:
                async for text in texts:
                    yield text

        return _StreamOfEvents(stream(), lambda: self.streams.give(client))

    async def metrics(self, request: Request) -> Response:
        text = await anyio.to_thread.run_sync(
            metrics.text,
            self.views,
            {"event_streams": float(len(self.streams)), **self._registration()},
        )
        return Response(text, media_type=metrics.MEDIA_TYPE)

    async def page(self, request: Request) -> Response:
        entries = self.views.entries()
        etag = etag_of(b"\0".join([b"page", *(entry.encoded for entry in entries)]))
        if is_known(request, etag):
            return answer(request, b"", etag)
        body = await self._heavy(request, self._page, entries)
        return answer(request, body, etag, "text/html")

    def _page(self, entries: list[Entry]) -> bytes:
        documents = []
        for entry in entries:
            with contextlib.suppress(HookError):
                documents.append(entry.slot.read(0.5))
        if not documents:
            raise Refused(404, "no slot that could be shown is published here; see /slots")
        try:
            return self._show.page(documents).encode()
        except _MALFORMED:
            drawable = [document for document in documents if self._can_draw(document)]
        if not drawable:
            raise HookError("no layout has the hook's format; `verify` says where they have not")
        return self._show.page(drawable).encode()

    def _can_draw(self, document: Document) -> bool:
        try:
            self._show.page([document])
        except _MALFORMED:
            return False
        return True

    async def lookup(self, request: Request) -> Response:
        place = _address(request.path_params["address"])
        wanted = request.query_params.get("slot")
        entries = self.views.entries() if wanted is None else [self._entry(wanted)]
        body = await self._heavy(request, self._lookup, place, entries)
        return answer(request, body, etag_of(body))

    def _lookup(self, place: int, entries: list[Entry]) -> bytes:
        found, problems = [], []
        for entry in entries:
            etag = entry.layout.etag if entry.layout else None
            if self._occupied.excludes(etag, place):
                continue
            try:
                document = entry.slot.read(0.5)
                hit = self._show.lookup(document, place)
                self._occupied.learn(etag, document)
            except HookError as error:
                problems.append({"id": entry.id, "problem": str(error)})
                continue
            if hit is not None:
                found.append({"id": entry.id, "directory": entry.slot.directory, **hit})
        one = {"address": place, "found": bool(found), "slots": found}
        return encoded({"addresses": [one], "problems": problems})

    # -- about one slot

    async def slot(self, request: Request) -> Response:
        body = encoded(await anyio.to_thread.run_sync(_with_check, self._asked(request)))
        return answer(request, body, etag_of(body))

    async def state(self, request: Request) -> Response:
        return await anyio.to_thread.run_sync(
            _published, request, self._asked(request), files.STATE, _MOST_STATE_BYTES
        )

    async def layout(self, request: Request) -> Response:
        return await anyio.to_thread.run_sync(
            _published, request, self._asked(request), files.LAYOUT, MAX_DOCUMENT_BYTES
        )

    async def transport(self, request: Request) -> Response:
        entry = self._asked(request)
        if not self._has_token:
            raise Refused(
                403,
                "what leads to the weights themselves is told only by an agent with a token; start "
                "it with --token-file",
            )
        return await anyio.to_thread.run_sync(
            _published, request, entry, files.TRANSPORT, _MOST_STATE_BYTES
        )

    async def regions(self, request: Request) -> Response:
        entry = self._asked(request)
        etag = etag_of(b"regions" + entry.encoded)
        if is_known(request, etag):
            return answer(request, b"", etag)
        body = await self._heavy(request, self._regions, entry)
        return answer(request, body, etag)

    def _regions(self, entry: Entry) -> bytes:
        return encoded({"id": entry.id, **self._show.regions(entry.slot.read(0.5))})

    async def history(self, request: Request) -> Response:
        entry = self._asked(request)
        since = _number(request, "since")
        limit = _number(request, "limit")
        if limit is not None and not (limit.is_integer() and 1 <= limit <= _MOST_EVENTS):
            raise Refused(400, f"limit is a whole number from 1 to {_MOST_EVENTS}")
        kind = request.query_params.get("kind")
        if kind is not None and len(kind) > 200:
            raise Refused(400, "kind has at most 200 characters")
        most = int(limit) if limit is not None else 1000
        body = await self._heavy(request, _history, entry, since, kind, most)
        return answer(request, body, etag_of(body))

    # -- shared

    def _asked(self, request: Request) -> Entry:
        return self._entry(request.path_params["id"])

    def _entry(self, id: str) -> Entry:
        """Only slots that were found have files: no part of a path comes from a client."""
        entry = self.views.entry(id)
        if entry is None:
            raise Refused(404, "there is no such slot; /slots lists all")
        return entry

    async def _heavy(self, request: Request, work: Callable[..., bytes], *arguments: Any) -> bytes:
        """Work that takes memory and time: one at a time, and few may wait, fewer of one client."""
        client = request.client.host if request.client else ""
        if self._waiting.total() >= MAX_WAITING:
            raise Refused(429, "the agent is busy; ask again later", **{"retry-after": "5"})
        if self._waiting[client] >= MAX_WAITING_EACH:
            raise Refused(
                429,
                f"{MAX_WAITING_EACH} requests of your address wait already; ask again when they "
                f"are answered",
                **{"retry-after": "5"},
            )
        self._waiting[client] += 1
        try:
            async with self._whole:
                if self.feed.is_closed or await request.is_disconnected():
                    raise Refused(503, "the agent is ending, or nobody waits for this any more")
                return await anyio.to_thread.run_sync(work, *arguments)
        finally:
            self._waiting[client] -= 1
            if self._waiting[client] <= 0:
                del self._waiting[client]


class _StreamOfEvents(StreamingResponse):
    """Counts itself out however it ends."""

    def __init__(self, content: Any, ended: Callable[[], None]) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


def _published(request: Request, entry: Entry, name: str, limit: int) -> Response:
    """A published file's own bytes."""
    path = entry.slot.path(name)
    try:
        descriptor = open_regular(path, limit=limit)
    except HookError as error:
        if name == files.TRANSPORT and isinstance(error.__cause__, PermissionError):
            raise HookError(
                f"{os.path.basename(path)} is for its server's user alone (mode 0600), and this "
                f"agent runs as user {os.geteuid()}; run an agent as the server's user, or the "
                f"transfer on the server's host"
            ) from error
        raise
    if descriptor is None:
        raise Refused(404, f"slot {entry.id} has no {os.path.basename(path)} now")
    try:
        found = file_id(descriptor)
        if name == files.LAYOUT and entry.layout is not None and entry.layout.file == found:
            etag = entry.layout.etag
        else:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                etag = etag_of_file(file)
        return file_answer(request, descriptor, found[2], etag)
    except BaseException:
        os.close(descriptor)
        raise


def _history(entry: Entry, since: Optional[float], kind: Optional[str], most: int) -> bytes:
    try:
        events = deque(entry.slot.history(since, kind), maxlen=most)
    except HookError:
        if os.path.lexists(entry.slot.path(files.EVENTS)):
            raise
        events = deque()
    return encoded({"events": [{**event.raw, "slot": event.slot} for event in events]})


def _with_check(entry: Entry) -> dict[str, Any]:
    return {**entry.content, "checked_at": checked_at(entry)}


def _address(text: str) -> int:
    if re.fullmatch(openapi.ADDRESS, text) is None:
        raise Refused(400, "this is no address; give 0x... or a decimal number below 10**19")
    return int(text, 16 if text[:2].lower() == "0x" else 10)


def _number(request: Request, name: str) -> Optional[float]:
    """A number as JSON writes them, from 0 on."""
    text = request.query_params.get(name)
    if text is None:
        return None
    if len(text) <= 40 and _NUMBER.fullmatch(text):
        value = float(text)
        if 0 <= value < openapi.LATEST:
            return value
    raise Refused(400, f"{name} is a number from 0 on")


def _asked_as_described(path: str, handler: _Handler) -> _Handler:
    """A misspelt filter would be answered as if it were none, so it is refused."""
    known = openapi.query_parameters(path)

    async def handle(request: Request) -> Response:
        given = Counter(name for name, _ in request.query_params.multi_items())
        for name, count in given.items():
            if name not in known:
                has = f"has {', '.join(known)}" if known else "has none"
                raise Refused(400, f"no query parameter {name[:100]!r}: {path} {has}")
            if count > 1:
                raise Refused(400, f"{name} is given {count} times")
        return await handler(request)

    return handle


async def _http_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return failure(405, "this agent only answers GET and HEAD", allow="GET, HEAD")
    if error.status_code == 404:
        return failure(404, "there is no such path; /openapi.json describes all")
    return failure(error.status_code, str(error.detail))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return failure(error.status, error.error, **error.headers)


async def _unreadable(request: Request, error: Exception) -> Response:
    return failure(503, str(error))
