"""Code of yours that runs inside SGLang's process, around each change of its weights.

A package of yours has a class with the three methods of `Subscriber` and a function that makes one
and takes no arguments; ``SGLANG_WEIGHT_HOOK_SUBSCRIBERS=my_package.module:function`` names it to
the server.  `docs/subscribers.md` says when what is called; ``examples/subscriber_package`` is one
to copy.

These are the types of what a subscriber is given.  This module imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional, Protocol


class Event(NamedTuple):
    """Something that changes weights begins."""

    slot: str  # its name, as in the names of the published files
    kind: str  # what SGLang was asked to do, for example update_weights_from_disk
    # What it may do: load, commit, update, partial, adapt, stream, open, close, release, resume
    # (the table in sglang_weight_hook/publisher/events.py).
    effects: frozenset[str]
    # SGLang's memory tags (weights, kv_cache, cuda_graph) whose physical memory is about to be
    # taken away, so that touching their addresses will fault; empty but for a release.
    releases: frozenset[str]
    # Whether it succeeded; None, for it has only begun.  How it ended says `document["event"]`.
    success: Optional[bool]
    pid: int  # of this process, in its own pid namespace


class Region(NamedTuple):
    """A span of weight memory within one allocation, as in the document's ``regions``."""

    ptr: int
    size: int  # bytes
    device: str  # of torch, for example cuda:0


class Diff(NamedTuple):
    """How a document differs from the one that this subscriber was given before."""

    regions_added: tuple[Region, ...]
    regions_removed: tuple[Region, ...]
    regions_kept: tuple[Region, ...]  # the same addresses: registrations hold unless `repaged`
    moved: tuple[str, ...]  # tensors that have another address, size, shape or stride
    added: tuple[str, ...]  # canonical names
    removed: tuple[str, ...]
    content_changed: bool  # values may have changed
    repaged: bool  # other physical pages are behind the kept addresses: register them again
    other_instance: bool  # nothing of before holds: another runner, or nothing was given before

    @property
    def registrations_hold(self) -> bool:
        """Whether what was registered for the document before is right for this one."""
        return not (
            self.regions_added or self.regions_removed or self.repaged or self.other_instance
        )


class Subscriber(Protocol):
    """What is called, always in one daemon thread of the subscriber's own, one call at a time.

    An event waits for each call, at most ``SGLANG_WEIGHT_HOOK_SUBSCRIBER_TIMEOUT`` seconds.  What
    raises or is late is named in the state file (``subscribers``), and SGLang goes on.

    A fourth method may be there, ``missed(slot: str, event: Event) -> None``: SGLang has gone on
    without waiting for `before`, which is not called any more for this event.  What the event
    changes may have changed; undo what must not be served, and touch no memory.  `after` follows.
    """

    def before(self, slot: str, event: Event) -> None:
        """An event begins: the exclusive lock is held, nothing has been changed yet.

        Not called where SGLang has no time for it or it would come too late: a relocation of
        experts in a forward, a change that nobody announced, a scheduler that has been built.
        """

    def after(self, slot: str, document: Mapping[str, Any], diff: Diff) -> None:
        """An event has ended, also one that failed (``document["event"]["success"]``).

        ``document``: the layout document (docs/format.md), not to be changed.  The lock is still
        held, and the state is not yet published as ready; unless this call was late in its turn.
        """

    def gone(self, slot: str) -> None:
        """The slot is not published any more: its runner is gone, or the process ends.

        Its memory may be freed already: undo what was registered, touch nothing.
        """
