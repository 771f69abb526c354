"""One slot as its node agent describes it: what `Slot` is for the files of this machine.

What the agent said of it in a listing counts for `FRESH` seconds; then the agent is asked again.
An agent that does not answer leaves everything unknown, and unknown is never ready.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Optional, Union

from ..layout import files
from ..layout.documents import STATE_SCHEMA
from ..layout.header import Header
from ..layout.layout_document import Memory
from ..reader import (
    Check,
    Document,
    HeaderReader,
    History,
    HookError,
    PastEvent,
    Slot,
)
from ..reader.files import check_schema
from ..reader.history import event_of
from ..reader.ownership import Liveness, process_of
from ..reader.slot import belong_together, generation_of, settled, state_of
from .identity import Speaker
from .remote_agent import FRESH, RemoteAgent

_SUMS = ("weights_bytes", "kv_cache_bytes", "lora_bytes", "off_device_bytes")
_GENERATIONS = ("layout_generation", "content_generation")


class RemoteSlot(Slot):
    """A slot of a node agent.  Defines every method of `Slot` anew: none of them reads a file."""

    is_remote = True

    def __init__(
        self,
        agent: RemoteAgent,
        id: str,
        name: Optional[str] = None,
        failure: Optional[HookError] = None,
        speaker: Optional[Speaker] = None,
    ) -> None:
        """``id``: at the agent; ``name``: here, where slots of several agents are together.

        ``failure``: why the listing that named the slot knows nothing of it; ``speaker``: who is
        believed at the agent's address, None: whoever answers.
        """
        super().__init__(agent.url, name if name is not None else id)
        self.agent = agent
        self.id = id
        self.failure = failure
        self.speaker = speaker
        self._failed_at = time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        from .opening import reopened

        named = self.agent.is_named_by_registry
        return reopened, (self.agent.url, named, self.id, self.name, self.speaker)

    def path(self, document: str) -> str:
        """Where the agent has one of `files.DOCUMENTS`: for messages."""
        place = f"{self.directory}/slots/{self.id}"
        return {files.LAYOUT: f"{place}/layout", files.STATE: f"{place}/state"}.get(document, place)

    # -- documents

    def read_state(self) -> dict[str, Any]:
        """The state document, at most `FRESH` seconds old.  Raises HookError."""
        state = self.state_if_any()
        if state is None:
            raise self._missing()
        return state

    def state_if_any(self) -> Optional[dict[str, Any]]:
        """The state document, or None where the agent has none (now).  Raises HookError."""
        entry = self._entry()
        if entry is None:
            return None
        if entry["problem"] is not None:
            raise HookError(
                f"{self.directory} cannot read slot {self.id}: {entry['problem'][:500]}"
            )
        state = entry["state"]
        if state is None:
            return None
        check_schema(state, STATE_SCHEMA, self.path(files.STATE))
        return dict(state)

    def read(self, timeout: float = 10.0) -> Document:
        """One consistent document, never two generations mixed: see `Slot.read`."""
        deadline = time.monotonic() + timeout
        pause = 0.02
        self.raise_failure()
        while True:
            before = self._state_now()
            layout = self.agent.layout(self.id, self.speaker)
            if layout is not None:
                after = self._state_now()
                if belong_together(before, layout, after):
                    return Document(self, layout, after)
                if (
                    before == after
                    and process_of(after) == process_of(layout["identity"])
                    and after["layout_generation"] < layout["layout_generation"]
                    and not self._liveness_now().alive
                ):  # the process died between a layout and its state
                    return Document(self, layout, {**after, **state_of(layout)})
            if time.monotonic() >= deadline:
                raise HookError(
                    f"slot {self.name} at {self.directory} has no settled document after "
                    f"{timeout:g} s (state {before['state']!r}): the model is still loading, or "
                    f"the layout could not be written; the state's \"problem\" and the server's "
                    f"log say which"
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.2)

    def read_for_sums(self, is_alone: bool) -> Document:
        """What `totals` needs: the agent's summary where that is enough, else the document.

        It is not where slots of one process may have storages in common, which the documents
        tell, or where the summary lacks a sum.
        """
        if is_alone:
            state, start = self.state_if_any(), self.start_of_layout()
            memory = start.get("memory") or {}
            if state is not None and all(_is_size(memory.get(name)) for name in _SUMS):
                raw = {**start, "updated_at": state.get("updated_at")}
                raw.update({name: state[name] for name in _GENERATIONS})
                return Document(self, raw, state)
        return self.read()

    def start_of_layout(self) -> dict[str, Any]:
        """Identity and sums of the layout, as the agent sums it up; empty without a layout."""
        entry = self._entry()
        summary = (entry or {}).get("summary") or {}
        if not summary:
            return {}
        memory = {name: value for name, value in summary.items() if name in _MEMORY}
        identity = {name: value for name, value in summary.items() if name not in _MEMORY}
        return {
            "identity": identity,
            "memory": memory,
            "checked_at": (entry or {}).get("checked_at"),
        }

    def legacy_files(self) -> Optional[dict[str, Any]]:
        """None: an agent does not hand these out."""
        return None

    def state_size(self) -> int:
        found = self.agent.state(self.id, self.speaker)
        if found is None:
            raise self._missing()
        return found[1]

    def history(self, since: Optional[float] = None, kind: Optional[str] = None) -> History:
        """The events of the slot's log, the oldest first; those that the agent hands out."""
        return RemoteHistory(self, since, kind)

    def transport(self) -> Optional[dict[str, Any]]:
        """What the server's transfer engines have registered; from an agent with a token."""
        self.raise_failure()
        found = self.agent.transport(self.id, self.speaker)
        entry = self.agent.entry(self.id, speaker=self.speaker)
        if found is None or entry is None:
            return None
        # It names the slot as its directory does, which is not what it is called here.
        if found.get("slot") != entry.get("slot"):
            raise self.agent.garbled(f"the transport document is not that of slot {self.id}")
        return {**found, "slot": self.name}

    # -- the owner

    def owner_alive(self) -> bool:
        """Whether the owner lives, as the agent sees it on its own host.  Raises HookError."""
        return self.liveness().alive

    def liveness(self) -> Liveness:
        """`owner_alive`, with whether that is certain and what it rests on.  Raises HookError."""
        entry = self._entry()
        if entry is None:
            raise self._missing()
        return self._liveness_in(entry)

    def _liveness_in(self, entry: Mapping[str, Any]) -> Liveness:
        if entry["problem"] is not None and not entry["owner_alive"] and not entry["certain"]:
            raise HookError(
                f"{self.directory} does not know whether the owner of slot {self.id} lives: "
                f"{entry['problem'][:500]}"
            )
        return Liveness(
            entry["owner_alive"], entry["certain"], f"{entry['why'][:500]} ({self.directory})"
        )

    def _liveness_now(self) -> Liveness:
        entry = self.agent.entry(self.id, 0.0, self.speaker)
        if entry is None:
            raise self._missing()
        return self._liveness_in(entry)

    # -- waiting

    def wait_for_change(
        self,
        since: Union[Document, Mapping[str, Any], None] = None,
        timeout: Optional[float] = None,
    ) -> Optional[dict[str, Any]]:
        """The state document as soon as it is another one; None after ``timeout`` seconds.

        See `Slot.wait_for_change`.  While the agent does not answer, it is asked again.
        """
        from .remote_events import changes_of

        known = since.state if isinstance(since, Document) else since
        if since is None:
            state = self.state_if_any()
            known = state
        with contextlib.closing(changes_of(self, timeout)) as changes:
            for found in changes:
                if found["state"] is None:
                    continue
                state = dict(found["state"])
                check_schema(state, STATE_SCHEMA, self.path(files.STATE))
                if state != known and not _is_older(state, known):
                    return state
        return None

    def generations(self, timeout: Optional[float] = None) -> Iterator[Document]:
        """The document as it is, then a new one at each change: see `Slot.generations`."""
        from .remote_events import changes_of

        seen: Any = None
        while True:
            for found in changes_of(self, timeout):
                state = found["state"]
                if state is None:
                    if seen is None and not found["owner_alive"]:
                        raise self._missing()
                    continue
                check_schema(state, STATE_SCHEMA, self.path(files.STATE))
                if settled(state) and generation_of(state) != seen:
                    document = self.read()
                    if settled(document.state) and generation_of(document.state) != seen:
                        seen = generation_of(document.state)
                        yield document
                        break  # the time without a new one begins again
                if not found["owner_alive"]:
                    return
            else:
                return

    # -- what takes being there

    def _refuse(self, what: str) -> None:
        raise self._elsewhere(what)

    def _elsewhere(self, what: str) -> HookError:
        return HookError(
            f"{what} of slot {self.name} can only be had on its own host, and this is "
            f"{self.directory} over the network; run this there, with --dir DIRECTORY, or read the "
            f"weights through a transfer engine of the server (--via)"
        )

    def header(self) -> Header:
        raise self._elsewhere("the header")

    def open_header(self) -> HeaderReader:
        raise self._elsewhere("the header")

    def check(self, timeout: float = 1.0) -> Check:
        raise self._elsewhere("a comparison of map and memory")

    @contextlib.contextmanager
    def weights_held(
        self, timeout: float = 10.0, check: bool = False, allow: Collection[str] = ()
    ) -> Iterator[None]:
        self._refuse("the lock")
        yield

    # -- the agent's answers

    def _entry(self) -> Optional[Mapping[str, Any]]:
        self.raise_failure()
        return self.agent.entry(self.id, speaker=self.speaker)

    def fail(self, failure: HookError) -> None:
        """From now on and for `FRESH` seconds nothing is known of the slot."""
        self.failure, self._failed_at = failure, time.monotonic()

    def raise_failure(self) -> None:
        if self.failure is not None:
            if time.monotonic() - self._failed_at <= FRESH:
                raise self.failure
            self.failure = None

    def _state_now(self) -> dict[str, Any]:
        found = self.agent.state(self.id, self.speaker)
        if found is None:
            raise self._missing()
        return found[0]

    def _missing(self) -> HookError:
        return HookError(
            f"{self.directory} has no state of a slot {self.id}; check the slot's name, and that "
            f"the server has loaded its model"
        )

    def __repr__(self) -> str:
        return f"<RemoteSlot {self.name!r} at {self.directory!r}>"


class RemoteHistory(History):
    """The events of one slot that an agent hands out; made by `RemoteSlot.history`."""

    def __init__(self, slot: RemoteSlot, since: Optional[float], kind: Optional[str]) -> None:
        super().__init__(slot.directory, slot.name, since, kind)
        self._remote = slot

    def __iter__(self) -> Iterator[PastEvent]:
        self.skipped = 0
        slot = self._remote
        slot.raise_failure()
        for raw in slot.agent.history(slot.id, self._since, self._kind, slot.speaker):
            event = event_of(self.slot, raw)
            if event is None:
                self.skipped += 1
            elif self._is_wanted(event):
                yield event


_MEMORY = frozenset(Memory.__annotations__)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_older(state: Mapping[str, Any], known: Optional[Mapping[str, Any]]) -> bool:
    """Whether an agent that lags behind still shows what was before ``known``, of one owner."""
    if known is None or process_of(dict(known)) != process_of(dict(state)):
        return False
    if known.get("instance") != state.get("instance"):
        return False
    now, before = (
        (one.get("layout_generation"), one.get("content_generation"), one.get("updated_at"))
        for one in (state, known)
    )
    comparable = all(isinstance(value, (int, float)) for value in (*now, *before))
    return comparable and now < before
