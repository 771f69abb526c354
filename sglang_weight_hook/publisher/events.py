"""One event of a runner: the calls of SGLang's that it consists of, and what they amount to.

Calls nest (an expert relocation calls an update; a session holds hundreds) and may come from
several threads: the outermost or first one begins the event, the last to leave ends it, and it
counts once.  Buckets that follow each other outside a session are one event, too: a stream.

========  ====================================================  ===========================
effect    what the call does                                    what is published after it
========  ====================================================  ===========================
load      loads a runner's model; the engine is not built yet   everything, ``loading``
build     constructs something that loads its own model         everything, ``ready``
complete  the last step of making a runner; an end where no     everything, ``ready``
          scheduler is being built (a benchmark, a test)
commit    fills the loaded addresses with the real values       everything, ``loading``
settle    the scheduler is built; drafts have re-bound theirs   everything, ``ready``
update    may replace any weight                                everything
partial   may replace some weights                              everything
adapt     loads or unloads a LoRA adapter, or moves the         everything
          weights to another device: their values stay
stream    one bucket of many, written in place as a rule        the state; all if one moved
relocate  moves experts within their tensors, in a forward      the state; all if one moved
open      begins a session of updates; the lock stays held      nothing (``updating``)
close     ends it                                               the state; all if one changed
release   may free the weights' physical memory                 everything, ``released``
resume    backs the same addresses with fresh memory            everything
========  ====================================================  ===========================
"""

from __future__ import annotations

import time
from typing import Any, Optional

EFFECTS = frozenset(
    (
        *("load", "build", "complete", "commit", "settle", "update", "partial", "adapt"),
        *("stream", "relocate", "open", "close", "release", "resume"),
    )
)
# Effects whose calls follow each other in a stream.
STREAMING = frozenset(("stream", "relocate"))
# Effects that write weights.  A relocation moves what is there: it can spoil, and not mend.
# A session that opens half-way has unpacked weights that nobody packs again.
WRITING = frozenset(("load", "commit", "update", "partial", "stream", "relocate", "open", "close"))
# Those that leave every weight whole when they succeed.
WHOLE = frozenset(("load", "commit", "update", "stream"))
# Effects of the start, before the engine serves.
STARTING = frozenset(("load", "build", "commit", "settle"))

UNANNOUNCED = "unannounced_change"


class Call:
    """One call of SGLang's, for as long as it is under way.

    Held weakly: a call whose end is never told (an exception out of a signal handler, in one of
    our own lines) is over when nothing refers to it any more.
    """

    __slots__ = ("__weakref__",)


class Event:
    """See the module.  Not thread-safe; used under the recorder's mutex."""

    __slots__ = (
        "answered",
        "calls",
        "changed_content",
        "effects",
        "is_last",
        "kind",
        "last_return",
        "message",
        "names",
        "nested",
        "started_at",
        "success",
        "write_failed",
        "wrote_whole",
    )

    def __init__(self, kind: str, effect: str) -> None:
        self.kind = kind
        self.effects = {effect}
        self.started_at = time.time()
        self.calls = 1
        self.nested: dict[str, int] = {}
        self.success = True  # whether the weights were written as asked
        self.answered: Optional[bool] = None  # what SGLang answered; None where nobody asked it
        self.message: Optional[str] = None
        self.changed_content = False
        self.wrote_whole = False  # a call that leaves every weight whole succeeded
        self.write_failed = False  # a call that writes weights failed, perhaps half way
        # Of a stream: when its last bucket returned (time.monotonic), and whether SGLang said
        # that no other follows.
        self.last_return = 0.0
        self.is_last = False
        self.names: tuple[str, ...] = ()  # tensors of an unannounced change

    @property
    def is_stream(self) -> bool:
        return len(self.effects) == 1 and not self.effects.isdisjoint(STREAMING)

    @property
    def is_start(self) -> bool:
        """Whether it belongs to the start, not to an update of a running engine."""
        return not self.effects.isdisjoint(STARTING)

    def continues(self, kind: str, effect: str) -> bool:
        """Whether a call of this kind is a further bucket of this stream."""
        return kind == self.kind and effect in self.effects and self.is_stream

    def add(self, kind: str, effect: str) -> None:
        """A further call begins inside, or in this stream."""
        self.calls += 1
        if not self.continues(kind, effect):
            self.effects.add(effect)
            self.nested[kind] = self.nested.get(kind, 0) + 1

    def result(
        self, effect: str, success: bool, message: Optional[str], changed: bool, named: bool
    ) -> None:
        """A call has ended.  ``named``: the caller named this runner."""
        self.success = self.success and success
        if not success or self.message is None:
            self.message = message
        self.changed_content = self.changed_content or changed
        if effect in WRITING and not success:
            self.write_failed = True
        if effect in WHOLE and success and named:
            self.wrote_whole = True

    def answer(self, success: Optional[bool], message: Optional[str]) -> None:
        """What SGLang answered to the request that made the call."""
        if success is None:
            return
        self.answered = success if self.answered is None else self.answered and success
        if not success and self.success and message:
            self.message = message

    def leaves_broken(self, broken: bool) -> bool:
        """Whether weights may be half written after it; ``broken``: whether they were before."""
        if self.write_failed:
            return True
        return broken and not self.wrote_whole


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
    # Answers of SGLang's scheduler and LoRA manager (managers/io_struct.py): objects.
    success = getattr(result, "success", None)
    if isinstance(success, bool):
        message = getattr(result, "message", None) or getattr(result, "error_message", None)
        return success, None if message is None else _text(message)
    # Those of the diffusion worker (multimodal_gen): a dict, or an OutputBatch with its error.
    if isinstance(result, dict) and isinstance(result.get("success"), bool):
        message = result.get("message")
        return result["success"], None if message is None else _text(message)
    problem = getattr(result, "error", None)
    if isinstance(problem, str) and problem:
        return False, problem
    return True, None


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # somebody's __str__ must not keep the lock
        return "(it has no text)"
