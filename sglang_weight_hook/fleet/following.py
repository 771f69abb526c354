"""The changes of all agents of a directory as one, and what is known of each slot."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Optional

from ..reader import Change, HookError
from ..reader.slot import LOOK_AGAIN
from .identity import Identity
from .remote_agent import RemoteAgent
from .remote_events import Follower, Told
from .remote_slot import RemoteSlot

if TYPE_CHECKING:
    from .remote_directory import Member, RemoteDirectory

Key = tuple[str, str]  # URL of the agent, id of the slot there


class Following:
    def __init__(self, directory: RemoteDirectory) -> None:
        self.directory = directory
        self.follower = Follower()
        self._known: dict[Key, tuple[Optional[dict[str, Any]], bool]] = {}
        self._problems: dict[Key, str] = {}
        self._kept_back: dict[Key, tuple[RemoteAgent, Told]] = {}  # of who is not registered (yet)
        # By URL, names of slots at whose registered address another agent is.
        self._mistaken: dict[str, frozenset[str]] = {}
        self._followed: dict[str, RemoteAgent] = {}
        self._is_registry_silent = False
        self._initial: Optional[set[Key]] = None
        self._looked_at = 0.0

    def renew(self) -> Iterator[Change]:
        """Follow whoever is there now; what is told of those who are not any more.

        Where a registry does not answer, whoever is followed is followed on.
        """
        if self._initial is not None and time.monotonic() - self._looked_at < LOOK_AGAIN:
            return
        self._looked_at = time.monotonic()
        try:
            if self._initial is None:
                self._initial = {(one.agent.url, one.id) for one in self._listed()}
            yield from self.changes(0.0)  # who goes may have said what became of its slots
            agents = self.directory._agents()
        except HookError as error:
            self._initial = self._initial or set()
            if not self._is_registry_silent:
                self._is_registry_silent = True
                yield from self._doubted(self._followed.values(), str(error))
            return
        self._is_registry_silent = False
        here = {agent.url: agent for agent in agents}
        left = [agent for url, agent in self._followed.items() if url not in here]
        self.follower.follow(agents)
        self._followed = here
        yield from self._doubted(
            left, "its agent is no longer registered, so nothing is known of it"
        )
        for agent in left:
            self._forget(agent)
        for agent in agents:
            yield from self._who_is_mistaken(agent)
        for key, (agent, told) in list(self._kept_back.items()):
            if self.directory.speaks(agent):
                del self._kept_back[key]
                yield from self._of(agent, told)

    def _doubted(self, agents: Iterable[RemoteAgent], problem: str) -> Iterator[Change]:
        """Each slot of the agents that lived when something was last known of it."""
        for agent in agents:
            for key, (_, lived) in list(self._known.items()):
                if key[0] == agent.url and lived:
                    yield from self._problem(agent, key, problem)

    def _forget(self, agent: RemoteAgent) -> None:
        """So that all is told again if it comes back."""
        everything: tuple[dict[Key, Any], ...] = (self._known, self._problems, self._kept_back)
        for kept in everything:
            for key in [key for key in kept if key[0] == agent.url]:
                kept.pop(key)
        self._mistaken.pop(agent.url, None)

    def _listed(self) -> list[Member]:
        try:
            return [one for one in self.directory._members() if one.failure is None]
        except HookError:  # nobody there yet
            return []

    def changes(self, timeout: float) -> Iterator[Change]:
        until = time.monotonic() + timeout
        while (told := self.follower.next(until - time.monotonic())) is not None:
            yield from self._of(*told)

    def _of(self, agent: RemoteAgent, told: Told) -> Iterator[Change]:
        if agent.url not in self._followed:
            return
        if isinstance(told, HookError):
            for key in [key for key in self._known if key[0] == agent.url]:
                yield from self._problem(agent, key, str(told))
            return
        if isinstance(told, Identity):
            agent.identity = told
            yield from self._who_is_mistaken(agent)
            return
        key = agent.url, told if isinstance(told, str) else told["id"]
        if not self.directory.speaks(agent):
            self._kept_back[key] = agent, told
        elif isinstance(told, str):
            state, lived = self._known.pop(key, (None, False))
            self._problems.pop(key, None)
            if lived:
                yield Change(self._slot(agent, told), state, False, False)
        elif told["problem"] is not None:
            yield from self._problem(agent, key, told["problem"])
        else:
            yield from self._entry(agent, key, told["state"], told["owner_alive"])

    def _entry(
        self, agent: RemoteAgent, key: Key, state: Optional[dict[str, Any]], alive: bool
    ) -> Iterator[Change]:
        self._problems.pop(key, None)
        before, lived = self._known.get(key, (None, False))
        self._known[key] = state, alive
        initial = key in (self._initial or ())
        (self._initial or set()).discard(key)
        if (state is not None and state != before) or (lived and not alive):
            yield Change(self._slot(agent, key[1]), state or before, alive, initial)

    def _who_is_mistaken(self, agent: RemoteAgent) -> Iterator[Change]:
        """Each once, until another one registers it."""
        mistaken = {one.name: one for one in self.directory.mistaken(agent)}
        before = self._mistaken.get(agent.url, frozenset())
        self._mistaken[agent.url] = frozenset(mistaken)
        for name in mistaken.keys() - before:
            one = mistaken[name]
            state, lived = None, False
            if not self.directory.speaks(agent):  # what was known is its, and not another slot's
                state, lived = self._known.pop((agent.url, one.id), (None, False))
            slot = self.directory.made(*one)
            yield Change(slot, state, lived, False, str(one.failure))

    def _problem(self, agent: RemoteAgent, key: Key, problem: str) -> Iterator[Change]:
        state, lived = self._known.setdefault(key, (None, False))
        if self._problems.get(key) != problem:
            self._problems[key] = problem
            slot = self._slot(agent, key[1])
            yield Change(slot, state, lived, False, f"slot {slot.name}: {problem}")

    def _slot(self, agent: RemoteAgent, id: str) -> RemoteSlot:
        return self.directory.made(agent, id, self.directory.name_of(agent, id))
