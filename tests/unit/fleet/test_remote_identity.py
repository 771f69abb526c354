"""Whether the agent at an address is the one that has registered a slot there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hostile_server import Reply, Server, a_listing, an_entry

from sglang_weight_hook import Change, HookError
from sglang_weight_hook.fleet import following, registry_reading, remote_directory
from sglang_weight_hook.fleet.access import Access
from sglang_weight_hook.fleet.feed import Feed
from sglang_weight_hook.fleet.identity import Identity
from sglang_weight_hook.fleet.registry_reading import Registered, Registry
from sglang_weight_hook.fleet.remote_directory import RegistryDirectory


class Rows(Registry):
    """A registry that holds what a test says."""

    def __init__(self, *rows: Registered) -> None:
        self.rows: list[Registered] = list(rows)
        self.failure: HookError | None = None

    def slot(self, hostname: str, id: str) -> Registered | None:
        found = (row for row in self.slots() if (row.hostname, row.id) == (hostname, id))
        return next(found, None)

    def slots(self) -> list[Registered]:
        if self.failure is not None:
            raise self.failure
        return self.rows


def a_row(url: str, node: str = "node1", agent: str = "a", **value: Any) -> Registered:
    return Registered(node, "0", url, None, {"agent": {"url": url, "id": agent}, **value})


def sent(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def a_stream(*events: bytes) -> Reply:
    """One that stays open for a while."""
    body = b"".join(events)
    return Reply(body, headers={"Content-Length": str(len(body) + 100)})


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server({"/slots": a_listing(an_entry())})
    yield made
    made.close()


def fleet_of(*rows: Registered) -> tuple[RegistryDirectory, Rows]:
    registry = Rows(*rows)
    return RegistryDirectory("etcd://nowhere", registry, Access()), registry


def test_of_two_registrations_with_one_address_only_the_agents_own_is_believed(
    server: Server,
) -> None:
    fleet, _ = fleet_of(a_row(server.url), a_row(server.url, "node2", "b"))
    mine, other = fleet.slots()
    assert mine.owner_alive()
    with pytest.raises(HookError, match="another agent has that address"):
        other.owner_alive()


def test_an_agent_that_registers_nothing_is_not_the_one_that_has(server: Server) -> None:
    server.said["/slots"] = a_listing(an_entry(), agent=None)
    fleet, _ = fleet_of(a_row(server.url))
    with pytest.raises(HookError, match="another agent has that address"):
        fleet.slots()[0].owner_alive()


def test_a_registration_of_another_run_of_the_server_is_not_the_one_that_runs(
    server: Server,
) -> None:
    fleet, _ = fleet_of(a_row(server.url, instance="before"))
    with pytest.raises(HookError, match="another run of its server"):
        fleet.slots()[0].owner_alive()
    fleet, _ = fleet_of(a_row(server.url, instance="i"))
    assert fleet.slots()[0].owner_alive()


def told(fleet: RegistryDirectory, most: int, seconds: float = 1.9) -> list[Change]:
    found = []
    for change in fleet.events(seconds):
        found.append(change)
        if len(found) == most:
            break
    return found


def test_while_watching_only_who_has_registered_a_slot_speaks_for_it(server: Server) -> None:
    server.said["/events"] = a_stream(
        sent("agent", {"id": "a", "node": "node1"}), sent("state", an_entry())
    )
    fleet, _ = fleet_of(a_row(server.url), a_row(server.url, "node2", "b"))
    changes = {change.slot.name: change for change in told(fleet, 2)}
    assert changes["node1:0"].alive
    assert changes["node1:0"].problem is None
    assert "another agent has that address" in str(changes["node2:0"].problem)


@pytest.mark.parametrize("first", [b"", sent("agent", {"id": "b", "node": "node1"})])
def test_while_watching_another_agent_is_not_believed(server: Server, first: bytes) -> None:
    server.said["/events"] = a_stream(first, sent("state", an_entry()))
    fleet, _ = fleet_of(a_row(server.url))
    [change] = told(fleet, 9, 0.5)
    assert not change.alive
    assert "another agent has that address" in str(change.problem)


def test_a_stream_begins_with_who_speaks() -> None:
    async def first() -> bytes:
        return await Feed(identity=Identity("x", "n")).stream(list).__anext__()

    assert asyncio.run(first()) == b'event: agent\ndata: {"id": "x", "node": "n"}\n\n'


def test_what_a_row_is_registered_by_is_not_believed_to_be_well_made() -> None:
    row = registry_reading.Registered("n", "0", "http://a", None, {"agent": []})
    assert row.identity == Identity("", "")


@pytest.mark.parametrize("whole_registry", [False, True])
def test_while_watching_it_is_told_that_nothing_more_is_known(
    server: Server, whole_registry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LOOK_AGAIN", 0.1)
    monkeypatch.setattr(remote_directory, "LOOK_AGAIN", 0.1)
    server.said["/events"] = a_stream(
        sent("agent", {"id": "a", "node": "node1"}), sent("state", an_entry())
    )
    fleet, registry = fleet_of(a_row(server.url))
    changes = fleet.events(5.0)
    assert next(changes).problem is None
    if whole_registry:
        registry.failure = HookError("the registry cannot be read: as told")
    else:
        registry.rows = []
    change = next(changes)
    words = "the registry cannot be read" if whole_registry else "no longer registered"
    assert change.slot.name == "node1:0"
    assert words in str(change.problem)
    if not whole_registry:  # and all is told again when it is back
        registry.rows = [a_row(server.url)]
        assert next(changes).problem is None
    changes.close()  # type: ignore[attr-defined]
