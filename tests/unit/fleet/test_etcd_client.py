"""The client of etcd's JSON gateway, against a real etcd."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from etcd_process import EtcdServer, a_certificate, answered, free_port, with_users

from sglang_weight_hook.fleet.etcd import (
    PREFIX,
    Change,
    Etcd,
    EtcdError,
    EtcdUnreachable,
    LeaseGone,
    WatchEnded,
    tls_context,
)


@pytest.fixture
def client(etcd: EtcdServer) -> Etcd:
    return Etcd([etcd.url])


def test_a_key_is_put_only_if_it_is_as_it_was_known(client: Etcd) -> None:
    lease = client.grant(60)
    first = client.put_if("/a", b"1", lease, 0)
    assert first is not None
    assert client.put_if("/a", b"2", lease, 0) is None  # it is there already
    assert client.put_if("/a", b"2", lease, first + 5) is None
    second = client.put_if("/a", b"2", lease, first)
    assert second is not None
    found = client.get("/a")
    assert found is not None
    assert found == ("/a", b"2", second, lease)
    assert client.get("/b") is None


def test_everything_under_a_prefix_whatever_its_number(client: Etcd) -> None:
    lease = client.grant(60)
    keys = [f"/many/{number:05}" for number in range(1203)]
    for key in keys:
        client.put_if(key, key.encode(), lease, 0)
    client.put_if("/many", b"", lease, 0)
    client.put_if("/many0", b"", lease, 0)
    found, revision = client.under("/many/")
    assert [(one.key, one.value) for one in found] == [(key, key.encode()) for key in keys]
    assert revision == client.under("/none/")[1] == int(client.get("/many0").revision)  # type: ignore[union-attr]
    assert {one.value for one in client.under("/many/", keys_only=True)[0]} == {b""}


def test_keys_go_with_their_lease(client: Etcd) -> None:
    lease, other = client.grant(60), client.grant(60)
    client.put_if("/a", b"1", lease, 0)
    client.put_if("/b", b"1", other, 0)
    assert client.keep_alive(lease) == 60
    client.revoke(lease)
    client.revoke(lease)  # gone already, which is what was wanted
    assert client.get("/a") is None
    assert client.get("/b") is not None
    with pytest.raises(LeaseGone):
        client.keep_alive(lease)
    with pytest.raises(LeaseGone):
        client.put_if("/a", b"1", lease, 0)


def test_a_watch_tells_puts_ends_of_leases_and_goes_on_from_a_revision(client: Etcd) -> None:
    lease = client.grant(60)
    _, revision = client.under("/w/")
    put = client.put_if("/w/a", b"1", lease, 0)
    client.put_if("/x", b"1", lease, 0)
    found: list[Change] = []

    def follow() -> None:
        for changes in client.watch("/w/", revision + 1, idle=20):
            found.extend(changes)
            if any(change.value is None for change in found):
                return

    thread = threading.Thread(target=follow)
    thread.start()
    while not found:
        time.sleep(0.01)
    client.revoke(lease)  # in the middle of the watch, on a connection of its own
    thread.join(20)
    assert found[0] == ("/w/a", b"1", put)
    assert found[1][:2] == ("/w/a", None)
    assert len(found) == 2


def test_a_watch_whose_beginning_is_gone_says_so(client: Etcd, etcd: EtcdServer) -> None:
    lease = client.grant(60)
    revision = 0
    for _ in range(3):
        revision = client.put_if("/w/a", b"1", lease, revision) or 0
    etcd.post("kv/compaction", revision=str(revision))
    with pytest.raises(WatchEnded):
        list(client.watch("/w/", 1))


def test_a_quiet_watch_ends_after_its_time(client: Etcd) -> None:
    began = time.monotonic()
    assert [changes for changes in client.watch("/w/", 0, idle=0.5) if changes] == []
    assert 0.4 < time.monotonic() - began < 10


def test_the_next_endpoint_is_asked_where_one_does_not_answer(etcd: EtcdServer) -> None:
    client = Etcd([f"http://127.0.0.1:{free_port()}", etcd.url])
    assert client.get("/a") is None
    assert client.grant(60)


def test_etcd_may_go_and_come(client: Etcd, etcd: EtcdServer) -> None:
    lease = client.grant(60)
    client.put_if("/a", b"1", lease, 0)
    etcd.kill()
    with pytest.raises(EtcdUnreachable) as raised:
        client.get("/a")
    assert etcd.url in str(raised.value)
    etcd.start()
    assert answered(lambda: client.get("/a")) is not None


def test_one_that_stands_still_is_waited_for_no_longer_than_agreed(etcd: EtcdServer) -> None:
    Etcd([etcd.url], timeout=30).get("/a")  # it has come up
    client = Etcd([etcd.url], timeout=0.5)
    etcd.stop()
    began = time.monotonic()
    with pytest.raises(EtcdUnreachable, match="timed out"):
        client.get("/a")
    assert time.monotonic() - began < 5
    etcd.go_on()
    Etcd([etcd.url], timeout=30).get("/a")  # it has come round
    assert client.get("/a") is None


def test_users_passwords_and_what_they_may(etcd: EtcdServer) -> None:
    with_users(etcd)
    agent = Etcd([etcd.url], "agent", "password-of-agent")
    lease = agent.grant(60)
    key = PREFIX + "node/0"
    assert agent.put_if(key, b"1", lease, 0)
    assert agent.keep_alive(lease) == 60
    assert [one.key for one in agent.under(PREFIX)[0]] == [key]
    for client, words in (
        (Etcd([etcd.url]), "wants a user"),
        (Etcd([etcd.url], "agent", "wrong"), "does not let user agent in"),
        (Etcd([etcd.url], "other", "password-of-other"), "does not allow that to user other"),
    ):
        with pytest.raises(EtcdError, match=words) as raised:
            client.put_if(key, b"2", 0, 0)
        assert "password-of" not in str(raised.value)
        assert "password-of" not in repr(client)
    with pytest.raises(EtcdError, match="does not allow that"):
        agent.put_if("/elsewhere", b"1", lease, 0)


def test_a_token_that_etcd_has_forgotten_is_asked_for_again(etcd: EtcdServer) -> None:
    with_users(etcd)
    agent = Etcd([etcd.url], "agent", "password-of-agent")
    assert agent.under(PREFIX)[0] == []
    etcd.kill()
    etcd.start()  # its tokens are in memory alone
    assert answered(lambda: agent.under(PREFIX)[0]) == []


def test_a_user_where_nobody_is_asked_for_one(etcd: EtcdServer) -> None:
    assert Etcd([etcd.url], "agent", "x").get("/a") is None


def test_tls_and_only_with_a_certificate_that_is_known(started: list[Any], tmp_path: Path) -> None:
    certificate, key = a_certificate(tmp_path / "tls")
    server = EtcdServer(tmp_path / "etcd", certificate, key)
    started.append(server)
    client = Etcd([server.url], context=tls_context(str(certificate)))
    assert client.grant(60)
    with pytest.raises(EtcdUnreachable, match="certificate verify failed"):
        Etcd([server.url]).get("/a")
    with pytest.raises(EtcdError, match="cannot be used"):
        tls_context(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "url", ["", "etcd", "ftp://one", "http://", "http://one:x", "http://a:b@one", "http://[::1"]
)
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(EtcdError) as raised:
        Etcd([url])
    assert "a:b" not in str(raised.value)


def test_an_answer_that_is_not_etcds(etcd: EtcdServer) -> None:
    import http.server

    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([1]).encode())

        def log_message(self, *arguments: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(EtcdError):
            Etcd([f"http://127.0.0.1:{server.server_address[1]}"]).get("/a")
        server.shutdown()
