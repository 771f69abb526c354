"""Events in, published documents out: which runner is in which state, and since when.

The patch core calls `begin` before and `finish` after each of SGLang's methods that change
weights; everything else follows from the event's *effect*:

========  ====================================================  ===========================
effect    what the call does                                    what is published after it
========  ====================================================  ===========================
load      loads a runner's model; the engine is not built yet   everything, ``loading``
build     constructs something that loads its own model         everything, ``ready``
commit    fills the loaded addresses with the real values       everything, ``loading``
settle    the scheduler is built; drafts have re-bound theirs   everything, ``ready``
update    may replace any weight                                everything
stream    one bucket of many, written in place as a rule        the state; all if one moved
open      begins a session of updates; the lock stays held      nothing (``updating``)
close     ends it                                               the state; all if one changed
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

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

from ..layout import files
from ..layout.states import KV_CACHE, RELEASED, RESIDENT, TAGS, WEIGHTS
from . import identity, metrics, once, publish, settings
from .tracked import Call, Tracked

EFFECTS = frozenset(
    "load build commit settle update stream open close release resume".split()  # noqa: SIM905
)


class Event(NamedTuple):
    """One call under way, handed from `begin` to `finish`."""

    call: Call
    kind: str
    effect: str
    details: dict[str, Any]
    missing: list[str]
    named: list[Any]  # the runners that the caller named
    participants: list[Tracked]

    @property
    def opener(self) -> int:
        """Whose session an `open` or `close` concerns: the runner's id, 0 where none is named."""
        return id(self.named[0]) if len(self.named) == 1 else 0


# --- this process's runners ---------------------------------------------------------------

# id(runner) -> Tracked.  Runners are held weakly.
_tracked: dict[int, Tracked] = {}
# Those whose runner the garbage collector has taken, until the next call reaps them.
_dead: deque[tuple[int, Tracked]] = deque()
# The calls that build a scheduler, of those under way in this process.
_building: weakref.WeakSet[Call] = weakref.WeakSet()
_load_order = itertools.count()
_mutex = threading.RLock()
_busy = False  # whether the mutex's owner is at work on what the mutex guards


@contextmanager
def _exclusive() -> Iterator[None]:
    """The mutex, with the slots of dead runners reaped at both ends."""
    global _busy
    with _mutex:
        nested, _busy = _busy, True
        try:
            _reap()
            yield
            _reap()
        finally:
            _busy = nested


def begin(
    kind: str,
    effect: str,
    runners: Iterable[Any] = (),
    details: Optional[dict[str, Any]] = None,
    missing: Iterable[str] = (),
) -> Event:
    """Something that changes weights begins.

    ``runners``: the model runners (or their models) concerned; none means all of this
    process.  ``missing``: entry points that this SGLang lacks, for the state file.
    Returns what `finish` wants to have back.
    """
    if effect not in EFFECTS:
        raise ValueError(f"unknown effect {effect!r}")
    event = Event(Call(), kind, effect, dict(details or {}), list(missing), list(runners), [])
    with _exclusive():
        if effect == "settle":
            _building.add(event.call)
        # What a constructor's runners are is known when it has returned.
        if effect not in ("settle", "build"):
            _join(event, _participants(effect, event.named))
    return event


def finish(event: Event, result: Any, error: Optional[BaseException]) -> None:
    """It has returned ``result``, or raised ``error``."""
    success, message = outcome(result, error)
    with _exclusive():
        _building.discard(event.call)
        if event.effect in ("settle", "build"):
            if error is not None:
                return
            _join(event, _participants("load", event.named))
        done = []
        for tracked in event.participants:
            changed = _apply(tracked, event, success)
            if tracked.leave(event.call, event.effect, event.opener, success, message, changed):
                done.append(tracked)
        # All are looked at before any is published: each document speaks of its siblings too.
        for tracked in done:
            _guarded(tracked.look)
        for tracked in done:
            _guarded(tracked.tell)


