"""What slow and greedy clients get, and what all the others get meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import documents_by_hand
import pytest
from agent_process import Agent, Stream, eventually

Serve = Callable[..., Agent]

MIB = 1024 * 1024
# Times that are long enough for a slow machine, and short enough for a test.
SHORT = "from sglang_weight_hook.fleet import limits; limits.REQUEST_SECONDS = 1.5;"
SHORT += "limits.STALLED_SECONDS = 1.5; limits.END_SECONDS = 1"


def a_slot(folder: Path, mib: int) -> Path:
    """A slot with a layout of so many MiB, nearly all of them in one text."""
    folder.mkdir()
    (folder / "weight_state_0.json").write_text(documents_by_hand.STATE)
    padding = '"padding": "' + "x" * (mib * MIB) + '"}'
    layout = documents_by_hand.LAYOUT.replace('"more": [true, null, -1.5e3]}', padding)
    assert len(layout) > mib * MIB
    (folder / "weight_layout_0.json").write_text(layout)
    return folder


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    return a_slot(tmp_path / "maps", 64)


@pytest.fixture
def agent(serve: Serve, maps: Path) -> Iterator[Agent]:
    made = serve(before=SHORT)
    yield made
    if made.process.poll() is None:
        assert made.ask("/healthz").status == 200
    assert made.end() == 0
    assert made.said() == ""


def connected(agent: Agent, data: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", agent.port), 20)
    made.sendall(data)
    return made


def ended_within(made: socket.socket, seconds: float) -> float:
    """How long the other side bore it."""
    began = time.monotonic()
    made.settimeout(seconds)
    try:
        while made.recv(65536):
            pass
    except ConnectionError:
        pass
    made.close()
    return time.monotonic() - began


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /slots HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /slots HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nx",
    ],
    ids=["silent", "half a head", "half a body"],
)
def test_a_request_that_does_not_come_is_not_waited_for(agent: Agent, beginning: bytes) -> None:
    assert ended_within(connected(agent, beginning), 20) < 15


def test_a_request_that_comes_a_byte_at_a_time_gets_no_more_time(agent: Agent) -> None:
    made = connected(agent, b"GET /slots HTTP/1.1\r\nX: ")
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < began + 20:
            made.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() - began < 15
    made.close()


def test_a_client_that_reads_no_more_is_dropped_and_holds_no_layout_in_memory(
    agent: Agent,
) -> None:
    agent.ask("/slots/0")
    before = agent.memory()
    ask = b"GET /slots/0/layout HTTP/1.1\r\nHost: localhost\r\n\r\n"
    clients = []
    for _ in range(8):
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.connect(("127.0.0.1", agent.port))
        made.sendall(ask)
        clients.append(made)
    grown = 0
    began = time.monotonic()
    while time.monotonic() < began + 1:
        grown = max(grown, agent.memory() - before)
        assert agent.ask("/healthz").status == 200  # the others are answered meanwhile
    assert grown < 64 * MIB  # one layout, of the eight asked for
    time.sleep(3)
    for made in clients:
        received = 0
        made.settimeout(10)
        try:
            while data := made.recv(MIB):
                received += len(data)
        except ConnectionError:
            pass
        made.close()
        assert received < 64 * MIB
    # All descriptors of the layout are given back.
    files = Path(f"/proc/{agent.process.pid}/fd")
    eventually(lambda: not [f for f in files.iterdir() if "layout" in str(f.resolve(strict=False))])


def test_a_layout_is_sent_without_being_held(agent: Agent) -> None:
    agent.ask("/slots/0")
    before = agent.memory()
    most = 0
    for coding in ("identity", "gzip"):
        connection = agent.connect()
        connection.request("GET", "/slots/0/layout", headers={"Accept-Encoding": coding})
        response = connection.getresponse()
        while response.read(MIB):
            most = max(most, agent.memory() - before)
        connection.close()
    assert most < 32 * MIB


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000,
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"no such thing\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nzzz\r\n",
    ],
)
def test_what_is_no_request_is_refused_and_closed(agent: Agent, beginning: bytes) -> None:
    made = connected(agent)
    answer = b""
    try:
        made.sendall(beginning)
        while data := made.recv(65536):
            answer += data
    except ConnectionError:
        pass
    made.close()
    assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431", b"HTTP/1.1 404")
    if answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")):
        assert b'{"error": ' in answer


def test_too_many_connections_are_refused_and_the_first_ones_served(
    serve: Serve, maps: Path
) -> None:
    agent = serve("--max-connections", 8)
    kept = agent.connect()
    kept.connect()
    others = [connected(agent) for _ in range(20)]
    refused = 0
    for made in others[7:]:
        made.settimeout(20)
        refused += made.recv(1000).startswith(b"HTTP/1.1 503")
    assert refused == 13
    kept.request("GET", "/healthz")
    assert kept.getresponse().status == 200
    for made in others:
        made.close()
    kept.close()
    eventually(lambda: agent.ask("/healthz").status == 200)
    assert agent.end() == 0


def test_too_many_event_streams_are_refused_until_one_is_closed(serve: Serve, maps: Path) -> None:
    agent = serve("--max-streams", 2)
    streams = [agent.events(), agent.events()]
    refusal = agent.ask("/events")
    assert (refusal.status, refusal.headers["retry-after"]) == (429, "30")
    assert "2 event streams" in refusal.json["error"]
    streams[0].close()

    def another() -> Stream | None:
        made = agent.events()
        if made.status == 200:
            return made
        made.close()
        return None

    again = eventually(another)
    for stream in (streams[1], again):
        stream.close()


def test_who_asks_for_much_at_once_waits_or_is_sent_away_and_nobody_else(
    serve: Serve, tmp_path: Path
) -> None:
    agent = serve("--dir", a_slot(tmp_path / "smaller", 8))
    statuses: list[int] = []

    def ask() -> None:
        connection = agent.connect(120)
        connection.request("GET", "/slots/0/regions")
        statuses.append(connection.getresponse().status)
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        began = time.monotonic()
        assert agent.ask("/healthz").status == 200
        slowest = max(slowest, time.monotonic() - began)
    assert len(statuses) == 60
    assert set(statuses) == {200, 429}
    assert slowest < 10


def test_work_under_way_is_cut_off_when_the_agent_ends(agent: Agent) -> None:
    connections = [agent.connect() for _ in range(4)]
    for connection in connections:
        connection.request("GET", "/slots/0/regions")
    assert agent.ask("/healthz").status == 200
    assert agent.end() == 0
    assert agent.said() == ""
    for connection in connections:
        connection.close()
