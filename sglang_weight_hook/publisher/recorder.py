"""Events in, published documents out: which runner is in which state, and since when.

The patch core calls `begin` before and `finish` after each of SGLang's methods that change
weights; everything else follows from the event's *effect* (`events.EFFECTS`).  Around them it
calls `begin_request` and `finish_request` for the scheduler's own methods, which know what the
methods inside do not: what SGLang answered, and whether a bucket is the last one.

All are called inside SGLang.  They raise nothing that SGLang has to see, and wait for nothing but
the lock, for at most its timeout.

The background thread calls `end_streams`, `check` and `answer`.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

from . import (
    background,
    diffusion,
    effects,
    identity,
    once,
    publication,
    publish,
    settings,
    sharing,
    subscription,
)
from .events import EFFECTS, Call, outcome
from .tracked import Tracked


class Begun(NamedTuple):
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


class Request:
    """One of the scheduler's calls under way on this thread, which calls those that write.

    The events of the runners that are written last until it is over.
    """

    def __init__(self, details: dict[str, Any]) -> None:
        self.call = Call()
        # Whether SGLang flushes its cache afterwards, so that this bucket is the last one.
        self.is_last = bool(details.get("is_last"))
        # Whether no session of SGLang's is open, as far as the scheduler tells.
        self.is_sessionless = bool(details.get("is_sessionless"))
        self.participants: list[Tracked] = []
        self.opened: list[tuple[Tracked, int]] = []  # sessions that began inside


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
# .stack: the requests under way on a thread, the innermost last.  Held weakly, as calls are.
_requests = threading.local()


class _Exclusive:
    """The mutex, with the slots of dead runners reaped at both ends.

    A class, for each bucket enters it twice, and a generator would take several times as long.
    """

    __slots__ = ("_held", "_nested")

    def __enter__(self) -> None:
        global _busy
        self._held = _mutex  # a forked child has another one
        self._held.acquire()
        self._nested, _busy = _busy, True
        if _dead:
            _guarded(_reap)

    def __exit__(self, *error: object) -> None:
        global _busy
        try:
            if _dead:
                _guarded(_reap)
        finally:
            _busy = self._nested
            self._held.release()


def begin(
    kind: str,
    effect: str,
    runners: Iterable[Any] = (),
    details: Optional[dict[str, Any]] = None,
    missing: Iterable[str] = (),
) -> Begun:
    """Something that changes weights begins.

    ``runners``: the model runners (or their models) concerned; none means all of this
    process.  ``missing``: entry points that this SGLang lacks, for the state file.
    Returns what `finish` wants to have back.
    """
    if effect not in EFFECTS:
        raise ValueError(f"unknown effect {effect!r}")
    begun = Begun(Call(), kind, effect, details or {}, list(missing), list(runners), [])
    if subscription.current is not None and subscription.is_inside():
        return begun
    with _Exclusive():
        if effect == "settle":
            _building.add(begun.call)
        # What a constructor's runners are is known when it has returned.
        if effect not in ("settle", "build", "complete"):
            _join(begun, _participants(effect, begun.named))
    return begun


def finish(begun: Begun, result: Any, error: Optional[BaseException]) -> None:
    """It has returned ``result``, or raised ``error``."""
    if subscription.current is not None and subscription.is_inside():
        return
    success, message = outcome(result, error)
    with _Exclusive():
        _building.discard(begun.call)
        if begun.effect == "complete" and _is_alone(begun.named):
            begun = begun._replace(effect="build")
        if begun.effect in ("settle", "build"):
            if error is not None:
                return
            _join(begun, _participants("load", begun.named))
        done = []
        for tracked in begun.participants:
            changed = effects.apply(tracked, begun.effect, begun.details, success, bool(_building))
            named = not begun.named or any(_is_of(tracked, one) for one in begun.named)
            if tracked.event is not None:
                tracked.event.result(begun.effect, success, message, changed, named)
            _note_session(tracked, begun, success)
            if tracked.leave(begun.call):
                done.append(tracked)
        _conclude(done)


def _is_alone(named: list[Any]) -> bool:
    """Whether a runner that has loaded its model is nobody's, so that nothing else completes it."""
    tracked = [_tracked.get(id(runner)) for runner in named]
    return not _building and all(one is not None and not one.settled for one in tracked)


def _is_of(tracked: Tracked, named: Any) -> bool:
    owner = tracked.runner()
    is_its_model = owner is not None and getattr(owner, "model", None) is named
    return is_its_model or _tracked.get(id(named)) is tracked


