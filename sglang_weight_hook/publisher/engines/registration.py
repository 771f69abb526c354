"""What the engines share: what is registered of which slot, and bringing it up to date.

An engine is one a process, and its slots may share memory (a draft uses its target's embedding).
So what is registered is the union of what the slots want, overlapping spans made one, and an event
costs the calls that the difference of two such unions needs: none where nothing moved.

**What a stale reader can do.**  A reader may ask for an address at any time, also one that was
right an hour ago.  Seen (docs/subscribers.md, `tests/unit/engines/test_stale_readers.py`): Mooncake
over TCP refuses what is not registered, and survives (EFAULT) what is registered and unmapped.
NIXL over TCP reads any address it is asked for, deregistered or not, in the server: an unmapped one
ends the server by SIGSEGV, memory of a GPU as well.  So with an engine that does not survive it
(`Engine.survives`) an address stays valid for as long as the engine can be reached: either its
storage is kept alive here, or the engine is closed before (`Engine.close`), which no old
metadata outlives.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Optional, Protocol

from ...layout.states import FAILED, READY, RESIDENT, WEIGHTS
from ...layout.transport_document import REGISTERED, REGISTRATION_FAILED, WITHDRAWN
from .. import transport
from ..subscribers import Diff, Event
from .reachability import warnings_about

DRAM, VRAM = "DRAM", "VRAM"
HOST = "cpu"  # as torch names it


class Span(NamedTuple):
    """Memory to be registered at once."""

    ptr: int
    size: int  # bytes
    device: str = HOST  # of torch

    @property
    def memory(self) -> str:
        return DRAM if self.device == HOST else VRAM

    @property
    def device_id(self) -> int:
        return int(self.device.partition(":")[2] or 0)


# Effects that write in place as a rule: what is replaced all the same is little, and is kept alive
# until it is no longer registered.  Others may replace all weights: on a GPU there is no room to
# keep both.
_IN_PLACE = frozenset(("stream", "relocate"))
# Effects after which nothing of before can be expected to be there.
_ANEW = frozenset(("load", "build"))


class EngineFailed(Exception):
    """Why an engine does not serve the weights, for people."""


class Engine(Protocol):
    """One transfer engine.  What raises, raises EngineFailed."""

    name: str
    # Whether the server survives the reading of a registered address that is valid no more, by kind
    # of memory.
    survives: Mapping[str, bool]
    # Whether nobody reads any more what was deregistered; else only `close` sees to that.
    deregistering_is_fence: bool

    def open(self) -> None:
        """Be ready to register; does nothing where it is."""

    def exchange(self, old: list[Span], new: list[Span]) -> None:
        """Deregister ``old``, register ``new``."""

    def close(self) -> None:
        """Serve nothing any more, nor anybody who knows how it was reached."""

    def fields(self) -> dict[str, Any]:
        """Its own fields of the transport document."""

    def facts(self) -> dict[str, Any]:
        """What `reachability.warnings_about` wants to know of it."""


class _Slot:
    """What is known of one slot."""

    def __init__(self) -> None:
        self.wanted: frozenset[Span] = frozenset()
        self.held: list[Any] = []  # storages, alive as long as they are registered
        self.document: Mapping[str, Any] = {}
        self.state = WITHDRAWN
        self.problem: Optional[str] = None
        self.warnings: list[str] = []
        self.device = HOST
        self.reached: Optional[dict[str, Any]] = None  # the engine's fields, as published
        self.version = -1  # of what the engine had registered when this was brought up to date


class Registration:
    """The subscriber around an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slots: dict[str, _Slot] = {}
        self._headers: dict[str, Span] = {}  # by slot; they stay registered when it is gone
        self._registered: frozenset[Span] = frozenset()
        self._version = 0  # rises with each change of what is registered

    # -- the protocol

    def before(self, slot: str, event: Event) -> None:
        known = self._slots.get(slot)
        if known is None or not known.wanted or not self._must_withdraw(known, event):
            return
        known.wanted, known.state = frozenset(), WITHDRAWN
        try:
            if self._engine.deregistering_is_fence:
                self._bring_up_to_date()
            else:
                self._close()
        finally:
            known.held = []
            self._publish(slot, known)
            self._publish_others()

    def missed(self, slot: str, event: Event) -> None:
        """As `before`, too late: what was asked meanwhile was asked of memory that may be gone."""
        self.before(slot, event)

    def after(self, slot: str, document: Mapping[str, Any], diff: Diff) -> None:
        known = self._slots.setdefault(slot, _Slot())
        known.document = document
        if self._stands(known, document, diff):
            self._publish(slot, known)
            return
        before = known.wanted
        known.wanted = frozenset()
        if _is_servable(document):
            regions = (*diff.regions_kept, *diff.regions_added)
            known.wanted = frozenset(map(Span._make, regions))
            known.device = regions[0].device
        elif document["state"] not in (READY, FAILED) and not before and slot not in self._headers:
            return  # it is being loaded: everything will move once more
        try:
            self._serve(slot, known, before if diff.repaged else frozenset())
            known.problem = None
            known.state = REGISTERED if known.wanted else WITHDRAWN
        except EngineFailed as error:
            known.problem, known.state = str(error), REGISTRATION_FAILED
            known.wanted, known.held = frozenset(), []
        known.warnings = warnings_about(document, self._engine.name, self._engine.facts())
        self._publish(slot, known)
        self._publish_others()
        if known.problem is not None:
            raise EngineFailed(known.problem)

    def gone(self, slot: str) -> None:
        known = self._slots.pop(slot, None)
        if known is None:
            return
        try:
            if self._slots:
                self._bring_up_to_date()
            else:
                # Also at the end of the process, where an engine whose threads still run was seen
                # to crash in the destructors of its library.
                self._headers.clear()
                self._close()
        finally:
            known.held = []
            self._publish_others()

    # -- what is registered

    def _stands(self, known: _Slot, document: Mapping[str, Any], diff: Diff) -> bool:
        """Whether what the engine has registered of the slot is right: most events move nothing."""
        return (
            diff.registrations_hold
            and known.state == REGISTERED
            and known.version == self._version
            and _is_servable(document)
        )

    def _must_withdraw(self, known: _Slot, event: Event) -> bool:
        """Whether its addresses may be no more before `after` is called."""
        if WEIGHTS in event.releases or not event.effects.isdisjoint(_ANEW):
            return True
        return known.device != HOST and not event.effects <= _IN_PLACE

    def _serve(self, slot: str, known: _Slot, repaged: frozenset[Span]) -> None:
        """Register what the slot wants.  Raises EngineFailed."""
        self._engine.open()
        self._headers[slot] = Span(*transport.header_of(slot))
        held: list[Any] = []
        memory = Span(0, 0, known.device).memory
        if known.wanted and not self._engine.survives[memory]:
            try:
                held = transport.storages_of(slot)
            except Exception as error:
                raise EngineFailed(f"the weights cannot be kept where they are: {error}") from error
        self._bring_up_to_date(repaged)
        known.version = self._version
        known.held = held  # those of before are let go of now that they are not registered

    def _bring_up_to_date(self, repaged: Collection[Span] = ()) -> None:
        """Register what all slots want.  ``repaged``: anew, though the addresses are the same."""
        spans = [span for known in self._slots.values() for span in known.wanted]
        wanted = _union([*self._headers.values(), *spans])
        void = _holding(self._registered, repaged)
        old = sorted((self._registered - wanted) | void)
        new = sorted(wanted - (self._registered - void))
        if not old and not new:
            return
        try:
            self._engine.exchange(old, new)
        except EngineFailed:
            # How far it came is not known: begin anew with the next event.
            self._close()
            raise
        self._registered = wanted
        self._version += 1

    def _close(self) -> None:
        self._engine.close()
        self._registered = frozenset()
        self._version += 1

    # -- what is published

    def _publish(self, slot: str, known: _Slot) -> None:
        document = known.document
        serves = known.state == REGISTERED
        header = self._headers.get(slot)
        known.reached = self._engine.fields()
        place = Span(0, 0, known.device)
        transport.publish_entry(
            slot,
            self._engine.name,
            {
                "state": known.state,
                "problem": known.problem,
                "warnings": known.warnings,
                "layout_generation": document["layout_generation"],
                "content_generation": document["content_generation"],
                "physical_epoch": document["physical_epoch"],
                "regions": len(known.wanted) if serves else 0,
                "bytes": sum(span.size for span in known.wanted) if serves else 0,
                "header": {"ptr": header.ptr, "size": header.size}
                if header is not None and self._registered
                else None,
                **known.reached,
                "memory": place.memory,
                "device_id": place.device_id,
            },
        )

    def _publish_others(self) -> None:
        """Where the engine is reached in another way than before, that concerns all slots."""
        reached = self._engine.fields()
        for name, known in self._slots.items():
            if known.reached is not None and known.reached != reached:
                self._publish(name, known)


