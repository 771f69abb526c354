"""The slots of one agent, or of all agents in a registry, as one directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Optional, Union

from ..reader import Change, Directory, History, HookError, Slot
from ..reader.directory import slot_order
from ..reader.gathering import gather
from ..reader.slot import LOOK_AGAIN
from .access import Access
from .following import Following
from .identity import UNREGISTERED, Identity, Speaker, another
from .registry_reading import Registered, Registry
from .remote_agent import LISTING_TIMEOUT, LOOKUP_TIMEOUT, Listing, NoAgent, RemoteAgent
from .remote_slot import RemoteSlot
from .wire import Peer


class Member(NamedTuple):
    """A slot that belongs to a directory, whether or not its agent answers."""

    agent: RemoteAgent
    id: str
    name: str
    failure: Optional[HookError] = None


class RemoteDirectory(Directory):
    """What one agent and a registry of agents have in common.

    Defines every method of `Directory` anew: none of them reads a file.
    """

    @property
    def place(self) -> str:
        return self.path

    def slots(self) -> list[Slot]:
        """Every slot; one whose agent does not answer raises `Unreachable` when it is read."""
        return list(self._remote_slots())

    def _remote_slots(self) -> list[RemoteSlot]:
        members = self._members()
        return [self.made(*one) for one in sorted(members, key=lambda one: slot_order(one.name))]

    def made(
        self, agent: RemoteAgent, id: str, name: str, failure: Optional[HookError] = None
    ) -> RemoteSlot:
        return RemoteSlot(agent, id, name, failure, self.speaker(agent, name))

    def slot(self, name: str) -> Slot:
        raise NotImplementedError

    def slots_at(self, addresses: Collection[int]) -> list[Slot]:
        """The slots that have something at one of the addresses, and those that nobody answers for.

        Each agent looks into its own documents.  Raises HookError.
        """
        slots = self._remote_slots()
        if len(slots) == 1 or len(addresses) > MOST_ADDRESSES:
            return list(slots)
        agents = {slot.agent.url: slot for slot in slots if slot.failure is None}

        def asked(one: RemoteSlot) -> Callable[[], dict[str, Optional[str]]]:
            return lambda: _united(one.agent.ids_at(address, one.speaker) for address in addresses)

        found = gather(
            {url: asked(one) for url, one in agents.items()}, LOOKUP_TIMEOUT * len(addresses)
        )
        kept: list[Slot] = []
        for slot in slots:
            answer = found.get(slot.agent.url, {})
            if isinstance(answer, HookError):
                slot.fail(answer)
            elif (problem := answer.get(slot.id)) is not None:
                slot.fail(HookError(f"{slot.directory} cannot look into it: {problem}"))
            elif slot.id not in answer and slot.failure is None:
                continue
            kept.append(slot)
        return kept

    def histories(self, since: Optional[float] = None, kind: Optional[str] = None) -> list[History]:
        """The events of each slot that is listed now; see `Directory.histories`."""
        return [slot.history(since, kind) for slot in self.slots()]

    def events(self, timeout: Optional[float] = None) -> Iterator[Change]:
        """First every slot as it is, then every change, as the agents tell them at once.

        Of an agent that stops to answer every slot has a problem; it is asked again.
        Ends after ``timeout`` seconds; None: never.  Raises HookError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        following = Following(self)
        try:
            while True:
                yield from following.renew()
                left = LOOK_AGAIN if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return
                yield from following.changes(min(left, LOOK_AGAIN))
        finally:
            following.follower.close()

    # -- what the two differ in

    def _members(self) -> list[Member]:
        """Every slot that there is.  Raises HookError."""
        raise NotImplementedError

    def _agents(self) -> list[RemoteAgent]:
        """Whom to follow, also where they do not answer.  Raises HookError."""
        raise NotImplementedError

    def name_of(self, agent: RemoteAgent, id: str) -> str:
        """What a slot of an agent is called here."""
        raise NotImplementedError

    def speaker(self, agent: RemoteAgent, name: str) -> Optional[Speaker]:
        """Who is believed at the agent's address; None: whoever answers."""
        return None

    def speaks(self, agent: RemoteAgent) -> bool:
        """Whether who answers at an agent's address is who was meant."""
        return True

    def mistaken(self, agent: RemoteAgent) -> list[Member]:
        """Slots that are registered with an agent's address, where another one answers."""
        return []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r}>"


# More addresses than these are looked up in documents that are read once.
MOST_ADDRESSES = 16


class AgentDirectory(RemoteDirectory):
    """The slots of one agent."""

    def __init__(self, url: str, access: Access) -> None:
        self.agent = RemoteAgent(url, access)
        super().__init__(self.agent.url)

    def slot(self, name: str) -> Slot:
        return RemoteSlot(self.agent, name)

    def _members(self) -> list[Member]:
        listing = self.agent.listing()
        found = [Member(self.agent, id, id) for id in listing.entries]
        if not found and listing.problems:
            raise HookError(listing.problems[0])
        # What the agent cannot read is a part of what was asked for: it has a line of its own.
        for number, problem in enumerate(listing.problems, 1):
            name = f"(unreadable directory {number})"
            found.append(Member(self.agent, name, name, HookError(problem)))
        return found

    def _agents(self) -> list[RemoteAgent]:
        return [self.agent]

    def name_of(self, agent: RemoteAgent, id: str) -> str:
        return id