def _note_session(tracked: Tracked, begun: Begun, success: bool) -> None:
    """A session stays open between its two calls; a draft that shares the target's embedding
    takes part in both runners' sessions, and is done when both are."""
    if begun.effect == "open" and success:
        tracked.openers.add(begun.opener)
        request = _request()
        if request is not None:
            request.opened.append((tracked, begun.opener))
    elif begun.effect == "close":
        tracked.openers.discard(begun.opener)


def _join(begun: Begun, participants: list[Tracked]) -> None:
    """The runners take part in the call; those whose event it begins take the lock.

    One deadline for all of them, however many slots a reader holds; and no wait at all for what
    SGLang does in the middle of a forward.
    """
    over = [one for one in participants if one.ends_stream_before(begun.kind, begun.effect)]
    if over:
        _publish(over)
    patience = 0.0 if begun.effect == "relocate" else settings.load().lock_timeout
    request = _request()
    for tracked in participants:
        tracked.missing = begun.missing
        begun.participants.append(tracked)
        begins = tracked.enter(begun.call, begun.kind, begun.effect)
        if request is not None and tracked not in request.participants:
            request.participants.append(tracked)
            tracked.inside.add(request.call)
        if begins:
            started = time.monotonic()
            _guarded(tracked.hold, patience)
            patience = max(patience - (time.monotonic() - started), 0.0)
            _guarded(publication.begin, tracked)
        if subscription.current is not None:
            tell = subscription.current.before
            _guarded(tell, tracked, begun.kind, begun.effect, begun.details, begins)


def _conclude(done: list[Tracked]) -> None:
    """The last calls of these runners' events have returned."""
    if not done:
        return
    kept = [tracked for tracked in done if tracked.may_stay_open()]
    if kept and settings.load().quiet_seconds > 0 and background.ensure(_RECORDER, True):
        for tracked in kept:
            first = tracked.event is not None and tracked.event.last_return == 0.0
            tracked.keep_open()
            if first or (tracked.event is not None and tracked.event.is_last):
                background.wake()
        done = [tracked for tracked in done if tracked not in kept]
    _publish(done)


def _publish(done: list[Tracked], holds: Optional[dict[Tracked, Optional[bool]]] = None) -> None:
    """All are looked at before any is published: each document speaks of the others, too."""
    for tracked in done:
        if tracked.event is not None:
            tracked.broken = tracked.event.leaves_broken(tracked.broken)
        _guarded(tracked.look, (holds or {}).get(tracked))
    for tracked in done:
        _guarded(publication.publish_event, tracked)
        background.schedule(tracked)


# --- the scheduler's calls around them ------------------------------------------------------


def begin_request(details: dict[str, Any]) -> Request:
    """One of the scheduler's methods begins, which may call some of those that write."""
    request = Request(details)
    if not hasattr(_requests, "stack"):
        _requests.stack = []
    _requests.stack.append(weakref.ref(request))
    return request


def finish_request(request: Request, result: Any, error: Optional[BaseException]) -> None:
    """It has answered ``result``, or raised ``error``."""
    stack = getattr(_requests, "stack", [])
    while stack and stack.pop()() is not request:
        pass
    if not request.participants:
        return
    success, message = outcome(result, error)
    with _Exclusive():
        if not success:
            # SGLang has no session then, though some of its runners may have begun one.
            for tracked, opener in request.opened:
                tracked.openers.discard(opener)
                if tracked.event is not None:
                    tracked.event.write_failed = True
        done = []
        for tracked in request.participants:
            event = tracked.event
            if event is not None:
                event.answer(success, message)
                event.is_last = event.is_last or request.is_last
                if request.is_sessionless and success and event.wrote_whole:
                    tracked.openers.clear()
            if tracked.leave(request.call):
                done.append(tracked)
        _conclude(done)


def _request() -> Optional[Request]:
    """The innermost request under way on this thread."""
    stack = getattr(_requests, "stack", ())
    while stack:
        request: Optional[Request] = stack[-1]()
        if request is not None:
            return request
        stack.pop()
    return None


# --- whose weights --------------------------------------------------------------------------


def _participants(effect: str, named: list[Any]) -> list[Tracked]:
    """The runners an event concerns: those named, and those that share storage with them."""
    if not named:
        return list(_tracked.values())
    participants = [tracked for tracked in map(_find_or_track, named) if tracked]
    if effect == "load" or len(participants) >= len(_tracked):
        return participants
    for other in _tracked.values():
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
    of_llm = hasattr(runner, "model_config") or hasattr(runner, "gpu_id")
    if not of_llm and not diffusion.is_worker(runner):
        return None  # a model of no runner that we know
    try:
        return _track(runner)
    except OSError as error:
        configured = settings.load().directory
        once.warn("slot", "nothing is published, %s cannot be used: %s", configured, error)
        return None


