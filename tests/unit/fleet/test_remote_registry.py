"""All agents of a registry as one directory: a real etcd, killed, stopped, started again."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from agent_process import TOKEN, Agent, Publisher
from etcd_process import EtcdServer
from hostile_server import Server, a_listing, an_entry

from sglang_weight_hook import Directory, HookError, Unreachable, open_directory
from sglang_weight_hook.fleet import registry_reading, remote_agent
from sglang_weight_hook.fleet.etcd import Etcd

if TYPE_CHECKING:
    from ended_command import Run

PREFIX = "/sglang-weight-hook/v1/"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody hangs, a machine on which much else runs is no failure."""
    monkeypatch.setattr(remote_agent, "LISTING_TIMEOUT", 20.0)
    monkeypatch.setattr(remote_agent, "SECOND_TIMEOUT", 20.0)


def url_of(etcd: EtcdServer) -> str:
    return etcd.url.replace("http://", "etcd://")


def names(directory: Directory) -> list[str]:
    return [slot.name for slot in directory.slots()]


def eventually(holds: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = holds()
        except HookError:
            found = None
        if found:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.1)


def put(etcd: EtcdServer, key: str, value: object) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    pair = {"key": (PREFIX + key).encode(), "value": data}
    etcd.post("kv/put", **{name: base64.b64encode(part).decode() for name, part in pair.items()})


def a_value(url: object, hostname: str = "node1", id: str = "0") -> dict[str, Any]:
    return {
        "schema": "sglang-weight-slot",
        "schema_version": 1,
        "hostname": hostname,
        "id": id,
        "slot": id,
        "agent": {"url": url, "id": "a"},
    }


def test_an_etcd_that_was_started_again_is_asked_over_a_new_connection(etcd: EtcdServer) -> None:
    fleet = open_directory(url_of(etcd))
    assert eventually(lambda: names(fleet) == [])
    etcd.kill()
    etcd.start()
    Etcd([etcd.url], timeout=30).get("/a")  # it has come up
    time.sleep(remote_agent.FRESH)
    assert names(fleet) == []


def test_the_slots_of_two_machines_are_one_directory(
    etcd: EtcdServer,
    publish: Callable[..., Publisher],
    serve: Callable[..., Agent],
    tmp_path: Path,
    run: Run,
) -> None:
    for node in ("one", "two"):
        publish(2, tmp_path / node)
        serve("--dir", tmp_path / node, "--etcd", etcd.url, "--node", node)
    fleet = open_directory(url_of(etcd))
    expected = ["one:0", "one:1", "two:0", "two:1"]
    assert eventually(lambda: names(fleet) == expected)
    for slot in fleet.slots():
        here = open_directory(str(tmp_path / slot.name[:3])).slot(slot.name[4:]).read()
        assert slot.read().raw == here.raw
        [found] = fleet.slots_at([here.regions[0]["ptr"]])
        assert found.name == slot.name
    report = run("report", "--json", "--dir", fleet.path)
    assert report.status == 0
    assert [slot["slot"] for slot in report.json["slots"]] == expected
    local = run("report", "--json", "--dir", tmp_path / "one", "--dir", tmp_path / "two").json
    assert report.json["total"]["weights_bytes"] == local["total"]["weights_bytes"]


