"""Runs the agent: its socket, its threads, its end."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Optional

import uvicorn

from ..reader import Directory, HookError
from .application import Agent, Presentation
from .entry import Entry
from .feed import Feed
from .guard import Guard
from .limits import (
    END_SECONDS,
    KEEP_ALIVE_SECONDS,
    MAX_HEADER,
    REQUEST_SECONDS,
    AcceptErrors,
    LimitedProtocol,
    Limits,
    Listener,
    allow_files,
)
from .registration import Registration
from .view import Views

_BACKLOG = 128


class Tls(NamedTuple):
    certificate: str  # a PEM file, with the chain
    key: Optional[str] = None
    key_password: Optional[str] = None
    clients: Optional[str] = None  # authorities of client certificates, which are asked for then


class Settings(NamedTuple):
    """What `serve` was asked for."""

    directories: Sequence[Directory]
    host: str = "127.0.0.1"
    port: int = 0
    token: Optional[str] = None
    tls: Optional[Tls] = None
    limits: Limits = Limits()
    hosts: Collection[str] = ()  # further names under which it may be asked for


def listen(host: str, port: int, limits: Limits = Limits()) -> socket.socket:  # noqa: B008
    """A socket there.  Raises HookError."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = Listener(family, kind, protocol)
        made.limits = limits
    except OSError as error:
        raise HookError(f"{host}:{port} cannot be listened on ({error.strerror})") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise HookError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another --host or "
            f"--port"
        ) from error
    return made


class _Server(uvicorn.Server):
    """uvicorn's, which ends event streams when it is to end, and then without a signal."""

    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self._feed = feed

    async def startup(self, sockets: Optional[list[socket.socket]] = None) -> None:
        """uvicorn has no option for how long a TLS handshake may take, and asyncio's is 60 s."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(AcceptErrors())
        if self.config.ssl is not None:
            bounded = functools.partial(loop.create_server, ssl_handshake_timeout=REQUEST_SECONDS)
            loop.create_server = bounded  # type: ignore[method-assign]
        await super().startup(sockets)

    async def shutdown(self, sockets: Optional[list[socket.socket]] = None) -> None:
        self._feed.close()
        # What is cut off now is no error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        # What was asked for by a signal is done by ending: status 0.
        self._captured_signals.clear()


def run(
    settings: Settings,
    made: socket.socket,
    presentation: Presentation,
    registration: Optional[Registration] = None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT.  ``started`` is called when requests are answered."""
    allow_files(settings.limits)
    # Before uvicorn has its own handlers: an early signal is an end, not a traceback.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_at_once)
    asyncio.run(serve(settings, made, presentation, registration, started))


async def serve(
    settings: Settings,
    made: socket.socket,
    presentation: Presentation,
    registration: Optional[Registration],
    started: Callable[[], None],
) -> None:
    """`run` in an event loop that others may run in, too; leaves their signals alone."""
    loop = asyncio.get_running_loop()
    feed = Feed(identity=None if registration is None else registration.identity)

    def tell(entry: Optional[Entry], id: str) -> None:
        loop.call_soon_threadsafe(feed.publish, entry, id)

    views = Views(settings.directories, [tell])
    if registration is not None:
        views.told.insert(0, registration.told)
        registration.not_looked_at = views.not_looked_at
    agent = Agent(
        views,
        feed,
        presentation,
        settings.limits,
        settings.token is not None,
        dict if registration is None else registration.figures,
    )
    guard = Guard(agent.application(), settings.token, settings.hosts, feed.identity)
    server = _Server(_config(settings, guard), feed)
    await asyncio.to_thread(views.start)
    if registration is not None:
        registration.start()
    try:
        loop.call_soon(started)
        await server.serve(sockets=[made])
    finally:
        views.stop()
        if registration is not None:
            await asyncio.to_thread(registration.stop)


def _config(settings: Settings, app: Any) -> uvicorn.Config:
    protocol = type("Protocol", (LimitedProtocol,), {"limits": settings.limits})
    tls: dict[str, Any] = {}
    if settings.tls is not None:
        tls = {
            "ssl_certfile": settings.tls.certificate,
            "ssl_keyfile": settings.tls.key,
            "ssl_keyfile_password": settings.tls.key_password,
            "ssl_ca_certs": settings.tls.clients,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if settings.tls.clients else ssl.CERT_NONE,
        }
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=END_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER,
        **tls,
    )
    try:
        config.load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise HookError(
            f"the certificate, its key or the authorities cannot be used ({error}); give PEM files"
        ) from error
    # Somebody's broken request is no news.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return config


def _end_at_once(number: int, frame: Any) -> None:
    sys.exit(0)
