"""One model runner: its slot, its state, its event under way, and what was captured last.

The recorder drives it under its mutex: `enter` and `leave` around each of SGLang's calls, then,
when the last call has left, `look` (capture and compare) and `publication.publish`.  What fails in
here is turned into a problem that the state file names; the old addresses are never left standing
as current.

`still_holds` alone is called without the mutex, by the thread that checks.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Optional

from ..layout import files, process
from ..layout.documents import ATTRIBUTE
from ..layout.states import (
    FAILED,
    KV_CACHE,
    LOADING,
    READY,
    RELEASED,
    RESIDENT,
    TAGS,
    UPDATING,
    WEIGHTS,
)
from . import capture as capturing
from . import devices, diffusion, document, identity, once, publish, settings, sharing
from .capture import Capture
from .document import Changes
from .events import STREAMING, UNANNOUNCED, Call, Event
from .header import HeaderFile, MemoryHeader, Unproven

NO_CHANGES = Changes(0, 0, 0, ())

# Unannounced moves of a plain attribute after which it is left out of the map.
RESTLESS = 5


class Tracked:
    """See the module.  ``others`` gives the process's other runners."""

    def __init__(
        self,
        runner: Any,
        slot: publish.Slot,
        load_order: int,
        others: Callable[[Tracked], list[Tracked]],
    ) -> None:
        self.runner, runner = diffusion.reference(runner), diffusion.runner_of(runner)
        self.slot = slot
        self.load_order = load_order
        self.others = others
        self.gpu_id = identity.gpu_id(runner)
        self.role = "draft" if identity.is_draft(runner) else "target"
        self.process = process.identity()
        # A runner made again in this process starts with new generations; this tells them apart.
        self.instance = os.urandom(8).hex()
        self.header: Optional[HeaderFile] = None
        self.memory_header: Optional[MemoryHeader] = None  # where an engine may register it
        # What the memory header is to say once the device has done what it was asked.
        self.unproven: Optional[Unproven] = None
        self.missing: list[str] = []

        self.state = LOADING
        self.layout_generation = self.content_generation = 0
        self.physical_epoch = self.kv_physical_epoch = 0
        self.residency = dict.fromkeys(TAGS, RESIDENT)
        self.doubtful: set[str] = set()  # tags that a failed release may have released
        self.settled = False  # whether the engine around the runner is built
        self.updated = False  # whether its weights were changed since they were loaded
        self.told_updated = False  # whether the published files say so
        self.summary: Optional[dict[str, Any]] = None  # of the last update
        self.broken = False  # a call that writes weights failed, perhaps half way
        self.problem: Optional[str] = None

        self.captured: Optional[Capture] = None
        self.storages = document.Storages({}, {}, {})
        self.device = devices.of(identity.device_type(runner))
        self.context: Optional[int] = None  # the device's, in which it was captured last
        self.layout_digest = ""  # of the published layout file
        self.checked_at: Optional[float] = None  # when map and memory were last found equal

        self.event: Optional[Event] = None  # the one under way
        self.inside: weakref.WeakSet[Call] = weakref.WeakSet()
        self.openers: set[int] = set()  # ids of the runners whose sessions are open
        self.stream_open = False  # between the buckets of a stream
        self.waits_for_lock = False  # the event has not begun to change anything
        self.unseen = False  # an event has ended untold, and nothing was captured since
        # Rises with everything that happens here, so that who looks without the mutex knows
        # whether anything has happened meanwhile.
        self.version = 0
        # Between look and publish: what there is to publish.
        self.invalidated: Optional[str] = None
        self.state_only = False
        self.changes = NO_CHANGES
        self.capture_seconds = 0.0
        # How often forwards have moved a plain attribute, by name; and those that are left out.
        self.restless: Counter[str] = Counter()
        # The background thread's schedule, in time.monotonic().
        self.check_step = 0  # how many checks there were since the last event
        self.event_ended_at = self.looked_at = self.thorough_at = 0.0

    # -- around SGLang's calls

    def enter(self, call: Call, kind: str, effect: str) -> bool:
        """A call begins; whether it begins an event, so that `hold` is next."""
        self.version += 1
        event = self.event
        if event is not None and (self.inside or self.openers or self.stream_open):
            self.inside.add(call)
            event.add(kind, effect)
            self.stream_open = False
            return False
        self.inside.add(call)
        # A call whose end was never reported may have written before.
        lost = event is not None
        self.unseen = self.unseen or lost
        self.updated = self.updated or (lost and self.settled)
        self.broken = self.broken or (event is not None and event.write_failed)
        self.event = Event(kind, effect)
        self.event.changed_content = lost
        return True

    def hold(self, patience: float) -> None:
        """Take the lock, waiting ``patience`` seconds at most, and say that weights change."""
        self.waits_for_lock = True
        try:
            self.slot.lock(patience)
        finally:
            self.version += 1
            self.waits_for_lock = False
            # An expert relocation moves values, no memory, in a forward, which waits for nothing:
            # what a reader was given meanwhile it throws away.
            if self.event is None or self.event.effects != {"relocate"}:
                sharing.wait_for_copies()
        self.state = UPDATING if self.settled else LOADING

    def ends_stream_before(self, kind: str, effect: str) -> bool:
        """Whether the open stream is over before a call of this kind begins."""
        return self.stream_open and not (
            self.event is not None and self.event.continues(kind, effect)
        )

    def leave(self, call: Call) -> bool:
        """A call ends; whether that was the last one of the event."""
        self.device.mark()
        self.version += 1
        self.inside.discard(call)
        return self.event is not None and not self.inside and not self.openers

    def may_stay_open(self) -> bool:
        """Whether the event that has just ended is a stream that further buckets may continue."""
        event = self.event
        return (
            event is not None
            and event.is_stream
            and self.settled
            and self.captured is not None
            and self.problem is None
            and not self.unseen
        )

    def keep_open(self) -> None:
        """Wait for further buckets: nothing is looked at and nothing is written."""
        assert self.event is not None
        self.event.last_return = time.monotonic()
        self.stream_open = True

    @property
    def is_busy(self) -> bool:
        """Whether weights may be changing now."""
        return self.event is not None and not self.waits_for_lock

    @property
    def is_whole(self) -> bool:
        """Whether the weights are there, and none of them is about to change."""
        return (
            self.state == READY
            and not self.is_busy
            and self.captured is not None
            and self.residency[WEIGHTS] == RESIDENT
        )

    def in_context(self) -> AbstractContextManager[None]:
        """Ask its device as the thread does that captured it last."""
        return self.device.using_context(self.context)

    # -- when the last call has left

    def look(self, stands: Optional[bool] = None) -> None:
        """Capture the runner and compare; `publication.publish` tells what came of it.

        ``stands``: the answer of `still_holds`, where it was asked already.
        """
        self.invalidated, self.state_only, self.changes = None, False, NO_CHANGES
        runner = self.runner()
        if runner is None or self.event is None:
            return
        self.slot.keep()
        started = time.perf_counter()
        self.device = devices.of(identity.device_type(runner))
        self.context = self.device.current_context() or self.context
        try:
            self._look(runner, self.event, stands)
        finally:
            self.capture_seconds = time.perf_counter() - started

    def _look(self, runner: Any, event: Event, stands: Optional[bool]) -> None:
        try:
            if self._documents_stand(runner, event, stands):
                self.content_generation += event.changed_content
                self.state_only = True
                self.state = self._state_after(event)
                self.checked_at = time.time()
                return
            # While it loads, the map is one of the moment: no bucket is compared with it.
            captured = capturing.known_allocations(
                self.captured,
                capturing.capture(runner, footprint=self.settled, without=self._left_out()),
            )
        except Exception as error:
            self.lose(f"capture failed: {type(error).__name__}: {error}")
            return
        self._adopt(captured, event.changed_content)
        self.state = self._state_after(event)
        self.problem = None
        self.unseen = False

    def _adopt(self, captured: Capture, changed_content: bool) -> None:
        self.changes = document.changes(self.captured, captured)
        if not document.same_layout(self.captured, captured):
            self.layout_generation += 1
        if changed_content or self.content_generation == 0:
            self.content_generation += 1
        self.captured = captured
        self.storages = document.storages_of(captured)
        self.checked_at = time.time()

    def lose(self, problem: str) -> None:
        """We no longer know where the weights are: publish that, not the old addresses."""
        once.warn("invalidate " + self.slot.name, "%s; its map is invalidated", problem)
        self.problem = self.invalidated = problem
        self.captured = None
        self.storages = document.Storages({}, {}, {})
        self.layout_generation += 1
        self.content_generation += 1
        self.checked_at = None
        self.state = FAILED

    def _documents_stand(self, runner: Any, event: Event, stands: Optional[bool]) -> bool:
        """Whether buckets came in and left every tensor where the published documents say.

        At the end of a session the legacy files must say that there was an update, and
        checksums are of the new values; and SGLang may have made tensors that no bucket had.
        """
        if event.effects - STREAMING - {"open", "close"} or self.problem or self.unseen:
            return False
        closes = "close" in event.effects
        if closes and (self.told_updated != self.updated or settings.load().checksum):
            return False
        if not self.slot.has(files.LAYOUT):
            return False
        if stands is None:
            stands = not capturing.moved(self.captured, runner)
        return stands and (not closes or capturing.nothing_new(self.captured, runner))

    def _state_after(self, event: Event) -> str:
        # What faults when touched comes first, then what may be half written.
        if self.residency[WEIGHTS] == RELEASED:
            return RELEASED
        if self.broken:
            return FAILED
        return READY if self.settled else LOADING

    # -- checking the map against memory

    def still_holds(self, thoroughly: bool) -> Optional[bool]:
        """Whether every tensor is where the map says; None where it can't be told now.

        Takes no lock and asks the device nothing.  ``thoroughly``: whether the model holds no
        tensor that the map lacks, too.
        """
        version, runner, captured = self.version, self.runner(), self.captured
        if runner is None or captured is None or self.is_busy:
            return None
        try:
            holds = not capturing.moved(captured, runner, _let_others_run)
            if holds and thoroughly:
                holds = capturing.nothing_new(captured, runner, pause=_let_others_run)
            if not holds:
                # Also where the quick look has no answer: a module made again, a tensor that
                # wraps others.
                with self.in_context():
                    found = capturing.known_allocations(
                        captured, capturing.capture(runner, without=captured.without)
                    )
                holds = document.same_layout(captured, found)
        except Exception:
            # The model was changing while we looked.
            return None
        return holds if self.version == version and captured is self.captured else None

    def find_unannounced(self) -> bool:
        """Capture what has moved without a call; whether there is something to publish.

        Under the mutex, with no event under way.
        """
        runner = self.runner()
        if runner is None or self.captured is None or self.event is not None:
            return False
        before, started = self.captured, time.perf_counter()
        with self.in_context():
            captured = capturing.known_allocations(
                before, capturing.capture(runner, without=self._left_out())
            )
            if self._grew_restless(before, captured):
                captured = capturing.known_allocations(
                    before, capturing.capture(runner, without=self._left_out())
                )
        if document.same_layout(before, captured):
            self.captured = captured  # with a footprint that the next look can use
            return False
        self.event = Event(UNANNOUNCED, UNANNOUNCED)
        self.event.calls = 0
        self.invalidated, self.state_only = None, False
        self._adopt(captured, changed_content=True)
        self.event.names = self.changes.names
        self.capture_seconds = time.perf_counter() - started
        self.version += 1
        return True

    def _left_out(self) -> list[str]:
        return [name for name, times in self.restless.items() if times >= RESTLESS]

    def _grew_restless(self, before: Capture, after: Capture) -> bool:
        """Count the plain attributes that have moved; whether one has done so too often.

        An attribute that every forward binds anew (a workspace, a batch's metadata) is no weight,
        and its address is stale as soon as it is published.
        """
        grown = False
        for name, row in after.tensors.items():
            old = before.tensors.get(name)
            if row.kind == ATTRIBUTE and old is not None and old != row:
                self.restless[name] += 1
                grown = grown or self.restless[name] >= RESTLESS
        return grown

    def stream_holds(self) -> Optional[bool]:
        """Whether the buckets of the open stream have left every tensor where it was.

        Without the mutex: the caller compares `version` before and after.
        """
        runner, captured = self.runner(), self.captured
        if runner is None or captured is None:
            return None
        try:
            return not capturing.moved(captured, runner, _let_others_run)
        except Exception:
            return None

    # -- what is published

    def standing(self) -> document.Standing:
        return document.Standing(
            self.instance,
            self.state,
            self.layout_generation,
            self.content_generation,
            self.physical_epoch,
            self.kv_physical_epoch,
            self.residency,
            self.checked_at,
        )

    def shares_storage_with(self, other: Tracked) -> bool:
        ours, theirs = self.storages, other.storages
        return not (ours.weights.keys() | ours.lora.keys()).isdisjoint(
            theirs.weights.keys() | theirs.lora.keys()
        )

    def released_bytes(self) -> int:
        """Bytes of this slot's storages that have no pages now."""
        by_tag = {WEIGHTS: self.storages.weights, KV_CACHE: self.storages.kv_cache}
        gone = [kind for tag, kind in by_tag.items() if self.residency[tag] == RELEASED]
        return sum(size for kind in gone for size in kind.values())


def _let_others_run() -> None:
    """Let SGLang's threads have the interpreter, between two pieces of a long look."""
    time.sleep(0)
