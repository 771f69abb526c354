"""One model runner: its slot, its state, and what was published about it last.

The recorder drives it: `enter` and `leave` around each of SGLang's calls, then, when the last
call has left, `look` (capture and compare) and `tell` (publish).  All of it under the
recorder's mutex.  What fails in here is turned into a problem that the state file names; the
old addresses are never left standing as current.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, Optional

from ..layout import files, process
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
from . import checksum, document, identity, legacy, memory, metrics, once, publish, settings
from .capture import Capture

_NO_CHANGES = {"moved": 0, "added": 0, "removed": 0}


class Call:
    """One call of SGLang's, for as long as it is under way.

    Held weakly: a call whose end is never told (an exception out of a signal handler, in one of
    our own lines) is over when nothing refers to it any more.
    """

    __slots__ = ("__weakref__",)


class Tracked:
    """See the module.  ``siblings`` gives the process's other runners."""

    def __init__(
        self,
        runner: Any,
        slot: publish.Slot,
        load_order: int,
        siblings: Callable[[Tracked], list[Tracked]],
    ) -> None:
        self.runner = weakref.ref(runner)
        self.slot = slot
        self.load_order = load_order
        self.siblings = siblings
        self.gpu_id = identity.gpu_id(runner)
        self.role = "draft" if identity.is_draft(runner) else "target"
        self.process = process.identity()
        self.missing: list[str] = []

        self.state = LOADING
        self.layout_generation = 0
        self.content_generation = 0
        self.physical_epoch = 0
        self.kv_physical_epoch = 0
        self.residency = dict.fromkeys(TAGS, RESIDENT)
        self.doubtful: set[str] = set()  # tags that a failed release may have released
        self.settled = False  # whether the engine around the runner is built
        self.updated = False  # whether its weights were changed since they were loaded
        self.told_updated = False  # whether the published files say so
        self.summary: Optional[dict[str, Any]] = None  # of the last update
        self.broken = False  # the last call that wrote weights failed, perhaps half way
        self.problem: Optional[str] = None

        self.captured: Optional[Capture] = None
        self.storages = document.Storages({}, {}, {})

        # The event under way: the calls inside it, and what they amount to.
        self.inside: weakref.WeakSet[Call] = weakref.WeakSet()
        self.under_way = False
        self.unseen = False  # an event has ended untold, and nothing was captured since
        self.openers: set[int] = set()  # ids of the runners whose sessions are open
        self.kind = ""
        self.effects: set[str] = set()
        self.started_at = 0.0
        self.calls = 0
        self.nested: dict[str, int] = {}
        self.success = True
        self.message: Optional[str] = None
        self.changed_content = False
        # Between look and tell: what there is to publish.
        self.withdrawn: Optional[str] = None
        self.state_only = False
        self.changes: dict[str, int] = _NO_CHANGES
        self.capture_seconds = 0.0

    # -- around SGLang's calls

    def enter(self, call: Call, kind: str, effect: str) -> None:
        """A call begins; the outermost takes the lock and says so in the state file."""
        is_nested = bool(self.inside or self.openers)
        self.inside.add(call)
        if is_nested:
            self.calls += 1
            self.effects.add(effect)
            self.nested[kind] = self.nested.get(kind, 0) + 1
            return
        self.kind, self.effects, self.calls, self.nested = kind, {effect}, 1, {}
        self.started_at = time.time()
        # Whoever never told the end of the last event may have written before.
        self.unseen = self.unseen or self.under_way
        self.success, self.message, self.changed_content = True, None, self.under_way
        self.updated = self.updated or (self.under_way and self.settled)
        self.under_way = True
        self.slot.lock()
        self.state = UPDATING if self.settled else LOADING
        self._write_state(self._event(success=None, finished_at=None, changes={}))

    def leave(
        self,
        call: Call,
        effect: str,
        opener: int,
        success: bool,
        message: Optional[str],
        changed: bool,
    ) -> bool:
        """A call ends; whether that was the last one of the event.

        ``opener``: the id of the runner whose session an ``open`` or ``close`` concerns.
        """
        self.success = self.success and success
        self.message = message if not success or self.message is None else self.message
        self.changed_content = self.changed_content or changed
        self.inside.discard(call)
        # A session stays open between its two calls; a draft that shares the target's
        # embedding takes part in both runners' sessions, and is done when both are.
        if effect == "open" and success:
            self.openers.add(opener)
        elif effect == "close":
            self.openers.discard(opener)
        return not self.inside and not self.openers

    # -- when the last call has left

    def look(self) -> None:
        """Capture the runner and compare; `tell` publishes what came of it."""
        self.withdrawn, self.state_only, self.changes = None, False, _NO_CHANGES
        runner = self.runner()
        if runner is None:
            return
        started = time.perf_counter()
        try:
            self._look(runner)
        finally:
            self.capture_seconds = time.perf_counter() - started

    def _look(self, runner: Any) -> None:
        try:
            if self._documents_stand(runner):
                self.content_generation += self.changed_content
                self.state_only = True
                self.state = self._state_after()
                return
            # While it loads, the map is one of the moment: no bucket is compared with it.
            captured = capturing.known_allocations(
                self.captured, capturing.capture(runner, footprint=self.settled)
            )
        except Exception as error:
            self._lose(f"capture failed: {type(error).__name__}: {error}")
            return
        self.changes = document.changes(self.captured, captured)
        if not document.same_layout(self.captured, captured):
            self.layout_generation += 1
        if self.changed_content or self.content_generation == 0:
            self.content_generation += 1
        self.captured = captured
        self.storages = document.storages_of(captured)
        self.state = self._state_after()
        self.problem = None
        self.unseen = False

    def tell(self) -> None:
        """Publish what `look` found, and let go of the lock."""
        try:
            runner = self.runner()
            if runner is not None:  # else collected meanwhile, and its slot reaped
                self._publish(runner)
        finally:
            self.under_way = False
            self.slot.unlock()

    def _publish(self, runner: Any) -> None:
        event = self._event(self.success, time.time(), self.changes)
        if self.withdrawn is None and not self.state_only:
            try:
                contents = self._documents(runner, event)
            except Exception as error:
                self._lose(f"no document could be made: {type(error).__name__}: {error}")
            else:
                self._write_documents(contents)
                self.told_updated = self.updated
        if self.withdrawn is not None:
            self._write_documents(self._empty_documents(event))
            self.remove(files.SUMMARY)
        elif self.state_only and "close" in self.effects and self.summary is not None:
            self.summary = legacy.renewed_summary(self.summary, time.time())
            self._write_documents({files.SUMMARY: self.summary})
        self._write_state(event)
        self._measure(runner, event)
        if self.starting and self.problem is None and self.captured is not None:
            once.info(
                f"published {self.slot.name} {self.kind}",
                "%s: %d tensors of slot %s are in %s",
                self.kind,
                len(self.captured.tensors),
                self.slot.name,
                self.slot.path(files.LAYOUT),
            )

    def _measure(self, runner: Any, event: dict[str, Any]) -> None:
        """SGLang's own /metrics, where it serves one."""
        metrics.update(
            runner,
            self.slot.name,
            self.role,
            state=self.state,
            layout_generation=self.layout_generation,
            content_generation=self.content_generation,
            physical_epoch=self.physical_epoch,
            success=self.success,
            started_at=self.started_at,
            finished_at=event["finished_at"],
            weights_bytes=sum(self.storages.weights.values()) if self.captured else None,
            capture_seconds=self.capture_seconds,
            lock_status=self.slot.lock_status,
        )

    def _lose(self, problem: str) -> None:
        """We no longer know where the weights are: publish that, not the old addresses."""
        once.warn("withdraw " + self.slot.name, "%s; its map is withdrawn", problem)
        self.problem = self.withdrawn = problem
        self.captured = None
        self.storages = document.Storages({}, {}, {})
        self.layout_generation += 1
        self.content_generation += 1
        self.state = FAILED

    # -- what is so

    @property
    def starting(self) -> bool:
        """Whether the event belongs to the start, not to an update of a running engine."""
        return bool(self.effects & {"load", "build", "commit", "settle"})

    def standing(self) -> document.Standing:
        return document.Standing(
            self.state,
            self.layout_generation,
            self.content_generation,
            self.physical_epoch,
            self.kv_physical_epoch,
            self.residency,
        )

    def shares_storage_with(self, other: Tracked) -> bool:
        ours, theirs = self.storages, other.storages
        return not (ours.weights.keys() | ours.lora.keys()).isdisjoint(
            theirs.weights.keys() | theirs.lora.keys()
        )

    def _documents_stand(self, runner: Any) -> bool:
        """Whether buckets came in and left every tensor where the published documents say.

        At the end of a session the prototype's files must say that there was an update, and
        checksums are of the new values; and SGLang may have made tensors that no bucket had.
        """
        if self.effects - {"open", "stream", "close"} or self.problem is not None or self.unseen:
            return False
        closes = "close" in self.effects
        if closes and (self.told_updated != self.updated or settings.load().checksum):
            return False
        if not self.slot.has(files.LAYOUT) or capturing.moved(self.captured, runner):
            return False
        return not closes or capturing.nothing_new(self.captured, runner)

    def _state_after(self) -> str:
        # What faults when touched comes first, then what may be half written.
        if self.residency[WEIGHTS] == RELEASED:
            return RELEASED
        if not self.success or self.broken:
            return FAILED
        return READY if self.settled else LOADING

    def _event(
        self, success: Optional[bool], finished_at: Optional[float], changes: dict[str, int]
    ) -> dict[str, Any]:
        message = self.message if success is not None else None
        return document.event(
            self.kind,
            success,
            message,
            self.started_at,
            finished_at,
            changes,
            self.calls,
            self.nested,
            None if success is None else round(self.capture_seconds, 6),
        )

    # -- the documents

    def _documents(self, runner: Any, event: dict[str, Any]) -> dict[str, Any]:
        """Everything to publish after a full capture but the state, by file name."""
        captured = self.captured
        assert captured is not None
        now = time.time()
        regions = document.regions_of(captured)
        meta = legacy.weights_meta(captured, self.updated)
        sums = legacy.total_weight_meta(meta)
        figures, allocator = self._memory(captured)
        # Once: to count them takes torch half as long as all of this.
        once_built = self.starting and self.settled
        named = _or_else(None, capturing.parameter_count, runner) if once_built else None
        layout = document.layout(
            captured,
            regions,
            self.standing(),
            _or_else({**self.process}, identity.identity, runner),
            event,
            figures,
            document.validation(captured, named, allocator),
            _or_else(None, self._checksums, runner, captured),
            now,
        )
        contents = {
            files.LAYOUT: layout,
            files.WEIGHTS_META: meta,
            files.TOTAL_META: sums,
            files.MERGED: legacy.merged_weights(captured, regions),
        }
        if not self.starting:
            self.summary = legacy.update_summary(meta, sums, self.gpu_id, now)
            contents[files.SUMMARY] = self.summary
        return contents

    def _empty_documents(self, event: dict[str, Any]) -> dict[str, Any]:
        empty = document.withdrawn(
            self.standing(), self.process, self.withdrawn or "", event, time.time()
        )
        return {
            files.LAYOUT: empty,
            files.WEIGHTS_META: {},
            files.TOTAL_META: {},
            files.MERGED: [],
        }

    def _memory(self, captured: Capture) -> tuple[dict[str, Any], Optional[dict[str, int]]]:
        """The ``memory`` figures, and the allocator's part of ``validation``."""
        found = _or_else(None, memory.device, captured.device_type)
        mine = self.storages.all()
        siblings = self.siblings(self)
        theirs = {
            start: size
            for sibling in siblings
            for start, size in sibling.storages.all().items()
            if start not in mine
        }
        figures = memory.account(found, *self.storages, theirs, self._released_bytes())
        figures.update(self._shared(siblings))
        return figures, memory.reconcile(found, {**theirs, **mine})

    def _released_bytes(self) -> int:
        """Bytes of this slot's storages that have no pages now."""
        by_tag = {WEIGHTS: self.storages.weights, KV_CACHE: self.storages.kv_cache}
        gone = [kind for tag, kind in by_tag.items() if self.residency[tag] == RELEASED]
        return sum(size for kind in gone for size in kind.values())

    def _shared(self, siblings: list[Tracked]) -> dict[str, Any]:
        """What slots of this process have in common, so that a sum counts it once.

        ``shared_bytes`` and ``shared_kv_cache_bytes``: of this slot's, those that a slot loaded
        earlier has too.
        """
        earlier = [one for one in siblings if one.load_order < self.load_order]
        weights = {**self.storages.lora, **self.storages.weights}
        known = {start for one in earlier for start in one.storages.all()}
        return {
            "shared_with": [one.slot.name for one in siblings if self.shares_storage_with(one)],
            "shared_bytes": sum(size for start, size in weights.items() if start in known),
            "shared_kv_cache_bytes": sum(
                size for start, size in self.storages.kv_cache.items() if start in known
            ),
        }

    def _checksums(self, runner: Any, captured: Capture) -> Optional[dict[str, Any]]:
        """Checksums where they are asked for and the memory may be touched."""
        if not settings.load().checksum or self.residency[WEIGHTS] == RELEASED:
            return None
        started = time.perf_counter()
        by_name = checksum.checksums(capturing.live_tensors(runner, captured))
        return {
            "algorithm": checksum.ALGORITHM,
            "content_generation": self.content_generation,
            "seconds": round(time.perf_counter() - started, 6),
            "by_name": by_name,
        }

    # -- files

    def _write_documents(self, contents: dict[str, Any]) -> None:
        """Write each; one that can't be written is taken away, for it would be out of date."""
        for name, content in contents.items():
            try:
                self.slot.write(name, content)
            except Exception as error:
                self.problem = f"{name.format(self.slot.name)}: {error}"
                once.warn(
                    "write " + self.slot.name,
                    "cannot publish in %s, SGLang goes on without it: %s",
                    self.slot.directory,
                    error,
                )
                self.remove(name)

    def remove(self, name: str) -> None:
        try:
            self.slot.remove(name)
        except OSError as error:
            once.warn("remove " + self.slot.name, "an outdated file stays: %s", error)

    def _write_state(self, event: dict[str, Any]) -> None:
        try:
            state = document.state(
                self.standing(),
                event,
                self.process,
                self.slot.name,
                self.slot.lock_status,
                self.missing,
                self.problem,
                time.time(),
            )
            self.slot.write(files.STATE, state)
        except Exception as error:
            once.warn("write " + self.slot.name, "cannot publish the state: %s", error)
            # No state is honest; the one from before the event would not be.
            self.remove(files.STATE)


def _or_else(default: Any, ask: Any, *arguments: Any) -> Any:
    """An answer that the map can do without: ``default`` where asking fails."""
    try:
        return ask(*arguments)
    except Exception as error:
        what = getattr(ask, "__name__", "?")
        once.warn(f"ask {what}", "%s could not be told: %s", what, type(error).__name__)
        return default
