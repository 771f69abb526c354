"""Who is called around the events of this process: `subscribers` by name, guarded.

One `SubscriberThread` each, from the first slot on.  The recorder calls `before`, `after` and
`gone` under its mutex; none raises, and each waits at most the timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import time
from collections.abc import Mapping
from typing import Any, Optional

from ..layout.states import TAGS
from . import background, engines, subscription, transport
from .subscriber_thread import SubscriberThread, Turn
from .subscribers import Event
from .tracked import Tracked

# Effects whose event begins where no subscriber can be told before: in a forward, which waits for
# nothing, or when what they name has already happened.
_UNTOLD = frozenset(("relocate", "settle", "build"))
# At the end of the process nobody waits longer than this for the last calls, in seconds.
_AT_EXIT_SECONDS = 2.0


class Subscription:
    """All subscribers of this process, and what they are told of its slots."""

    def __init__(self, names: tuple[str, ...], timeout: float) -> None:
        self._timeout = timeout
        self._latest: dict[str, Mapping[str, Any]] = {}  # by slot: the layout document
        self._told: dict[str, set[str]] = {}  # by slot: effects of the event under way
        self._names: dict[str, str] = {}  # instance -> slot
        self._threads = [
            SubscriberThread(name, functools.partial(_make, name), background.wake)
            for name in names
        ]
        for thread in self._threads:
            try:
                thread.start()
            except RuntimeError as error:
                thread.refused = f"no thread could be started: {error}"
        atexit.register(self._at_exit)

    # -- around an event

    def before(
        self, tracked: Tracked, kind: str, effect: str, details: Mapping[str, Any], begins: bool
    ) -> None:
        """A call with this effect begins; ``begins``: an event begins with it."""
        slot = tracked.slot.name
        if begins:
            self._told.pop(slot, None)  # of an event whose end was never reported
        told = self._told.setdefault(slot, set())
        if effect in told or effect in _UNTOLD:
            return
        told.add(effect)
        tags = set(details.get("tags") or TAGS) & set(TAGS)
        releases = tags if effect == "release" and details.get("physical") else ()
        event = Event(
            slot, kind, frozenset(told), frozenset(releases), None, tracked.process["pid"]
        )
        self._call("before", tracked, event)

    def after(
        self,
        tracked: Tracked,
        layout: Optional[Mapping[str, Any]],
        event: Mapping[str, Any],
    ) -> None:
        """An event has ended; ``layout``: the new document, None where the one before stands."""
        slot = tracked.slot.name
        self._told.pop(slot, None)
        former = self._names.get(tracked.instance)
        if former is not None and former != slot:
            self._gone(former)
        self._names[tracked.instance] = slot
        if layout is None:
            if slot not in self._latest:
                return
            layout = self._latest[slot]
        layout = {**layout, **tracked.standing().fields(), "event": event}
        self._latest[slot] = layout
        transport.enter(tracked)
        self._call("after", tracked, layout)

    def last_event(self, tracked: Tracked) -> Optional[Mapping[str, Any]]:
        """The event that subscribers were told of last, as the documents describe it."""
        layout = self._latest.get(tracked.slot.name)
        return None if layout is None else layout["event"]

    def has_news(self, tracked: Tracked) -> bool:
        """Whether a call has ended that no event has waited for, or remote readers wait."""
        slot = tracked.slot.name
        return tracked.unproven is not None or any(slot in one.news for one in self._threads)

    def take_news(self, tracked: Tracked) -> bool:
        """Whether a call has ended that no event has waited for, since this was asked last."""
        slot = tracked.slot.name
        news = [thread for thread in self._threads if slot in thread.news]
        for thread in news:
            thread.news.discard(slot)
        return bool(news)

    def gone(self, tracked: Tracked) -> None:
        self._names.pop(tracked.instance, None)
        self._gone(tracked.slot.name)

    def _gone(self, slot: str) -> None:
        """Waits for nobody: the collector calls it from anywhere."""
        transport.leave(slot)
        self._latest.pop(slot, None)
        self._told.pop(slot, None)
        for thread in self._threads:
            thread.forget(slot)
            thread.post(Turn("gone", slot, contextlib.nullcontext), None)

    def _at_exit(self) -> None:
        """The process ends, and with it all slots."""
        if subscription.current is not self:
            return
        deadline = time.monotonic() + min(_AT_EXIT_SECONDS, self._timeout)
        turns = []
        for slot in list(self._latest):
            transport.leave(slot)
            for thread in self._threads:
                turn = Turn("gone", slot, contextlib.nullcontext)
                if thread.post(turn, None):
                    turns.append(turn)
        for turn in turns:
            turn.over.wait(max(deadline - time.monotonic(), 0.0))
        self._keep_for_ever()

    def abandon(self) -> None:
        """In a forked child."""
        self._keep_for_ever()
        transport.abandon()

    def _call(self, method: str, tracked: Tracked, argument: Any) -> None:
        """All at once, and one deadline for all."""
        context = functools.partial(tracked.device.using_context, tracked.context)
        turns = []
        for thread in self._threads:
            turn = Turn(method, tracked.slot.name, context)
            if thread.post(turn, argument, is_awaited=self._timeout > 0):
                turns.append((thread, turn))
        deadline = time.monotonic() + self._timeout
        for thread, turn in turns:
            thread.wait(turn, deadline)

    def problems(self, slot: str) -> dict[str, Optional[str]]:
        """For the state file: by subscriber, what went wrong with it; None where nothing did."""
        return {
            thread.name: thread.refused or thread.problems.get(slot) for thread in self._threads
        }

    def _keep_for_ever(self) -> None:
        """Never run the destructors of what the subscribers hold.

        In a forked child they would wait for threads that are not there; at the end of a process
        engines were seen to crash in them.
        """
        for thread in self._threads:
            if thread.subscriber is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(thread.subscriber))


def _make(name: str) -> Any:
    """The subscriber that is called ``name``.  Raises whatever is wrong with it."""
    if name in engines.NAMES:
        return engines.make(name)
    module, colon, factory = name.partition(":")
    if not colon:
        known = ", ".join(engines.NAMES)
        raise ValueError(f"there is no subscriber of that name: known are {known}, module:factory")
    made: Any = importlib.import_module(module)
    for part in factory.split("."):
        made = getattr(made, part)
    subscriber = made()
    missing = [
        method
        for method in ("before", "after", "gone")
        if not callable(getattr(subscriber, method, None))
    ]
    if missing:
        raise TypeError(f"what {name} gave has no {' and no '.join(missing)}")
    return subscriber