def test_a_silent_agent_is_shown_and_its_slots_are_not_summed_over(
    etcd: EtcdServer,
    publish: Callable[..., Publisher],
    serve: Callable[..., Agent],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_agent, "LISTING_TIMEOUT", 2.5)
    agents = []
    for node in ("one", "two"):
        publish(1, tmp_path / node)
        agents.append(
            serve("--dir", tmp_path / node, "--etcd", etcd.url, "--node", node, "--ttl", "60")
        )
    fleet = open_directory(url_of(etcd))
    assert eventually(lambda: names(fleet) == ["one:0", "two:0"])
    address = fleet.slots()[0].read().regions[0]["ptr"]
    os.kill(agents[1].process.pid, signal.SIGSTOP)
    try:
        for command in (
            ["slots"],
            ["report"],
            ["lookup", hex(address)],
            ["plot", "-o", tmp_path / "page.html"],
            ["verify"],
            ["history"],
        ):
            ended = run(*command, "--dir", fleet.path)
            assert ended.status == 3, (command, ended)
            assert "two:0" in ended.err + ended.out, command
            assert agents[1].url in ended.err + ended.out, command
        report = run("report", "--json", "--dir", fleet.path).json
        assert [slot["counted"] for slot in report["slots"]] == [True, False]
        assert run("show", "two:0", "--dir", fleet.path).status != 0
        assert run("show", "one:0", "--dir", fleet.path).status == 0
    finally:
        os.kill(agents[1].process.pid, signal.SIGCONT)
    time.sleep(remote_agent.FRESH)
    assert eventually(lambda: run("report", "--dir", fleet.path).status == 0)


def test_watching_a_registry_meets_slots_that_come_later(
    etcd: EtcdServer,
    publish: Callable[..., Publisher],
    serve: Callable[..., Agent],
    tmp_path: Path,
) -> None:
    publish(1, tmp_path / "one")
    serve("--dir", tmp_path / "one", "--etcd", etcd.url, "--node", "one")
    fleet = open_directory(url_of(etcd))
    assert eventually(lambda: names(fleet) == ["one:0"])
    changes = fleet.events(timeout=60)
    first = next(changes)
    assert (first.slot.name, first.initial) == ("one:0", True)
    late = publish(1, tmp_path / "two")
    serve("--dir", tmp_path / "two", "--etcd", etcd.url, "--node", "two")
    second = next(changes)
    assert (second.slot.name, second.initial, second.alive) == ("two:0", False, True)
    late.kill()
    while second.alive:
        second = next(changes)
    assert second.slot.name == "two:0"
    changes.close()  # type: ignore[attr-defined]


def test_a_registry_that_was_killed_says_so_and_answers_once_it_is_back(
    etcd: EtcdServer, run: Run
) -> None:
    server = Server({"/slots": a_listing(an_entry())})
    try:
        put(etcd, "node1/0", a_value(server.url))
        fleet = open_directory(url_of(etcd))
        assert names(fleet) == ["node1:0"]
        etcd.kill()
        with pytest.raises(Unreachable, match="registry"):
            fleet.slots()
        for command in ("slots", "report", "verify"):
            ended = run(command, "--dir", fleet.path)
            assert ended.status == 1
            assert "registry" in ended.err
        etcd.start()
        assert eventually(lambda: names(fleet) == ["node1:0"])
    finally:
        server.close()