class RegistryDirectory(RemoteDirectory):
    """The slots of every agent that a registry names: ``{hostname}:{id of the slot there}``."""

    def __init__(self, path: str, registry: Registry, access: Access) -> None:
        super().__init__(path)
        self._registry = registry
        self._access = access
        self._by_url: dict[str, RemoteAgent] = {}
        self._rows: dict[str, list[Registered]] = {}  # by the agent's URL
        # What has left the registry, too.
        self._called: dict[tuple[str, str], str] = {}
        self._identities: dict[tuple[str, str], Identity] = {}  # by the agent's URL and the name

    def slot(self, name: str) -> Slot:
        for one in self._members():
            if one.name == name:
                return self.made(*one)
        raise HookError(
            f"no slot {name} is registered in {self.path}; a slot there is called HOST:SLOT"
        )

    def _members(self) -> list[Member]:
        rows = self._registry.slots()
        agents = self._agents_of(rows)
        known = [agent for agent in agents.values() if isinstance(agent, RemoteAgent)]
        listings = gather({agent.url: agent.listing for agent in known}, LISTING_TIMEOUT + 1.0)
        return [self._member(row, agents, listings) for row in rows]

    def _member(
        self,
        row: Registered,
        agents: Mapping[str, Union[RemoteAgent, HookError]],
        listings: Mapping[str, Union[Listing, HookError]],
    ) -> Member:
        agent = HookError(f"{row.name}: {row.problem}") if row.url is None else agents[row.url]
        if isinstance(agent, HookError):
            return Member(NoAgent(self.path, str(agent)), row.id, row.name, agent)
        listing = listings[agent.url]
        failure: Optional[HookError] = None
        if isinstance(listing, HookError):
            failure = listing
        elif listing.identity != row.identity:
            failure = another(row.name, agent.url)
        elif row.id not in listing.entries:
            failure = HookError(
                f"slot {row.name} is registered, and its agent at {agent.url} does not have it: "
                f"its server has just ended; look again"
            )
        elif _is_of_another_run(row, listing.entries[row.id]):
            failure = HookError(
                f"slot {row.name} is registered for another run of its server than {agent.url} "
                f"has now: its server has just been started anew; look again"
            )
        return Member(agent, row.id, row.name, failure)

    def _agents_of(self, rows: Collection[Registered]) -> dict[str, Union[RemoteAgent, HookError]]:
        found: dict[str, Union[RemoteAgent, HookError]] = {}
        for url in dict.fromkeys(row.url for row in rows if row.url is not None):
            try:
                agent = self._by_url.get(url) or RemoteAgent(url, self._access, True)
            except HookError as error:
                found[url] = error
            else:
                found[url] = self._by_url[url] = agent
        for url in self._by_url.keys() - found.keys():
            del self._by_url[url]
        by_agent: dict[str, list[Registered]] = {}
        for row in rows:
            at = found.get(row.url or "")
            if isinstance(at, RemoteAgent):
                by_agent.setdefault(at.url, []).append(row)
                self._called[at.url, row.id] = row.name
                self._identities[at.url, row.name] = row.identity
        self._rows = by_agent
        return found

    def _agents(self) -> list[RemoteAgent]:
        agents = self._agents_of(self._registry.slots())
        return [agent for agent in agents.values() if isinstance(agent, RemoteAgent)]

    def name_of(self, agent: RemoteAgent, id: str) -> str:
        named = [row for row in self._rows.get(agent.url, ()) if row.id == id]
        for row in sorted(named, key=lambda one: one.identity != agent.identity):
            return row.name
        known = self._called.get((agent.url, id))
        return known if known is not None else f"{agent.url.partition('://')[2]}:{id}"

    def speaker(self, agent: RemoteAgent, name: str) -> Optional[Speaker]:
        hostname, _, id = name.partition(":")

        def look_up() -> Optional[Identity]:
            row = self._registry.slot(hostname, id)
            if row is None or row.url is None or Peer(row.url, self._access).url != agent.url:
                return None
            return row.identity

        known = self._identities.get((agent.url, name), UNREGISTERED)
        return Speaker(name, agent.url, known, look_up)

    def speaks(self, agent: RemoteAgent) -> bool:
        rows = self._rows.get(agent.url, ())
        return any(row.identity == agent.identity for row in rows)

    def mistaken(self, agent: RemoteAgent) -> list[Member]:
        return [
            Member(agent, row.id, row.name, another(row.name, agent.url))
            for row in self._rows.get(agent.url, ())
            if agent.identity is not None and row.identity != agent.identity
        ]


def _is_of_another_run(row: Registered, entry: Mapping[str, Any]) -> bool:
    registered, now = row.value.get("instance"), (entry["state"] or {}).get("instance")
    return isinstance(registered, str) and isinstance(now, str) and registered != now


def _united(answers: Iterable[dict[str, Optional[str]]]) -> dict[str, Optional[str]]:
    """A slot is in it if it is in one of them; a problem in one is a problem."""
    found: dict[str, Optional[str]] = {}
    for answer in answers:
        for id, problem in answer.items():
            found[id] = found.get(id) or problem
    return found
