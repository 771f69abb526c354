"""The thread in which one subscriber is called, so that what hangs or raises there stays there.

Who calls waits until a deadline and no longer.  A subscriber that is late is not called again
until it has come back; `Turn.problem` and `SubscriberThread.owes` say what became of it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Optional

from . import differences, once, subscription
from .subscribers import Event

_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


class Turn:
    """One call of a subscriber."""

    def __init__(self, method: str, slot: str, context: Callable[[], AbstractContextManager[None]]):
        self.method = method
        self.slot = slot
        self.context = context
        self.argument: Any = None  # the event of `before`, the document of `after`
        self.over = threading.Event()
        self.problem: Optional[str] = None
        self.is_late = False
        self.posted_at = time.monotonic()


class SubscriberThread:
    """One subscriber.  Its methods are called under the recorder's mutex, but for `_run`."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Any],
        came_back: Callable[[], None],
    ) -> None:
        """``make`` gives the subscriber, in its thread; ``came_back``: a late call has ended."""
        self.name = name
        self.refused: Optional[str] = None  # why there is no subscriber
        self.subscriber: Any = None
        self._make = make
        self._came_back = came_back
        self._turns: deque[Turn] = deque()
        self._some = threading.Condition()
        self._at_work: Optional[Turn] = None  # also while it is made
        # By slot: the document that it was given last, successfully; why the last call failed.
        self._given: dict[str, Mapping[str, Any]] = {}
        self.problems: dict[str, str] = {}
        self._owed: set[str] = set()  # slots whose `after` it has missed, or was late in
        self._thread = threading.Thread(
            target=self._run, name=f"sglang-weight-hook {name}"[:60], daemon=True
        )

    def start(self) -> None:
        """Raises RuntimeError where there can be no more threads."""
        self._at_work = Turn("loading", "", contextlib.nullcontext)
        self._thread.start()

    # -- for the recorder

    @property
    def late(self) -> Optional[Turn]:
        """The call that somebody has waited for in vain and that has not come back."""
        turn = self._at_work
        return turn if turn is not None and turn.is_late else None

    def post(self, turn: Turn, argument: Any) -> bool:
        """Have it called, unless it is late; whether it will be."""
        late = self.late
        if self.refused is not None:
            self.problems[turn.slot] = self.refused
            return False
        if late is not None and turn.method != "gone":
            waited = time.monotonic() - late.posted_at
            self.problems[turn.slot] = f"not called: {late.method} has taken {waited:.0f} s so far"
            if turn.method == "after":
                self._owed.add(turn.slot)
            return False
        turn.argument = argument
        with self._some:
            self._turns.append(turn)
            self._some.notify()
        return True

    def wait(self, turn: Turn, deadline: float, is_repeat: bool = False) -> None:
        """Wait for the call until ``deadline`` (time.monotonic), and note how it went.

        ``is_repeat``: it tells what an earlier call has missed; where it is late, too, it is not
        made again before the next event, or a subscriber slower than the timeout would be called
        for ever.
        """
        if not turn.over.wait(max(deadline - time.monotonic(), 0.0)):
            waited = time.monotonic() - turn.posted_at
            with self._some:
                turn.is_late = not turn.over.is_set()
                if turn in self._turns:  # it has not even begun: what came before it is late
                    self._turns.remove(turn)
                    if self._at_work is not None:
                        self._at_work.is_late = True
            if turn.is_late:
                turn.problem = f"{turn.method} took more than {waited:.1f} s"
                if not is_repeat:
                    self._owed.add(turn.slot)
        if self.refused is not None:
            turn.problem = self.refused
        if turn.problem is None:
            self.problems.pop(turn.slot, None)
            once.solved(f"subscriber {self.name} {turn.slot}")
            return
        self.problems[turn.slot] = turn.problem
        once.warn(
            f"subscriber {self.name} {turn.slot}",
            "subscriber %s, slot %s: %s; SGLang goes on",
            self.name,
            turn.slot,
            turn.problem,
        )

    def owes(self, slot: str) -> bool:
        """Whether it has come back from a late call and has not heard what happened meanwhile."""
        return slot in self._owed and self.late is None and self.refused is None

    def settle(self, slot: str) -> None:
        """It is told now what it has missed."""
        self._owed.discard(slot)

    # -- the thread

    def _run(self) -> None:
        subscription.threads.inside = True
        try:
            # SGLang's own threads are to get its signals; a fault of our own stays ours.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
            self.subscriber = self._make()
        except BaseException as error:
            self._refuse(f"could not be loaded: {type(error).__name__}: {error}")
            return
        self._end(self._at_work)
        while True:
            with self._some:
                while not self._turns:
                    self._some.wait()
                turn = self._at_work = self._turns.popleft()
            try:
                with turn.context():
                    self._call(turn)
            except BaseException as error:
                turn.problem = f"{turn.method} raised {type(error).__name__}: {error}"
            self._end(turn)
            del turn

    def _call(self, turn: Turn) -> None:
        method = getattr(self.subscriber, turn.method)
        if turn.method == "after":
            before = self._given.get(turn.slot)
            method(turn.slot, turn.argument, differences.between(before, turn.argument))
            self._given[turn.slot] = turn.argument
        elif turn.method == "before":
            assert isinstance(turn.argument, Event)
            method(turn.slot, turn.argument)
        else:
            self._given.pop(turn.slot, None)
            method(turn.slot)

    def _end(self, turn: Optional[Turn]) -> None:
        assert turn is not None
        with self._some:
            self._at_work = None
            turn.over.set()
            late = turn.is_late
        if late:
            self._came_back()

    def _refuse(self, why: str) -> None:
        with self._some:
            self.refused = why
            self._at_work = None
            turns, self._turns = list(self._turns), deque()
        for turn in turns:
            turn.over.set()
