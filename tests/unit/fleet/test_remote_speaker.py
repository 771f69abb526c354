"""A slot of a registry that is followed alone: only who has registered it is believed."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_process import Agent, Publisher, eventually
from etcd_process import EtcdServer

from sglang_weight_hook import HookError, open_directory
from sglang_weight_hook.fleet import remote_agent, remote_events

WORDS = "another agent has that address"


class Taken:
    """A slot of a registry whose agent ends, and other ones start at its address."""

    def __init__(
        self,
        etcd: EtcdServer,
        publish: Callable[..., Publisher],
        serve: Callable[..., Agent],
        folder: Path,
    ) -> None:
        self.publisher, self.other = publish(1, folder / "maps"), publish(1, folder / "other")
        self._serve, self._etcd, self._folder = serve, etcd, folder
        self.agent = self.start("maps")
        self.port = self.agent.port
        self.fleet = open_directory(etcd.url.replace("http://", "etcd://"))
        eventually(lambda: [slot.name for slot in self.fleet.slots()] == ["node:0"])
        self.slot = self.fleet.slot("node:0")
        self.document = self.slot.read()

    def start(self, place: str, *more: object, node: str = "node") -> Agent:
        registry = ("--etcd", self._etcd.url, "--node", node, "--ttl", 10)
        return self._serve("--dir", self._folder / place, *registry, *more)

    def taken_by(self, place: str, node: str = "node", registers: bool = True) -> Agent:
        """The agent is gone at once, and its lease is not; another one has the address."""
        self.agent.process.kill()
        self.agent.process.wait()
        where = ("--dir", self._folder / place, "--port", self.port)
        made = self.start(place, *where[2:], node=node) if registers else self._serve(*where)
        time.sleep(remote_agent.FRESH + 0.1)
        return made


@pytest.fixture
def taken(
    etcd: EtcdServer,
    publish: Callable[..., Publisher],
    serve: Callable[..., Agent],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Taken:
    monkeypatch.setattr(remote_events, "LONGEST_PAUSE", 0.3)
    return Taken(etcd, publish, serve, tmp_path)


@pytest.mark.parametrize("registers", [True, False])
def test_another_agent_at_the_address_is_not_believed(taken: Taken, registers: bool) -> None:
    taken.taken_by("other", "another", registers)
    copied = pickle.loads(pickle.dumps(taken.slot))
    questions: list[Callable[[], Any]] = [
        *(taken.slot.read, taken.slot.read_state, taken.slot.owner_alive, taken.slot.state_size),
        *(lambda: list(taken.slot.history()), copied.read),
    ]
    for ask in questions:
        with pytest.raises(HookError, match=WORDS):
            ask()
    assert taken.slot.wait_for_change(taken.document, timeout=1.0) is None


def test_an_agent_that_is_started_again_is_believed_once_it_has_registered(taken: Taken) -> None:
    taken.taken_by("maps")
    with pytest.raises(HookError, match=WORDS):
        taken.slot.read()
    # It waits for the lease of the one before.
    eventually(lambda: readable(taken.slot))
    assert taken.slot.read().raw == taken.document.raw


def readable(slot: Any) -> bool:
    try:
        return bool(slot.owner_alive())
    except HookError:
        return False


def test_who_waits_for_a_change_is_told_it_by_the_agent_that_is_back(taken: Taken) -> None:
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.append(taken.slot.wait_for_change(taken.document, timeout=60))
    )
    waiting.start()
    taken.taken_by("maps")
    taken.publisher.tell("update")
    waiting.join(60)
    assert found[0]["content_generation"] == 2


def test_an_agent_whose_address_was_typed_is_whoever_answers_there(taken: Taken) -> None:
    [slot] = open_directory(taken.agent.url).slots()
    taken.taken_by("other", "another")
    assert slot.read().raw != taken.document.raw
