"""The thread in which one subscriber is called, so that what hangs or raises there stays there.

Who calls waits until a deadline and no longer.  What a late subscriber has not been told by then
stays in its queue, one `missed` and one `after` for each slot, and is called when it has come back;
`SubscriberThread.news` says of which slots something has become of a call that nobody waited for.
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

# Where nobody waits, a call hangs that has taken so many seconds.
_HANGS_AFTER = 10.0
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
        self.is_awaited = True  # whether somebody will see how it went
        self.is_late = False  # whether somebody has waited in vain for it to end
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
        self.news: set[str] = set()  # slots of which a call has ended that nobody waited for
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

    def post(self, turn: Turn, argument: Any, is_awaited: bool = True) -> bool:
        """Have it called; whether to wait for that."""
        turn.argument = argument
        with self._some:
            if self.refused is not None:
                self.problems[turn.slot] = self.refused
                return False
            late = self.late
            if turn.method != "gone":
                self._note_what_hangs(turn, is_awaited)
            turn.is_awaited = is_awaited and (late is None or turn.method == "gone")
            if turn.method == "before" and not turn.is_awaited:
                self._miss(turn)
            else:
                if turn.method != "before":
                    self._drop(turn.slot, {"after"} if turn.method == "after" else None)
                self._turns.append(turn)
            self._some.notify()
        return turn.is_awaited

    def _note_what_hangs(self, turn: Turn, is_awaited: bool) -> None:
        """``turn`` will not be called soon, where that is so.  Under the condition."""
        at_work = self._at_work
        if at_work is None:
            return
        taken = time.monotonic() - at_work.posted_at
        if at_work.is_late or (not is_awaited and taken > _HANGS_AFTER):
            why = f"not called: {at_work.method} has taken {taken:.0f} s so far"
            self.problems[turn.slot] = why

    def wait(self, turn: Turn, deadline: float) -> None:
        """Wait for the call until ``deadline`` (time.monotonic), and note how it went."""
        turn.over.wait(max(deadline - time.monotonic(), 0.0))
        with self._some:
            problem = self.refused or turn.problem
            if not turn.over.is_set():
                waited = time.monotonic() - turn.posted_at
                problem = f"{turn.method} took more than {waited:.1f} s"
                self._expect_no_more(turn)
            self._keep(turn.slot, problem)
        self._log(turn.slot, problem)

    def _expect_no_more(self, turn: Turn) -> None:
        """The deadline is over.  Under the condition."""
        turn.is_awaited = False
        if turn not in self._turns:
            turn.is_late = True
            return
        # It has not even begun: what came before it is late.
        if self._at_work is not None:
            self._at_work.is_late = True
        if turn.method == "before":
            self._turns.remove(turn)
            self._miss(turn)

    def forget(self, slot: str) -> None:
        """The slot is gone."""
        self.news.discard(slot)
        self.problems.pop(slot, None)

    def _keep(self, slot: str, problem: Optional[str]) -> None:
        """How a call went, for the state file.  Under the condition."""
        if problem is None:
            self.problems.pop(slot, None)
        else:
            self.problems[slot] = problem

    def _log(self, slot: str, problem: Optional[str]) -> None:
        """Holds nothing: a handler's lock may be held by who waits for the condition."""
        key = f"subscriber {self.name} {slot}"
        if problem is None:
            once.solved(key)
            return
        once.warn(key, "subscriber %s, slot %s: %s; SGLang goes on", self.name, slot, problem)

    def _miss(self, before: Turn) -> None:
        """SGLang goes on without this ``before``: `missed` is called in its place, and no ``after``
        of earlier, whose memory may be gone when it is called.  Under the condition."""
        event = before.argument
        for turn in self._turns:
            if turn.slot == before.slot and turn.method == "missed":
                event = event._replace(
                    effects=event.effects | turn.argument.effects,
                    releases=event.releases | turn.argument.releases,
                )
        self._drop(before.slot, {"missed", "after"})
        missed = Turn("missed", before.slot, before.context)
        missed.argument, missed.is_awaited = event, False
        self._turns.append(missed)

    def _drop(self, slot: str, methods: Optional[set[str]] = None) -> None:
        """Calls of the slot that have not begun and are overtaken; ``methods`` None: all."""
        kept = [
            turn
            for turn in self._turns
            if turn.slot != slot or (methods is not None and turn.method not in methods)
        ]
        self._turns = deque(kept)

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
        if turn.method == "missed" and not hasattr(self.subscriber, "missed"):
            return
        method = getattr(self.subscriber, turn.method)
        if turn.method == "after":
            before = self._given.get(turn.slot)
            method(turn.slot, turn.argument, differences.between(before, turn.argument))
            self._given[turn.slot] = turn.argument
        elif turn.method in ("before", "missed"):
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
            # With calls in the queue it has not been told of all: the last of them says how it is.
            is_news = (
                not turn.is_awaited
                and not any(waiting.slot == turn.slot for waiting in self._turns)
                and (
                    turn.method == "after" or (turn.method == "missed" and turn.problem is not None)
                )
            )
            if is_news:
                self._keep(turn.slot, turn.problem)
                self.news.add(turn.slot)
        if is_news:
            self._log(turn.slot, turn.problem)
            self._came_back()

    def _refuse(self, why: str) -> None:
        with self._some:
            self.refused = why
            self._at_work = None
            turns, self._turns = list(self._turns), deque()
        for turn in turns:
            turn.over.set()
