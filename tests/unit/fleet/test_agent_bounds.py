"""What the agent's parts do where files run out, a directory hangs, or one client asks for much."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import ssl
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from sglang_weight_hook.fleet import application
from sglang_weight_hook.fleet import limits as module
from sglang_weight_hook.fleet import view as view_module
from sglang_weight_hook.fleet.application import Agent as Application
from sglang_weight_hook.fleet.application import Presentation, Refused
from sglang_weight_hook.fleet.entry import Entry
from sglang_weight_hook.fleet.feed import Feed
from sglang_weight_hook.fleet.limits import AcceptErrors, Limits, allow_files
from sglang_weight_hook.fleet.server import listen
from sglang_weight_hook.fleet.view import Views
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import Directory, HookError, Slot


def an_entry(id: str = "0") -> Entry:
    content = {"id": id, "owner_alive": True, "state": {"state": "ready"}, "problem": None}
    return Entry(Slot("/maps", id), None, content, b"{}")


class Unreadable(Directory):
    """A directory whose look fails in the way that a test says."""

    number = errno.EMFILE

    def _names(self) -> list[str]:
        try:
            raise OSError(self.number, "as told")
        except OSError as error:
            raise HookError("/maps: as told") from error


def views_of(directory: Directory) -> tuple[Views, list[tuple[Entry | None, str]]]:
    told: list[tuple[Entry | None, str]] = []
    views = Views([directory], [lambda entry, id: told.append((entry, id))])
    views.directories[0].entries = {"0": an_entry()}
    return views, told


def test_a_directory_that_cannot_be_read_now_is_not_an_empty_one() -> None:
    directory = Unreadable("/maps")
    views, told = views_of(directory)
    assert not views.directories[0]._sweep()
    [(entry, id)] = told
    assert (entry and entry.content["problem"], id) == ("/maps: as told", "0")
    assert [one.id for one in views.entries()] == ["0"]
    directory.number = errno.ENOENT
    assert views.directories[0]._sweep()
    assert told[1:] == [(None, "0")]


def test_of_a_directory_that_hangs_the_slots_are_told_apart() -> None:
    views, _ = views_of(Unreadable("/maps"))
    assert views.not_looked_at(1) == set()
    views.directories[0].looked_at -= 2 * view_module.ROUND + view_module.PAUSE + 1
    assert views.not_looked_at(1) == {"0"}
    assert views.not_looked_at(60) == set()


def test_a_connection_counts_from_the_moment_at_which_it_is_let_in() -> None:
    with listen("127.0.0.1", 0, Limits(1)) as made:
        most = Limits(1).accepted_each
        clients = [socket.create_connection(made.getsockname()) for _ in range(most + 1)]
        accepted = [made.accept()[0] for _ in range(most)]
        with pytest.raises(ConnectionAbortedError):
            made.accept()
        accepted.pop().close()
        clients.append(socket.create_connection(made.getsockname()))
        accepted.append(made.accept()[0])
        for one in (*clients, *accepted):
            one.close()
        assert not made.open  # type: ignore[attr-defined]


def test_files_are_allowed_for_the_connections_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 5000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: allowed.append(both))
    allow_files(Limits())
    assert allowed == [(Limits().accepted + 256, 5000)]
    with pytest.raises(HookError, match="--max-connections"):
        allow_files(Limits(5000))


def test_that_files_have_run_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    others: list[Any] = []
    loop: Any = SimpleNamespace(default_exception_handler=others.append)
    handler = AcceptErrors()
    for _ in range(1000):
        handler(loop, {"message": "socket.accept() out of system resource", "exception": "x"})
    handler(loop, {"message": "another"})
    assert len(caplog.records) == 1
    assert others == [{"message": "another"}]


def test_a_tls_handshake_has_as_long_as_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_weight_hook.fleet.server import _Server

    given: dict[str, Any] = {}

    async def create_server(*_: Any, **options: Any) -> None:
        given.update(options)

    async def startup(*_: Any) -> None:
        await asyncio.get_running_loop().create_server(None)  # type: ignore[call-overload]

    async def start() -> None:
        asyncio.get_running_loop().create_server = create_server  # type: ignore
        config = uvicorn.Config(None)  # type: ignore[arg-type]
        config.ssl = ssl.create_default_context()
        await _Server(config, Feed()).startup()

    monkeypatch.setattr("uvicorn.Server.startup", startup)
    asyncio.run(start())
    assert given["ssl_handshake_timeout"] == module.REQUEST_SECONDS


def test_one_client_has_a_share_of_the_places_in_which_to_wait() -> None:
    async def ask() -> None:
        agent = Application(Views([]), Feed(), Presentation(*[lambda *_: b""] * 3))  # type: ignore
        await agent._whole.acquire()

        async def asking(host: str) -> bytes:
            request: Any = SimpleNamespace(client=SimpleNamespace(host=host))
            request.is_disconnected = lambda: asyncio.sleep(0, False)
            return await agent._heavy(request, lambda: b"done")

        waiting = [asyncio.ensure_future(asking("one")) for _ in range(module.MAX_WAITING_EACH)]
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="of your address"):
            await asking("one")
        waiting.append(asyncio.ensure_future(asking("another")))
        await asyncio.sleep(0)
        agent._whole.release()
        assert await asyncio.gather(*waiting) == [b"done"] * len(waiting)
        assert not agent._waiting

    asyncio.run(ask())


def test_a_transport_that_is_another_users_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(path: str, limit: int) -> None:
        try:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        except OSError as error:
            raise HookError(f"{path} cannot be read") from error

    monkeypatch.setattr(application, "open_regular", closed)
    with pytest.raises(HookError, match=r"mode 0600.*run an agent as the server's user"):
        application._published(None, an_entry(), files.TRANSPORT, 1)  # type: ignore[arg-type]
    with pytest.raises(HookError, match="cannot be read"):
        application._published(None, an_entry(), files.STATE, 1)  # type: ignore[arg-type]
