"""Whether subscribers are called in this process, and on which threads.

All that the rest of the publisher imports of them: where ``SGLANG_WEIGHT_HOOK_SUBSCRIBERS`` is
unset, `current` stays None, what calls them is not imported and no thread is started.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Optional

from . import once, settings

if TYPE_CHECKING:
    from .subscriber_calls import Subscription

current: Optional[Subscription] = None
_forked = False  # from a process that had subscribers

# .inside: whether this thread belongs to a subscriber.
threads = threading.local()


def is_inside() -> bool:
    """Whether a subscriber calls SGLang on its own thread, while an event may wait for it.

    Such a call is let through untouched: to take part in the event would take the mutex that the
    event holds.
    """
    return getattr(threads, "inside", False)


def ensure() -> None:
    """Start the subscribers, where any are named.  Never raises."""
    global current
    configured = settings.load()
    if current is not None or not configured.subscribers:
        return
    if _forked:
        once.warn("subscribers", "a process forked from one with subscribers has none of its own")
        return
    try:
        from .subscriber_calls import Subscription

        current = Subscription(configured.subscribers, configured.subscriber_timeout)
    except Exception as error:
        once.warn("subscribers", "no subscriber could be started: %r", error)


def abandon() -> None:
    """In a forked child: the threads are the parent's, and so are the engines."""
    global current, _forked
    if current is not None:
        _forked = True
        current.abandon()
        current = None