def _track(runner: Any) -> Tracked:
    configured = settings.load()
    taken = {tracked.slot.wanted for tracked in _tracked.values()}
    name = identity.slot_name(diffusion.runner_of(runner), taken)
    slot = publish.Slot(configured.directory, name, configured.lock_timeout)
    tracked = Tracked(runner, slot, next(_load_order), _others)
    _tracked[id(runner)] = tracked
    weakref.finalize(runner, _forget, id(runner), tracked).atexit = False
    subscription.ensure()
    background.ensure(_RECORDER)
    return tracked


def _others(tracked: Tracked) -> list[Tracked]:
    return [other for other in _tracked.values() if other is not tracked]


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
    """Take away the documents of runners that are gone: their addresses are stale."""
    while _dead:
        key, tracked = _dead.popleft()
        if _tracked.get(key) is not tracked:
            continue  # a forked child's copy: the slot is the parent's
        del _tracked[key]
        for other in _tracked.values():
            other.openers.discard(key)  # nobody closes that session any more
        _guarded(publication.withdraw, tracked)


def _guarded(call: Any, *arguments: Any) -> None:
    try:
        call(*arguments)
    except Exception as error:
        name = getattr(call, "__name__", "?")
        once.warn(f"recorder {name}", "%s failed, SGLang goes on: %r", name, error)


# --- for the background thread --------------------------------------------------------------


class _Recorder:
    """What the background thread may ask for."""

    @staticmethod
    def runners() -> list[Tracked]:
        return list(_tracked.values())

    @staticmethod
    def end_streams(now: float, everything: bool = False) -> Optional[float]:
        """Publish the streams that are over; seconds until the next one is, or None.

        ``now``: time.monotonic().  ``everything``: also those whose last bucket has just come.
        """
        quiet = settings.load().quiet_seconds
        due, waits = [], []
        for tracked in _Recorder.runners():
            event = tracked.event
            if event is None or not event.is_stream:
                continue
            if not tracked.stream_open:
                waits.append(quiet)  # a bucket is being written at this moment
                continue
            left = 0.0 if event.is_last or everything else event.last_return + quiet - now
            if left > 0.0:
                waits.append(left)
            else:
                due.append(tracked)
        if due:
            # Looked at before the mutex is taken, which a further bucket would wait for.
            versions = {tracked: tracked.version for tracked in due}
            holds = {tracked: tracked.stream_holds() for tracked in due}
            with _Exclusive():
                over = [
                    tracked
                    for tracked in due
                    if tracked.stream_open and tracked.version == versions[tracked]
                ]
                if over:
                    with over[0].in_context():
                        _publish(over, holds)
            if len(over) < len(due):
                waits.append(quiet)  # a further bucket came meanwhile
        return min(waits, default=None)

    @staticmethod
    def check(tracked: Tracked, thoroughly: bool) -> Optional[bool]:
        """Whether map and memory are equal; what is not is published.  None: can't be told now."""
        holds = tracked.still_holds(thoroughly)
        if holds is None:
            return None
        if not _mutex.acquire(blocking=False):
            return holds  # an event is beginning or ending, which looks for itself
        try:
            with _Exclusive():
                if tracked not in _tracked.values():
                    return None
                if holds:
                    if tracked.event is None:
                        publication.checked(tracked, time.time())
                    return True
                with tracked.in_context():
                    if tracked.find_unannounced():
                        publication.say_unannounced(tracked)
                        tracked.slot.lock(0.0)
                        publication.publish_event(tracked)
                return False
        finally:
            _mutex.release()

    @staticmethod
    def tell_news(tracked: Tracked) -> Optional[float]:
        """Publish what late subscribers and the device have done; seconds to the next attempt."""
        if subscription.current is None or not subscription.current.has_news(tracked):
            return None
        if not _mutex.acquire(blocking=False):
            return 0.05
        try:
            with _Exclusive():
                if tracked.event is None and tracked in _tracked.values():
                    return publication.tell_news(tracked)
        finally:
            _mutex.release()
        return None  # the end of the event tells


_RECORDER = _Recorder()


# --- forked children ----------------------------------------------------------------------


def _after_fork_in_child() -> None:
    """A child publishes nothing for its parent's runners, and must not hold their locks.

    The locks belong to open files that the child shares: closing them here leaves them to the
    parent alone, so that its death, not the child's, frees its slots.
    """
    global _mutex, _busy, _requests
    _mutex = threading.RLock()
    _requests = threading.local()
    _building.clear()
    _busy = False
    _dead.clear()
    background.abandon()
    sharing.after_fork_in_child()
    subscription.abandon()
    for tracked in _tracked.values():
        tracked.event = None  # the child may leave the frames of calls that its parent began
        publication.let_go(tracked)
    _tracked.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