def _is_servable(document: Mapping[str, Any]) -> bool:
    """Whether there are weights behind the addresses, and the engine around them is built."""
    return (
        document["state"] in (READY, FAILED)
        and document["residency"].get(WEIGHTS) == RESIDENT
        and bool(document["regions"])
    )


def _union(spans: Iterable[Span]) -> frozenset[Span]:
    """The spans, those that overlap made one.

    >>> [span[:2] for span in sorted(_union(map(Span, (10, 0, 12, 4), (5, 4, 8, 2))))]
    [(0, 4), (4, 2), (10, 10)]
    """
    merged: list[Span] = []
    end = -1
    for span in sorted(spans):
        ptr, size, _ = span
        if ptr >= end:
            merged.append(span)
            end = ptr + size
        elif ptr + size > end:
            end = ptr + size
            merged[-1] = merged[-1]._replace(size=end - merged[-1].ptr)
    return frozenset(merged)


def _holding(union: Iterable[Span], spans: Collection[Span]) -> set[Span]:
    """Those of a `_union` in which the spans lie.

    >>> sorted(_holding([Span(0, 4), Span(8, 8)], [Span(9, 1), Span(4, 2)]))
    [Span(ptr=8, size=8, device='cpu')]
    """
    if not spans:
        return set()
    ordered = sorted(union)
    starts = [one.ptr for one in ordered]
    found = set()
    for span in spans:
        index = bisect.bisect_right(starts, span.ptr) - 1
        if index >= 0 and span.ptr < starts[index] + ordered[index].size:
            found.add(ordered[index])
    return found
