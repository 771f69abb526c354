"""Live slots in a real etcd: what is listed, by whom, and for how long, whatever dies or stops."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_process import Agent, Publisher, eventually
from etcd_process import EtcdServer, a_certificate, answered, coded, with_users

from sglang_weight_hook.fleet import registration as module
from sglang_weight_hook.fleet.entry import Entry
from sglang_weight_hook.fleet.etcd import PREFIX, Etcd, EtcdUnreachable
from sglang_weight_hook.fleet.registration import Registration
from sglang_weight_hook.reader import Slot

TTL = 3  # etcd itself grants no less than two
# For what has to wait for etcd: its own clock of leases ticks twice a second, and a member that
# was started again needs a moment for its leader.
SLACK = 4.0

Publish = Callable[..., Publisher]
Register = Callable[..., Agent]


@pytest.fixture
def register(serve: Callable[..., Agent], etcd: EtcdServer) -> Register:
    def start(*arguments: object) -> Agent:
        return serve("--etcd", etcd.url, "--node", "node", "--ttl", TTL, *arguments)

    return start


@pytest.fixture
def listed(etcd: EtcdServer) -> Callable[[], dict[str, Any]]:
    client = Etcd([etcd.url])

    def look() -> dict[str, Any]:
        found = answered(lambda: client.under(PREFIX)[0])
        values = {one.key.removeprefix(PREFIX): json.loads(one.value) for one in found}
        assert all(0 < len(one.value) < 4096 and one.lease for one in found)
        return values

    return look


def test_each_live_slot_is_listed_with_what_it_is(
    publish: Publish, register: Register, listed: Callable[[], Any], etcd: EtcdServer
) -> None:
    publisher = publish(2)
    agent = register("--advertise", "https://node.example:7411")
    found = eventually(lambda: len(seen := listed()) == 2 and seen)
    assert set(found) == {"node/0", "node/1"}
    state, told = publisher.state("1"), found["node/1"]
    slot = agent.slot("1")
    assert (told["schema"], told["schema_version"]) == ("sglang-weight-slot", 1)
    assert (told["hostname"], told["slot"], told["id"]) == ("node", "1", "1")
    assert told["directory"] == str(publisher.directory)
    assert told["agent"]["url"] == "https://node.example:7411"
    for name in ("state", "layout_generation", "content_generation", "physical_epoch", "instance"):
        assert told[name] == state[name]
    assert told["digest"] == slot["layout"]["etag"]
    assert told["identity"]["gpu_id"] == 1
    # One lease each, so that one can end without the other.
    leases = {one.lease for one in Etcd([etcd.url]).under(PREFIX)[0]}
    assert len(leases) == 2


def test_a_change_is_put_at_once_and_not_with_the_next_lease(
    publish: Publish, register: Register, listed: Callable[[], Any]
) -> None:
    publisher = publish()
    register("--ttl", 3600)
    eventually(listed)
    publisher.tell("move")
    eventually(lambda: listed()["node/0"]["layout_generation"] == 2)
    publisher.tell("fail")
    eventually(lambda: listed()["node/0"]["state"] == "failed")


def test_it_is_withdrawn_when_the_owner_dies_and_the_others_stay(
    publish: Publish, register: Register, listed: Callable[[], Any], tmp_path: Path
) -> None:
    one, two = publish(1, tmp_path / "one"), publish(1, tmp_path / "two")
    register("--ttl", 3600, "--dir", tmp_path / "one", "--dir", tmp_path / "two")
    eventually(lambda: set(listed()) == {"node/0", "node/0@2"})
    one.kill()
    eventually(lambda: set(listed()) == {"node/0@2"})
    two.end()
    eventually(lambda: not listed())
    # And back with the next server there.
    publish(1, tmp_path / "one")
    eventually(lambda: set(listed()) == {"node/0"})


def test_it_is_withdrawn_when_the_agent_ends(
    publish: Publish, register: Register, listed: Callable[[], Any]
) -> None:
    publish(2)
    agent = register("--ttl", 3600)
    eventually(lambda: len(listed()) == 2)
    assert agent.end() == 0
    assert listed() == {}


def test_after_a_killed_agent_no_longer_than_a_lease_and_back_within_two(
    publish: Publish, register: Register, listed: Callable[[], Any]
) -> None:
    publish(2)
    agent = register()
    eventually(lambda: len(listed()) == 2)
    other = register()  # waits for the leases of the first one
    agent.end(signal.SIGKILL)
    both = dict.fromkeys(("node/0", "node/1"), other.url)
    eventually(lambda: speakers(listed()) == both, 2 * TTL + SLACK)
    other.end(signal.SIGKILL)
    eventually(lambda: not listed(), TTL + SLACK)


def speakers(listed: dict[str, Any]) -> dict[str, str]:
    return {key: value["agent"]["url"] for key, value in listed.items()}


def test_two_agents_never_both_speak_for_a_slot(
    publish: Publish, register: Register, listed: Callable[[], Any], etcd: EtcdServer
) -> None:
    publisher = publish(2)
    one = register()
    eventually(lambda: len(listed()) == 2)
    two = register()
    eventually(lambda: "by another agent" in two.said())
    client = Etcd([etcd.url])
    revisions: dict[str, int] = {}
    spoke = set()
    for number in range(12):
        publisher.tell("move" if number % 3 == 0 else "update")
        for value in client.under(PREFIX)[0]:
            spoke.add(json.loads(value.value)["agent"]["url"])
            assert value.revision >= revisions.get(value.key, 0)
            revisions[value.key] = value.revision
        time.sleep(TTL / 10)
    assert spoke == {one.url}
    assert metric(two, "registry_contested_slots") == 2
    # A partition for one agent alone: it stands still for longer than its leases.
    one.process.send_signal(signal.SIGSTOP)
    both = dict.fromkeys(("node/0", "node/1"), two.url)
    eventually(lambda: speakers(listed()) == both, 2 * TTL + SLACK)
    one.process.send_signal(signal.SIGCONT)
    publisher.tell("update")
    eventually(lambda: metric(one, "registry_contested_slots") == 2)
    deadline = time.monotonic() + TTL
    while time.monotonic() < deadline:
        assert speakers(listed()) == both
        time.sleep(0.1)


def metric(agent: Agent, name: str) -> float:
    text = agent.ask("/metrics").body.decode()
    (line,) = (x for x in text.splitlines() if x.startswith(f"sglang_weight_agent_{name} "))
    return float(line.split()[1])


def test_etcd_killed_and_started_again(
    publish: Publish, register: Register, listed: Callable[[], Any], etcd: EtcdServer
) -> None:
    publisher = publish(2)
    agent = register()
    eventually(lambda: len(listed()) == 2)
    etcd.kill()
    publisher.tell("move")
    eventually(lambda: "cannot be registered now" in agent.said())
    assert agent.slot()["state"]["layout_generation"] == 2  # the agent itself goes on
    etcd.start()
    eventually(lambda: listed().get("node/0", {}).get("layout_generation") == 2, 2 * TTL + SLACK)
    assert set(listed()) == {"node/0", "node/1"}
    assert agent.said().count("cannot be registered now") <= 3
    # An owner that dies while etcd is away is withdrawn when it comes.
    etcd.kill()
    publisher.kill()
    etcd.start()
    eventually(lambda: not listed(), TTL + SLACK)


def test_etcd_that_stands_still_for_longer_than_the_leases(
    publish: Publish, register: Register, listed: Callable[[], Any], etcd: EtcdServer
) -> None:
    publisher = publish(2)
    agent = register()
    eventually(lambda: len(listed()) == 2)
    etcd.stop()
    began = time.monotonic()
    publisher.tell("update")
    eventually(lambda: agent.slot()["state"]["content_generation"] == 2)
    assert agent.ask("/healthz").status == 200
    time.sleep(max(TTL + 1 - (time.monotonic() - began), 0))
    etcd.go_on()
    eventually(lambda: listed().get("node/0", {}).get("content_generation") == 2, 2 * TTL + SLACK)
    eventually(lambda: set(listed()) == {"node/0", "node/1"}, 2 * TTL)
    assert agent.end() == 0
    assert listed() == {}


def test_a_lease_that_somebody_has_revoked_and_a_key_that_somebody_has_deleted(
    publish: Publish, register: Register, listed: Callable[[], Any], etcd: EtcdServer
) -> None:
    publish(2)
    register()
    eventually(lambda: len(listed()) == 2)
    client = Etcd([etcd.url])
    first, second = client.under(PREFIX)[0]
    client.revoke(first.lease)
    etcd.post("kv/deleterange", key=coded(second.key))
    assert listed() == {}
    eventually(lambda: len(listed()) == 2, 2 * TTL + SLACK)


def test_an_agent_killed_at_any_point_leaves_no_slot_twice_and_none_for_long(
    publish: Publish, register: Register, listed: Callable[[], Any]
) -> None:
    publisher = publish(2)
    for delay in (0.0, 0.01, 0.05, 0.2, 0.6):
        agent = register()
        time.sleep(delay)
        agent.end(signal.SIGKILL)
        found = listed()
        assert set(found) <= {"node/0", "node/1"}
    publisher.kill()
    eventually(lambda: not listed(), TTL + SLACK)
    publish(2)
    register()
    eventually(lambda: set(listed()) == {"node/0", "node/1"}, 2 * TTL + SLACK)


def test_with_users_and_tls(
    publish: Publish, serve: Callable[..., Agent], started: list[Any], tmp_path: Path
) -> None:
    certificate, key = a_certificate(tmp_path / "tls")
    server = EtcdServer(tmp_path / "secure", certificate, key)
    started.append(server)
    import ssl
    import urllib.request

    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(certificate)))
    )

    def post(path: str, **asked: Any) -> Any:
        request = urllib.request.Request(
            f"{server.url}/v3/{path}", json.dumps(asked).encode(), method="POST"
        )
        return json.load(opener.open(request, timeout=10))

    server.post = post  # type: ignore[method-assign]
    with_users(server)
    password = tmp_path / "password"
    password.write_text("password-of-agent\n")
    publish()
    agent = serve(
        *("--etcd", server.url, "--etcd-ca", certificate, "--etcd-user", "agent"),
        *("--etcd-password-file", password, "--node", "node"),
    )
    from sglang_weight_hook.fleet.etcd import tls_context

    client = Etcd([server.url], "agent", "password-of-agent", tls_context(str(certificate)))
    eventually(lambda: [one.key for one in client.under(PREFIX)[0]] == [PREFIX + "node/0"])
    assert metric(agent, "registered_slots") == 1
    assert agent.end() == 0
    assert client.under(PREFIX)[0] == []
    assert "password" not in agent.said()


# -- the values by themselves


def an_entry(**summary: Any) -> Entry:
    content = {
        "id": "0",
        "slot": "0",
        "directory": "/maps",
        "owner_alive": True,
        "state": {"state": "ready", "instance": "x"},
        "summary": summary,
        "layout": None,
    }
    return Entry(Slot("/maps", "0"), None, content, b"")


def test_a_value_is_small_whatever_a_document_says() -> None:
    made = Registration(Etcd(["http://127.0.0.1:9"]), "http://a:1", "node")
    huge = an_entry(**dict.fromkeys(module._IDENTITY, "☃" * 10000))
    nested = an_entry(model_path={"a": [1] * 10_000}, role="target")
    assert len(made._value(huge)) < module.MAX_VALUE
    value = json.loads(made._value(nested))
    assert (value["identity"]["model_path"], value["identity"]["role"]) == (None, "target")


def test_without_etcd_the_agent_says_it_once(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    asked = []

    class Away(Etcd):
        def grant(self, seconds: int) -> int:
            asked.append(seconds)
            raise EtcdUnreachable("etcd at nowhere does not answer")

    made = Registration(Away(["http://127.0.0.1:9"]), "http://a:1", "node", 7)
    made.told(an_entry(), "0")
    made.start()
    eventually(lambda: len(asked) > 20)
    made.stop()
    assert [record.getMessage() for record in caplog.records] == [
        "slots cannot be registered now: etcd at nowhere does not answer"
    ]
    assert made.figures()["registry_failures_total"] >= 20
    assert set(asked) == {7}