def _join(event: Event, participants: list[Tracked]) -> None:
    for tracked in participants:
        tracked.missing = event.missing
        event.participants.append(tracked)
        _guarded(tracked.enter, event.call, event.kind, event.effect)


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
        return False, f"{type(error).__name__}: {_text(error)}"
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], bool):
        return result[0], None if result[1] is None else _text(result[1])
    return True, None


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # somebody's __str__ must not keep the lock
        return "(it has no text)"


def _apply(tracked: Tracked, event: Event, success: bool) -> bool:
    """Note what the effect means for ``tracked``; whether its contents may have changed.

    A failed update may have written before it failed, so it counts as a change of contents.
    """
    effect = event.effect
    if effect in ("release", "resume"):
        return _apply_memory(tracked, event, success)
    if effect in ("settle", "build"):
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


def _apply_memory(tracked: Tracked, event: Event, success: bool) -> bool:
    """Note what the memory saver freed or backed anew; whether the weights' contents are other.

    Without a memory saver SGLang's release frees nothing, and nothing is claimed to be freed.
    """
    if not event.details.get("physical"):
        return False
    tags = [tag for tag in event.details.get("tags") or TAGS if tag in TAGS]
    if not success:
        # How far a release came before it failed is not known: once resumed, its pages count
        # as other ones.
        tracked.doubtful.update(tags if event.effect == "release" else ())
        return False
    fresh = set()
    for tag in tags:
        gone = tracked.residency[tag] == RELEASED or tag in tracked.doubtful
        if event.effect == "resume" and gone:
            fresh.add(tag)
        tracked.doubtful.discard(tag)
        tracked.residency[tag] = RELEASED if event.effect == "release" else RESIDENT
    # Other pages behind the same addresses: what was registered with them is stale.
    tracked.physical_epoch += WEIGHTS in fresh
    tracked.kv_physical_epoch += KV_CACHE in fresh
    return WEIGHTS in fresh


def _participants(effect: str, named: list[Any]) -> list[Tracked]:
    """The runners an event concerns: those named, and those that share storage with them."""
    everyone = list(_tracked.values())
    if not named:
        return everyone
    participants = [tracked for tracked in map(_find_or_track, named) if tracked]
    if effect == "load" or len(participants) >= len(everyone):
        return participants
    for other in everyone:
        shares = any(other.shares_storage_with(one) for one in participants)
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
    tracked = Tracked(runner, slot, next(_load_order), _siblings)
    _tracked[id(runner)] = tracked
    weakref.finalize(runner, _forget, id(runner), tracked).atexit = False
    return tracked


def _siblings(tracked: Tracked) -> list[Tracked]:
    return [other for other in _tracked.values() if other is not tracked]


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
    module's own loops: it waits for no lock, and leaves the reaping to whoever is at work.
    """
    _dead.append((key, tracked))
    if not _busy and _mutex.acquire(blocking=False):
        try:
            _reap()
        except Exception:
            pass
        finally:
            _mutex.release()


def _reap() -> None:
    """Withdraw the slots of runners that are gone: their addresses belong to nobody now."""
    while _dead:
        key, tracked = _dead.popleft()
        if _tracked.get(key) is not tracked:
            continue  # a forked child's copy: the slot is the parent's
        del _tracked[key]
        for name in files.DOCUMENTS:
            tracked.remove(name)
        tracked.slot.abandon()
        metrics.forget(tracked.slot.name, tracked.role)


def _guarded(call: Any, *arguments: Any) -> None:
    try:
        call(*arguments)
    except Exception as error:
        name = getattr(call, "__name__", "?")
        once.warn(f"recorder {name}", "%s failed, SGLang goes on: %r", name, error)


# --- forked children ----------------------------------------------------------------------


def _after_fork_in_child() -> None:
    """A child publishes nothing for its parent's runners, and must not hold their locks.

    The locks belong to open files that the child shares: closing them here leaves them to the
    parent alone, so that its death, not the child's, frees its slots.
    """
    global _mutex, _busy
    _mutex = threading.RLock()
    _building.clear()
    _busy = False
    _dead.clear()
    for tracked in _tracked.values():
        tracked.slot.abandon()
    _tracked.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
