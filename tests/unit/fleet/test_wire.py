"""One host that is asked over HTTP: which one is this machine, and how a stream is ended."""

from __future__ import annotations

import threading

import pytest
from hostile_server import Reply, Server

from sglang_weight_hook import HookError, open_directory
from sglang_weight_hook.fleet.access import Access, TokenInClear
from sglang_weight_hook.fleet.etcd import Etcd
from sglang_weight_hook.fleet.remote_agent import RemoteAgent
from sglang_weight_hook.fleet.wire import Peer, Stop


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("localhost.evil.example", False),
        ("127.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("[::1234]", False),
        ("10.0.0.1", False),
    ],
)
def test_only_an_address_of_this_machine_is_taken_for_one(host: str, is_here: bool) -> None:
    assert Peer(f"http://{host}:1", Access()).is_loopback is is_here


def test_a_token_is_not_sent_in_clear_to_a_name_that_begins_like_this_machines() -> None:
    access = Access(token="secret-of-agents")
    named = RemoteAgent("http://127.evil.example:1", access, is_named_by_registry=True)
    assert named._authorization() == {}
    with pytest.warns(TokenInClear):
        RemoteAgent("http://localhost.evil.example:1", access)


def test_a_stream_that_ends_with_its_connection_is_ended_from_another_thread() -> None:
    body = b"event: state\n" * 50
    reply = Reply(body, 200, {"Content-Length": "", "Connection": "close"}, 0.05)
    server = Server({"/events": reply})
    stop = Stop()
    try:
        peer = Peer(server.url, Access())
        with peer.stream("/events", 5, 5, {}, None, stop) as (status, lines):
            assert status == 200
            assert next(lines) == b"event: state\n"
            ending = threading.Timer(0.1, stop.set)
            ending.start()
            assert len(list(lines)) < 10
            ending.join()
    finally:
        server.close()


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret-of-mine@node:7411",
        "https://me:a#secret-of-mine@node",
        "etcd://me:secret-of-mine,more@node:2379,other",
    ],
)
def test_what_is_secret_in_a_url_is_not_printed_back(url: str) -> None:
    for asked in (open_directory, lambda url: Peer(url, Access()), lambda url: Etcd([url])):
        with pytest.raises(HookError) as caught:
            asked(url)
        assert "secret" not in str(caught.value)


def test_serve_prints_no_secret_of_a_url_back(capsys: pytest.CaptureFixture[str]) -> None:
    serve = pytest.importorskip("sglang_weight_hook.commands.serve")
    with pytest.raises(serve.Misused) as caught:
        serve._host_of("https://me:secret-of-mine@node:7411")
    assert "secret" not in str(caught.value)
    with pytest.raises(HookError):
        serve._etcd(["http://me:secret-of-mine@node:1"], "u", __file__, None, None, None)
    assert "secret" not in capsys.readouterr().err
    (option,) = serve._Dirs.__metadata__
    assert "://" not in option.help
