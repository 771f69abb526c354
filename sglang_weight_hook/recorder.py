"""Events in, published documents out: which runner is in which state, and since when.

The patch core calls `begin` before and `finish` after each of SGLang's methods that change
weights; everything else follows from the event's *effect*:

========  ====================================================  ===========================
effect    what the call does                                    what is published after it
========  ====================================================  ===========================
load      loads a runner's model; the engine is not built yet   everything, ``loading``
commit    fills the loaded addresses with the real values       everything, ``loading``
settle    the scheduler is built; drafts have re-bound theirs   everything, ``ready``
update    may replace any weight                                everything
stream    one bucket of many, written in place as a rule        the state; all if one moved
open      begins a session of updates; the lock stays held      nothing (``updating``)
close     ends it                                               everything
release   may free the weights' physical memory                 everything, ``released``
resume    backs the same addresses with fresh memory            everything
========  ====================================================  ===========================

Calls nest (expert relocation calls an update; a session holds hundreds) and may come from
several threads: the outermost or first one begins the event, the last to leave ends it, and
it counts once.

`begin` and `finish` are called inside SGLang.  They raise nothing that SGLang has to see, and
wait for nothing but the lock, for at most its timeout.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

from . import cuda_driver, document, identity, once, publish, settings
from .capture import (
    Capture,
    capture,
    known_allocations,
    moved,
    parameter_count,
)

EFFECTS = ("load", "commit", "settle", "update", "stream", "open", "close", "release", "resume")

LOADING, READY, UPDATING, FAILED, RELEASED = "loading", "ready", "updating", "failed", "released"

# SGLang's name for the weights in release and resume (sglang/srt/constants.py,
# GPU_MEMORY_TYPE_WEIGHTS); no tags at all means all of them.
WEIGHTS_TAG = "weights"

_NO_CHANGES = {"moved": 0, "added": 0, "removed": 0}


class Event(NamedTuple):
    """One call under way, handed from `begin` to `finish`."""

    kind: str
    effect: str
    details: dict[str, Any]
    opener: int  # id of the runner named, 0 if none or several were
    participants: list[Tracked]


class Tracked:
    """A model runner and what was published about it last."""

    def __init__(self, runner: Any, slot: publish.Slot) -> None:
        self.runner = weakref.ref(runner)
        self.slot = slot
        self.gpu_id = identity.gpu_id(runner)
        self.process = identity.process_identity()
        self.state = LOADING
        self.layout_generation = 0
        self.content_generation = 0
        self.captured: Optional[Capture] = None
        self.storages: frozenset[int] = frozenset()  # addresses of those captured
        self.settled = False  # whether the engine around the runner is built
        self.updated = False  # whether its weights were changed since they were loaded
        self.released = False  # the memory saver has taken the weights' pages
        self.broken = False  # the last call that wrote weights failed, perhaps half way
        self.missing: list[str] = []
        self.problem: Optional[str] = None
        # The event under way: how many calls are inside it, and what they amount to.
        self.depth = 0
        self.openers: set[int] = set()  # ids of the runners whose sessions are open
        self.kind = ""
        self.effects: set[str] = set()
        self.started_at = 0.0
        self.calls = 0
        self.success = True
        self.message: Optional[str] = None
        self.changed_content = False

    # -- the event under way

    def enter(self, kind: str, effect: str) -> None:
        self.depth += 1
        self.calls += 1
        self.effects.add(effect)
        if self.depth > 1 or self.openers:
            return
        self.kind, self.effects, self.calls = kind, {effect}, 1
        self.started_at = time.time()
        self.success, self.message, self.changed_content = True, None, False
        self.slot.lock()
        self.state = UPDATING if self.settled else LOADING
        self.write_state(document.event(kind, None, None, self.started_at, None, {}, 1))

    def leave(
        self, effect: str, opener: int, success: bool, message: Optional[str], changed: bool
    ) -> None:
        """``opener``: the id of the runner whose session an `open` or `close` concerns."""
        self.success = self.success and success
        self.message = message if not success or self.message is None else self.message
        self.changed_content = self.changed_content or changed
        self.depth -= 1
        # A session stays open between its two calls; a draft that shares the target's
        # embedding takes part in both runners' sessions, and is done when both are.
        if effect == "open" and success:
            self.openers.add(opener)
        elif effect == "close":
            self.openers.discard(opener)
        if self.depth == 0 and not self.openers:
            try:
                self.complete()
            finally:
                self.slot.unlock()

    def complete(self) -> None:
        """The last call has left: look, compare, publish."""
        runner = self.runner()
        if runner is None:
            return  # collected meanwhile, and its slot reaped
        try:
            if self.layout_stands() and not moved(self.captured, runner):
                self.content_generation += 1
                self.state = self.state_after()
                self.write_state(self.finished_event(_NO_CHANGES))
                return
            captured = known_allocations(self.captured, capture(runner))
        except Exception as error:
            self.withdraw(f"capture failed: {type(error).__name__}: {error}")
            return
        changes = document.changes(self.captured, captured)
        if not document.same_layout(self.captured, captured):
            self.layout_generation += 1
        if self.changed_content or self.content_generation == 0:
            self.content_generation += 1
        self.captured = captured
        self.storages = frozenset(
            row.storage_ptr for row in captured.tensors.values() if row.storage_ptr
        )
        self.state = self.state_after()
        self.problem = None
        event = self.finished_event(changes)
        try:
            contents = self.documents(runner, captured, event)
        except Exception as error:
            self.withdraw(f"no document could be made: {type(error).__name__}: {error}")
            return
        self.write_documents(contents)
        self.write_state(event)
        if self.starting and self.problem is None:
            once.info(
                f"published {self.slot.name} {self.kind}",
                "%s: %d tensors of slot %s are in %s",
                self.kind,
                len(captured.tensors),
                self.slot.name,
                self.slot.path(publish.LAYOUT),
            )

    def layout_stands(self) -> bool:
        """Whether only buckets came in, over a layout document that was written and is there."""
        return self.effects == {"stream"} and self.problem is None and self.slot.has(publish.LAYOUT)

    def state_after(self) -> str:
        # What faults when touched comes first, then what may be half written.
        if self.released:
            return RELEASED
        if not self.success or self.broken:
            return FAILED
        return READY if self.settled else LOADING

    def finished_event(self, changes: dict[str, int]) -> dict[str, Any]:
        return document.event(
            self.kind, self.success, self.message, self.started_at, time.time(), changes, self.calls
        )

    # -- publishing

    @property
    def generations(self) -> tuple[int, int]:
        return self.layout_generation, self.content_generation

    @property
    def starting(self) -> bool:
        """Whether the event belongs to the start, not to an update of a running engine."""
        return bool(self.effects & {"load", "commit", "settle"})

    def documents(self, runner: Any, captured: Capture, event: dict[str, Any]) -> dict[str, Any]:
        """Everything to publish after a full capture but the state, by file name."""
        now = time.time()
        regions = document.regions_of(captured)
        meta = document.weights_meta(captured, self.updated)
        sums = document.total_weight_meta(meta)
        layout = document.layout(
            captured,
            regions,
            _or_else({**self.process}, identity.identity, runner),
            self.generations,
            self.state,
            event,
            _or_else(None, _device_memory, captured.device_type),
            _or_else(None, parameter_count, runner) if self.starting else None,
            now,
        )
        contents = {
            publish.LAYOUT: layout,
            publish.WEIGHTS_META: meta,
            publish.TOTAL_META: sums,
            publish.MERGED: document.merged_weights(captured, regions),
        }
        if not self.starting:
            contents[publish.SUMMARY] = document.update_summary(meta, sums, self.gpu_id, now)
        return contents

    def write_documents(self, contents: dict[str, Any]) -> None:
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

    def withdraw(self, problem: str) -> None:
        """We no longer know where the weights are: publish that, not the old addresses."""
        once.warn("withdraw " + self.slot.name, "%s; its map is withdrawn", problem)
        self.problem = problem
        self.captured = None
        self.layout_generation += 1
        self.content_generation += 1
        self.state = FAILED
        event = self.finished_event(_NO_CHANGES)
        empty = document.withdrawn(self.process, self.generations, problem, event, time.time())
        self.write_documents(
            {
                publish.LAYOUT: empty,
                publish.WEIGHTS_META: {},
                publish.TOTAL_META: {},
                publish.MERGED: [],
            }
        )
        self.remove(publish.SUMMARY)
        self.write_state(event)

    def write_state(self, event: dict[str, Any]) -> None:
        try:
            self.slot.write(
                publish.STATE,
                document.state(
                    self.state,
                    self.generations,
                    event,
                    self.process,
                    self.slot.name,
                    self.slot.lock_status,
                    self.missing,
                    self.problem,
                    time.time(),
                ),
            )
        except Exception as error:
            once.warn("write " + self.slot.name, "cannot publish the state: %s", error)
            # No state is honest; the one from before the event would not be.
            self.remove(publish.STATE)


# --- this process's runners ---------------------------------------------------------------

# id(runner) -> Tracked.  Runners are held weakly.
_tracked: dict[int, Tracked] = {}
# Those whose runner the garbage collector has taken, until the next call reaps them.
_dead: deque[tuple[int, Tracked]] = deque()
# How many schedulers are being built in this process.
_building = 0
_mutex = threading.RLock()


def begin(
    kind: str,
    effect: str,
    runners: Iterable[Any] = (),
    details: Optional[dict[str, Any]] = None,
    missing: Iterable[str] = (),
) -> Optional[Event]:
    """Something that changes weights begins.

    ``runners``: the model runners (or their models) concerned; none means all of this
    process.  ``missing``: entry points that this SGLang lacks, for the state file.
    Returns what `finish` wants to have back.
    """
    if effect not in EFFECTS:
        raise ValueError(f"unknown effect {effect!r}")
    global _building
    named = list(runners)
    with _mutex:
        _reap()
        if effect == "settle":
            _building += 1
        # A settling scheduler's runners come into being during the call.
        participants = [] if effect == "settle" else _participants(effect, named)
        for tracked in participants:
            tracked.missing = list(missing)
            _guarded(tracked.enter, kind, effect)
    opener = id(named[0]) if len(named) == 1 else 0
    return Event(kind, effect, dict(details or {}), opener, participants)


def finish(event: Event, result: Any, error: Optional[BaseException]) -> None:
    """It has returned ``result``, or raised ``error``."""
    global _building
    success, message = outcome(result, error)
    with _mutex:
        _reap()
        participants = event.participants
        if event.effect == "settle":
            _building -= 1
            if error is not None:
                return
            participants = list(_tracked.values())
            for tracked in participants:
                _guarded(tracked.enter, event.kind, event.effect)
        for tracked in participants:
            changed = _apply(tracked, event, success)
            _guarded(tracked.leave, event.effect, event.opener, success, message, changed)


def outcome(result: Any, error: Optional[BaseException]) -> tuple[bool, Optional[str]]:
    """Success and message of a call.  SGLang's updates return ``(success, message)``.

    >>> outcome((False, "no such directory"), None)
    (False, 'no such directory')
    >>> outcome(None, None)
    (True, None)
    >>> outcome(None, ValueError("x"))
    (False, 'ValueError: x')
    """
    if error is not None:
        return False, f"{type(error).__name__}: {_or_else('(it has no text)', str, error)}"
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], bool):
        message = result[1]
        return result[0], None if message is None else _or_else("(it has no text)", str, message)
    return True, None


def _apply(tracked: Tracked, event: Event, success: bool) -> bool:
    """Note what the effect means for ``tracked``; whether its contents may have changed.

    A failed update may have written before it failed, so it counts as a change of contents.
    """
    effect = event.effect
    if effect in ("release", "resume"):
        tags = event.details.get("tags")
        if (tags and WEIGHTS_TAG not in tags) or not event.details.get("physical"):
            return False
        if success:
            tracked.released = effect == "release"
        # Fresh pages behind the old addresses: their contents are whatever the saver kept.
        return effect == "resume"
    if effect == "settle":
        tracked.settled = True
        return False
    if effect == "open":
        return False
    # Only what writes weights can mend what a failed call left: a release in between does not.
    tracked.broken = not success
    if effect in ("load", "commit"):
        return effect == "commit"
    tracked.updated = True
    # Who updates a runner uses it: that counts as built also where no scheduler is (a program
    # that embeds a ModelRunner of its own).  What happens while one is being built does not.
    if not _building:
        tracked.settled = True
    return True


def _participants(effect: str, named: list[Any]) -> list[Tracked]:
    """The runners an event concerns: those named, and those that share storage with them."""
    everyone = list(_tracked.values())
    if not named:
        return everyone
    participants = [tracked for tracked in map(_find_or_track, named) if tracked]
    if effect == "load" or len(participants) >= len(everyone):
        return participants
    for other in everyone:
        shares = any(not other.storages.isdisjoint(one.storages) for one in participants)
        if shares and other not in participants:
            participants.append(other)
    return participants


def _find_or_track(runner: Any) -> Optional[Tracked]:
    found = _tracked.get(id(runner))
    if found is not None:
        return found
    for tracked in list(_tracked.values()):  # a model in place of its runner
        owner = tracked.runner()
        if owner is not None and getattr(owner, "model", None) is runner:
            return tracked
    if not hasattr(runner, "model_config") and not hasattr(runner, "gpu_id"):
        return None  # a model of no runner that we know
    try:
        return _track(runner)
    except OSError as error:
        configured = settings.load().directory
        once.warn("slot", "nothing is published, %s cannot be used: %s", configured, error)
        return None


def _track(runner: Any) -> Tracked:
    configured = settings.load()
    slot = publish.Slot(configured.directory, slot_name(runner), configured.lock_timeout)
    tracked = Tracked(runner, slot)
    _tracked[id(runner)] = tracked
    weakref.finalize(runner, _forget, id(runner), tracked).atexit = False
    return tracked


def slot_name(runner: Any) -> str:
    """``{gpu_id}`` for a target, ``{gpu_id}_draft``, ``{gpu_id}_draft1``, … for drafts."""
    base = str(identity.gpu_id(runner))
    if not identity.is_draft(runner):
        return base
    index = identity.draft_index(runner)
    if index is None:  # before 0.5.8, and single drafts: in the order in which they load
        taken = {tracked.slot.wanted for tracked in _tracked.values()}
        index = next(i for i in range(1000) if _draft_slot(base, i) not in taken)
    return _draft_slot(base, index)


def _draft_slot(base: str, index: int) -> str:
    return f"{base}_draft{index or ''}"


def _forget(key: int, tracked: Tracked) -> None:
    """The runner was garbage collected.

    The collector calls this from anywhere, also from inside a logging handler or from this
    module's own loops, so it takes no lock and touches nothing: `_reap` does.
    """
    _dead.append((key, tracked))


def _reap() -> None:
    """Withdraw the slots of runners that are gone: their addresses belong to nobody now."""
    while _dead:
        key, tracked = _dead.popleft()
        if _tracked.get(key) is not tracked:
            continue  # a forked child's copy: the slot is the parent's
        del _tracked[key]
        for name in publish.DOCUMENTS:
            tracked.remove(name)
        tracked.slot.abandon()


def _guarded(call: Any, *arguments: Any) -> None:
    try:
        call(*arguments)
    except Exception as error:
        name = getattr(call, "__name__", "?")
        once.warn(f"recorder {name}", "%s failed, SGLang goes on: %r", name, error)


def _or_else(default: Any, ask: Any, *arguments: Any) -> Any:
    """An answer that the map can do without: ``default`` where asking fails."""
    try:
        return ask(*arguments)
    except Exception as error:
        what = getattr(ask, "__name__", "?")
        once.warn(f"ask {what}", "%s could not be told: %s", what, type(error).__name__)
        return default


def _device_memory(device_type: str) -> Optional[dict[str, int]]:
    """Free and total bytes of the current device (``cudaMemGetInfo``); None without CUDA."""
    if device_type != "cuda" or not cuda_driver.is_initialised():
        return None
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"free": free, "total": total}


# --- forked children ----------------------------------------------------------------------


def _after_fork_in_child() -> None:
    """A child publishes nothing for its parent's runners, and must not hold their locks.

    The locks belong to open files that the child shares: closing them here leaves them to the
    parent alone, so that its death, not the child's, frees its slots.
    """
    global _mutex, _building
    _mutex = threading.RLock()
    _building = 0
    _dead.clear()
    for tracked in _tracked.values():
        tracked.slot.abandon()
    _tracked.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