def test_a_registry_that_stands_still_is_not_waited_for_long(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = open_directory(url_of(etcd))
    assert names(fleet) == []
    monkeypatch.setattr(registry_reading, "TIMEOUT", 0.5)
    etcd.stop()
    try:
        started = time.monotonic()
        with pytest.raises(Unreachable):
            fleet.slots()
        assert time.monotonic() - started < 5.0
    finally:
        etcd.go_on()
    assert eventually(lambda: names(fleet) == [] or "none")


def test_another_member_is_asked_where_one_does_not_answer(etcd: EtcdServer) -> None:
    both = open_directory(url_of(etcd).replace("etcd://", "etcd://127.0.0.1:1,"))
    assert names(both) == []


def test_what_is_no_agents_value_has_a_problem_and_stops_no_other(
    etcd: EtcdServer, run: Run
) -> None:
    server = Server({"/slots": a_listing(an_entry())})
    try:
        put(etcd, "node1/0", a_value(server.url))
        put(etcd, "node2/0", b"\xff")
        put(etcd, "node3/0", a_value("file:///etc/passwd", "node3"))
        put(etcd, "node4/0", a_value(server.url, "another"))
        put(etcd, "node5/0", b" " * 5000)
        put(etcd, "node6/0", a_value(server.url, "node6") | {"schema_version": 2})
        put(etcd, "node7/9", a_value(server.url, "node7", "9"))  # its agent has no such slot
        put(etcd, "a/b/../c", a_value(server.url))
        found = {slot.name: slot for slot in open_directory(url_of(etcd)).slots()}
        assert len(found) == 8
        assert found.pop("node1:0").owner_alive()
        for slot in found.values():
            with pytest.raises(HookError):
                slot.owner_alive()
        ended = run("slots", "--dir", url_of(etcd))
        assert ended.status == 3
        assert ended.out.count("unreadable") == 7
        assert {path.partition("?")[0] for path, _ in server.asked} == {"/slots"}
    finally:
        server.close()


def test_many_keys_come_in_pages(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_reading, "PAGE", 3)
    server = Server({"/slots": a_listing(*(an_entry(str(n)) for n in range(10)))})
    try:
        for number in range(10):
            put(etcd, f"node1/{number}", a_value(server.url, id=str(number)))
        assert names(open_directory(url_of(etcd))) == [f"node1:{n}" for n in range(10)]
    finally:
        server.close()


def test_a_token_is_kept_from_an_address_that_somebody_wrote_into_the_registry(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_TOKEN", TOKEN)
    sent: list[dict[str, str]] = []
    monkeypatch.setattr(
        remote_agent.Peer,
        "ask",
        lambda self, path, timeout, limit, headers=None, body=None: (
            sent.append(dict(headers or {})) or remote_agent.Answer(401, {}, b"{}")
        ),
    )
    rows = [registry_reading.Registered("n", "0", "http://192.0.2.1:1", None, {})]
    monkeypatch.setattr(registry_reading.Registry, "slots", lambda self: rows)
    [slot] = open_directory(url_of(etcd)).slots()
    with pytest.raises(Unreachable, match="not sent without TLS"):
        slot.owner_alive()
    assert sent
    assert all(TOKEN not in str(headers) for headers in sent)


def test_a_registry_with_users_is_read_by_one_who_may(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd.post("auth/user/add", name="root", password="root-secret")
    etcd.post("auth/role/add", name="root")
    etcd.post("auth/user/grant", user="root", role="root")
    etcd.post("auth/user/add", name="reader", password="reader-secret")
    etcd.post("auth/role/add", name="reading")
    area = {"key": PREFIX, "range_end": PREFIX[:-1] + "0"}
    permission = {name: base64.b64encode(text.encode()).decode() for name, text in area.items()}
    etcd.post("auth/role/grant", name="reading", perm={"permType": "READ", **permission})
    etcd.post("auth/user/grant", user="reader", role="reading")
    etcd.post("auth/enable")
    with pytest.raises(HookError, match="SGLANG_WEIGHT_HOOK_ETCD_USER"):
        open_directory(url_of(etcd)).slots()
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_ETCD_USER", "reader")
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_ETCD_PASSWORD", "wrong-secret")
    with pytest.raises(HookError, match="does not let") as caught:
        open_directory(url_of(etcd)).slots()
    assert "wrong-secret" not in str(caught.value)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_ETCD_PASSWORD", "reader-secret")
    fleet = open_directory(url_of(etcd))
    assert names(fleet) == []
    fleet._registry._token = "one-that-has-run-out"  # type: ignore[attr-defined]
    assert names(fleet) == []


def test_a_registry_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from etcd_process import a_certificate

    certificate, key = a_certificate(tmp_path / "tls")
    etcd = EtcdServer(tmp_path / "secure", certificate, key)
    try:
        url = etcd.url.replace("https://", "etcds://")
        with pytest.raises(Unreachable):
            open_directory(url).slots()
        monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CA_FILE", str(certificate))
        assert names(open_directory(url)) == []
    finally:
        etcd.kill()
