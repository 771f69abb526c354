"""A network that is cut between an agent and its registry: what is listed meanwhile, and after.

The agent runs in a network namespace of its own, and the link to it is taken down.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import Agent, Publisher, eventually
from etcd_process import EtcdServer

from sglang_weight_hook import HookError, Unreachable, open_directory
from sglang_weight_hook.fleet import remote_agent
from sglang_weight_hook.fleet.etcd import PREFIX, Etcd
from tests.real_sglang.network import HERE, THERE, NoNamespaces, link_cut, second_namespace

TTL = 3
# etcd looks at its leases twice a second, and a machine on which much else runs is no failure.
SLACK = 4.0


@pytest.fixture
def elsewhere() -> Iterator[list[str]]:
    """What puts a command into the other network."""
    try:
        with second_namespace() as prefix:
            yield prefix
    except NoNamespaces as error:
        pytest.skip(f"no second network namespace here: {error}")


class Ground:
    """Two slots behind an agent in the other network, one behind an agent in this one."""

    def __init__(
        self,
        etcd: EtcdServer,
        publish: Callable[..., Publisher],
        serve: Callable[..., Agent],
        folder: Path,
        elsewhere: list[str],
    ) -> None:
        self.etcd = etcd
        self._serve = serve
        self.folder = folder
        self.publishers = [publish(1, folder / name) for name in ("one", "two", "near")]
        self.far = self.agent(
            "far",
            ("one", "two"),
            *("--host", THERE, "--without-token", "--name", THERE),
            prefix=elsewhere,
        )
        self.near = self.agent("near", ("near",))
        self._client = Etcd([etcd.url])
        self.fleet = open_directory(etcd.url.replace("http://", "etcd://"))

    def agent(self, node: str, places: tuple[str, ...], *more: object, **given: Any) -> Agent:
        where = [word for place in places for word in ("--dir", self.folder / place)]
        registry = ("--etcd", self.etcd.url, "--node", node, "--ttl", TTL)
        return self._serve(*where, *registry, *more, **given)

    def listed(self) -> dict[str, str]:
        """The URL of who has registered it, by slot; nothing is registered twice."""
        found = self._client.under(PREFIX)[0]
        slots = self.fleet._registry.slots()  # type: ignore[attr-defined]
        counted = Counter((slot.value["directory"], slot.value["slot"]) for slot in slots)
        assert not [slot for slot, times in counted.items() if times > 1]
        assert {one.key.removeprefix(PREFIX) for one in found} <= {"far/0", "far/0@2", "near/0"}
        return {slot.name: slot.url for slot in slots}


@pytest.fixture
def ground(
    elsewhere: list[str],
    started: list[Any],
    publish: Callable[..., Publisher],
    serve: Callable[..., Agent],
    tmp_path: Path,
) -> Ground:
    started.append(EtcdServer(tmp_path / "etcd", host=HERE))
    return Ground(started[0], publish, serve, tmp_path, elsewhere)


BOTH = {"far:0", "far:0@2"}
ALL = BOTH | {"near:0"}


def until(ground: Ground, names: set[str], seconds: float) -> float:
    """How long it takes until exactly these are listed; never any of them twice on the way."""
    began = time.monotonic()
    while set(ground.listed()) != names:
        assert time.monotonic() - began < seconds, ground.listed()
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.mark.parametrize("end", ["here", "there"])
def test_slots_of_an_agent_that_is_cut_off_go_with_their_leases_and_come_back(
    ground: Ground, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_agent, "LISTING_TIMEOUT", 1.0)
    until(ground, ALL, 30.0)
    assert ground.far.slot()["owner_alive"]
    with link_cut(end):
        cut = time.monotonic()
        # While its leases last they are listed, and nobody takes them for ready.
        slots = {slot.name: slot for slot in ground.fleet.slots()}
        assert slots["near:0"].owner_alive()
        for name in BOTH & slots.keys():
            with pytest.raises(Unreachable, match=THERE):
                slots[name].owner_alive()
        until(ground, {"near:0"}, TTL + SLACK - (time.monotonic() - cut))
        # What happens behind the cut: a change, and the end of a server.
        ground.publishers[0].tell("update")
        ground.publishers[1].kill()
        while time.monotonic() - cut < 2 * TTL:
            assert set(ground.listed()) == {"near:0"}
            time.sleep(0.2)
        assert [slot.name for slot in ground.fleet.slots()] == ["near:0"]
    until(ground, {"far:0", "near:0"}, 2 * TTL + SLACK)
    assert ground.listed()["far:0"] == ground.far.url

    def state() -> Any:
        try:
            return ground.fleet.slot("far:0").read_state()
        except HookError:  # it was not reached a moment ago
            return None

    assert eventually(state)["content_generation"] == 2
    steady = time.monotonic() + TTL
    while time.monotonic() < steady:
        assert set(ground.listed()) == {"far:0", "near:0"}
        time.sleep(0.2)


def test_who_waits_takes_over_and_who_was_cut_off_stays_silent(ground: Ground) -> None:
    until(ground, ALL, 30.0)
    other = ground.agent("far", ("one", "two"))
    eventually(lambda: "by another agent" in other.said())
    assert {ground.listed()[name] for name in BOTH} == {ground.far.url}
    with link_cut("here"):
        began = time.monotonic()
        while {ground.listed().get(name) for name in BOTH} != {other.url}:
            assert time.monotonic() - began < 2 * TTL + SLACK
            time.sleep(0.05)
        ground.publishers[0].tell("update")
    back = time.monotonic()
    while time.monotonic() - back < 2 * TTL + SLACK:
        found = ground.listed()
        assert set(found) == ALL
        assert {found[name] for name in BOTH} == {other.url}
        time.sleep(0.2)
    assert "by another agent" in ground.far.said()
    assert other.end() == 0
    began = time.monotonic()
    while {ground.listed().get(name) for name in BOTH} != {ground.far.url}:
        assert time.monotonic() - began < 2 * TTL + SLACK
        time.sleep(0.05)
