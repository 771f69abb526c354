"""The agent's stream of events: complete, in order, and resumable."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from agent_process import Agent, Publisher, eventually

from sglang_weight_hook.fleet import feed as feed_module
from sglang_weight_hook.fleet.entry import Entry
from sglang_weight_hook.fleet.feed import Feed
from sglang_weight_hook.reader import Slot


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    made = Publisher(tmp_path_factory.mktemp("published") / "maps", 2)
    yield made
    made.kill()


@pytest.fixture(scope="module")
def agent(publisher: Publisher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    short = "from sglang_weight_hook.fleet import feed; feed.KEEP_ALIVE = 0.3"
    made = Agent(tmp_path_factory.mktemp("agent"), "--dir", publisher.directory, before=short)
    yield made
    assert made.end() == 0
    assert made.said() == ""


def test_first_every_slot_and_then_each_change(agent: Agent, publisher: Publisher) -> None:
    stream = agent.events()
    first = [stream.next(), stream.next()]
    assert [event and (event.kind, event.data["id"]) for event in first] == [
        ("state", "0"),
        ("state", "1"),
    ]
    publisher.tell("update", 1)
    changed = stream.until(lambda event: event.data["state"] == publisher.state("1"))
    assert (changed.kind, changed.data["id"]) == ("state", "1")
    assert changed.data == {k: v for k, v in agent.slot("1").items() if k != "checked_at"}
    stream.close()


def test_updating_is_seen_before_ready(agent: Agent, publisher: Publisher) -> None:
    stream = agent.events("/events?slot=0")
    assert stream.next() is not None
    publisher.tell("move", 0)
    last = stream.until(lambda event: event.data["state"]["state"] == "ready")
    assert last.data["id"] == "0"
    stream.close()


def test_one_slot_alone(agent: Agent, publisher: Publisher) -> None:
    stream = agent.events("/events?slot=1")
    publisher.tell("update", 0)
    publisher.tell("fail", 1)
    last = stream.until(lambda event: event.data["state"]["state"] == "failed")
    assert last.data["id"] == "1"
    publisher.tell("update", 1)
    stream.close()
    assert agent.ask("/events?slot=7").status == 404


def test_who_comes_back_is_told_what_he_has_missed(agent: Agent, publisher: Publisher) -> None:
    stream = agent.events()
    stream.next(), stream.next()
    publisher.tell("update", 0)
    stream.until(lambda event: event.data["state"] == publisher.state("0"))
    known = stream.last
    stream.close()
    publisher.tell("update", 1)
    eventually(lambda: agent.slot("1")["state"] == publisher.state("1"))
    again = agent.events(last_event_id=known)
    missed = again.next()
    assert missed is not None
    assert (missed.kind, missed.data["id"]) == ("state", "1")  # and nothing of slot 0
    again.close()


@pytest.mark.parametrize("known", ["", "0", "x-1", "{boot}-999999999", "{boot}--1", "-"])
def test_a_number_that_means_nothing_here_begins_with_everything(agent: Agent, known: str) -> None:
    stream = agent.events()
    stream.comment()
    boot = stream.last.rpartition("-")[0]
    stream.close()
    again = agent.events(last_event_id=known.replace("{boot}", boot))
    events = [again.next() for _ in range(3)]
    assert [event and event.kind for event in events] == ["reset", "state", "state"]
    again.close()


def test_a_quiet_stream_shows_that_it_lives(agent: Agent) -> None:
    stream = agent.events()
    assert stream.comment() == ": all slots"
    assert stream.comment() == ": keep-alive"
    stream.close()


def test_a_stream_that_is_closed_counts_no_more(agent: Agent) -> None:
    def streams() -> float:
        lines = agent.ask("/metrics").body.decode().splitlines()
        return float(
            next(x for x in lines if x.startswith("sglang_weight_agent_event_s")).split()[1]
        )

    eventually(lambda: streams() == 0)
    stream = agent.events()
    eventually(lambda: streams() == 1)
    stream.close()
    eventually(lambda: streams() == 0)
    assert agent.ask("/events", "HEAD").headers["content-type"].startswith("text/event-stream")
    assert streams() == 0


# -- the ring by itself


def an_entry(id: str, number: int = 0) -> Entry:
    content = {"id": id, "number": number}
    return Entry(Slot("/none", id), None, content, json.dumps(content).encode())


def told(text: bytes) -> tuple[str, Any]:
    lines = dict(line.split(": ", 1) for line in text.decode().strip().splitlines())
    return lines.get("event", ""), json.loads(lines.get("data", "null"))


def test_a_reader_that_falls_behind_begins_again_and_holds_up_nobody() -> None:
    async def run() -> list[tuple[str, Any]]:
        feed = Feed(kept=4)
        entries = [an_entry("0")]
        slow = feed.stream(lambda: entries)
        found = [told(await slow.__anext__()) for _ in range(2)]
        for number in range(1, 10):
            entries[0] = an_entry("0", number)
            feed.publish(entries[0], "0")
        found += [told(await slow.__anext__()) for _ in range(3)]
        feed.publish(None, "0")
        found.append(told(await slow.__anext__()))
        feed.close()
        found += [told(text) async for text in slow]
        return found

    assert asyncio.run(run()) == [
        ("state", {"id": "0", "number": 0}),
        ("", None),
        ("reset", {}),
        ("state", {"id": "0", "number": 9}),
        ("", None),
        ("removed", {"id": "0"}),
    ]


def test_what_was_cut_off_half_way_through_everything_is_told_again() -> None:
    async def run() -> bytes:
        feed = Feed()
        stream = feed.stream(lambda: [an_entry("0"), an_entry("1")])
        return await stream.__anext__() + await stream.__anext__()

    assert b"id: " not in asyncio.run(run())


def test_as_many_as_are_kept_can_be_missed() -> None:
    feed = Feed(kept=3)

    async def fill() -> None:
        for number in range(10):
            feed.publish(an_entry("0", number), "0")

    asyncio.run(fill())
    positions = {n: feed.position(f"{feed.boot}-{n}") for n in (5, 6, 7, 10, 11)}
    assert positions == {5: None, 6: None, 7: 7, 10: 10, 11: None}
    assert feed.position(None) is None
    assert feed.position("other-7") is None


def test_the_keep_alive_is_as_documented() -> None:
    assert feed_module.KEEP_ALIVE == 15.0
