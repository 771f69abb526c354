"""Following the changes that agents send, taken up again where a stream has broken off."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from ..reader import HookError
from .identity import UNREGISTERED, Identity, Speaker
from .wire import Stop

if TYPE_CHECKING:
    from .remote_agent import RemoteAgent
    from .remote_slot import RemoteSlot

# Seconds: an agent sends a comment each 15 s where nothing happens.
SILENCE = 40.0
PAUSE, LONGEST_PAUSE = 0.2, 5.0  # between attempts to reach an agent
_MOST_BYTES = 4 * 1024**2  # of one event
AGENT = "agent"  # the event that a stream of an agent begins with that registers its slots


class Sent(NamedTuple):
    """One event of a stream."""

    name: str
    id: Optional[str]
    data: str


def sent_events(lines: Iterable[bytes]) -> Iterator[Sent]:
    r"""The events in the lines of a stream.  Raises ValueError for one without end.

    >>> list(sent_events([b": hello\n", b"event: state\n", b"id: 1\n", b"data: {}\n", b"\n"]))
    [Sent(name='state', id='1', data='{}')]
    """
    name, id, data, size = "message", None, list[str](), 0
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            if data or id is not None:
                yield Sent(name, id, "\n".join(data))
            name, id, data, size = "message", None, [], 0
            continue
        size += len(text)
        if size > _MOST_BYTES:
            raise ValueError(f"an event has more than {_MOST_BYTES} bytes")
        field, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id":
            id = value


# What `follow` tells: who speaks from now on, an entry, the id of a slot that is gone, or why
# nothing is known.
Told = Union[Identity, Mapping[str, Any], str, HookError]


def follow(
    agent: RemoteAgent,
    stopped: Stop,
    until: Optional[float] = None,
    id: Optional[str] = None,
    speaker: Optional[Speaker] = None,
) -> Generator[Told, None, None]:
    """What an agent tells, until ``stopped`` or that time: every slot as it is, then each change.

    ``speaker``: whose word counts; that another one answers is a failure, too.
    An agent that does not answer is asked again, and each failure told.
    """
    last_id: Optional[str] = None
    pause = PAUSE
    while not stopped.is_set():
        try:
            with agent.events(SILENCE, until, stopped, last_id, id) as lines:
                for number, sent in enumerate(sent_events(lines)):
                    if stopped.is_set():
                        return
                    told = _told(agent, sent)
                    if number == 0:
                        who = told if isinstance(told, Identity) else UNREGISTERED
                        if speaker is not None:
                            speaker.check(who)
                        if who is not told:
                            yield who
                    pause = PAUSE
                    last_id = sent.id if sent.id is not None else last_id
                    if told is not None:
                        yield told
        except HookError as error:
            if stopped.is_set():
                return
            if until is not None and time.monotonic() >= until:
                return
            yield error
        except ValueError as error:
            yield agent.garbled(str(error))
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                return
            stopped.wait(min(pause, left))
        else:
            stopped.wait(pause)
        pause = min(pause * 2, LONGEST_PAUSE)


def _told(agent: RemoteAgent, sent: Sent) -> Optional[Told]:
    """Raises Unreachable for what is no agent's."""
    if sent.name not in ("state", "removed", AGENT):
        return None  # `reset`: all slots follow; or only an id
    try:
        found = json.loads(sent.data)
    except (ValueError, RecursionError) as error:
        raise agent.garbled(f"an event is not JSON ({str(error)[:80]})") from error
    if sent.name == AGENT:
        return Identity.told(found)
    if sent.name == "removed":
        return str(found.get("id")) if isinstance(found, dict) else None
    return agent.checked_entry(found)


def changes_of(
    slot: RemoteSlot, timeout: Optional[float]
) -> Generator[Mapping[str, Any], None, None]:
    """What the agent says of one slot: as it is, and at each change; ends after ``timeout``."""
    until = None if timeout is None else time.monotonic() + timeout
    with contextlib.closing(follow(slot.agent, Stop(), until, slot.id, slot.speaker)) as all_told:
        for told in all_told:
            if isinstance(told, Mapping) and told["id"] == slot.id:
                yield told


class Follower:
    """Several agents at once, a thread each; what they tell comes out of one queue."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[tuple[RemoteAgent, Told]] = queue.SimpleQueue()
        self._stopped: dict[str, Stop] = {}

    def follow(self, agents: Iterable[RemoteAgent]) -> None:
        """From now on these and no others."""
        wanted = {agent.url: agent for agent in agents}
        for url in self._stopped.keys() - wanted.keys():
            self._stopped.pop(url).set()
        for url in wanted.keys() - self._stopped.keys():
            stopped = self._stopped[url] = Stop()
            threading.Thread(
                target=self._run, args=(wanted[url], stopped), name="follow", daemon=True
            ).start()

    def next(self, timeout: float) -> Optional[tuple[RemoteAgent, Told]]:
        try:
            return self.told.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None

    def close(self) -> None:
        self.follow(())

    def _run(self, agent: RemoteAgent, stopped: Stop) -> None:
        for told in follow(agent, stopped):
            self.told.put((agent, told))
