"""The one thread of ours in SGLang's process: ends streams, checks maps, serves the socket.

(Subscribers, where any are configured, have threads of their own: `subscriber_thread`.)

Started when the first slot is published, or, where nothing is to be checked, with the first
stream.  A daemon: it keeps no interpreter from ending.  It holds no lock while it sleeps or looks
at a model, and what fails in it costs only what it does: the event path asks `is_running`, and
ends streams itself where the answer is no.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Optional, Protocol, Union

from . import once, settings, sharing, subscription
from .control import Answered, ControlSocket, refused
from .tracked import Tracked

NAME = "sglang-weight-hook"

_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_RETRY_SECONDS = 1.0

# After an event the map is checked this many seconds later, then once a period.
DELAYS = (0.25, 0.5, 1.0, 2.0, 4.0)
# A thorough look, which finds tensors that the map lacks, follows each event and comes again
# after so many seconds: it takes several times as long as one at the tensors that are known.
THOROUGH_SECONDS = 300.0


class Recorder(Protocol):
    """What the thread asks of the recorder."""

    def runners(self) -> list[Tracked]: ...

    def end_streams(self, now: float, everything: bool = False) -> Optional[float]: ...

    def check(self, tracked: Tracked, thoroughly: bool) -> Optional[bool]: ...

    def tell_news(self, tracked: Tracked) -> Optional[float]: ...


_thread: Optional[_Background] = None
_failed = False  # a thread could not be started, and is not tried again


def ensure(recorder: Recorder, for_stream: bool = False) -> bool:
    """Start the thread where there is something for it to do; whether it runs.  Never raises.

    ``for_stream``: a stream is to be ended.  Otherwise checks, sharing and subscribers are reasons.
    """
    global _thread, _failed
    if _thread is not None and _thread.is_alive():
        return True
    configured = settings.load()
    wanted = configured.check_seconds > 0 or configured.share is not None or for_stream
    wanted = wanted or bool(configured.subscribers)
    if _failed or not wanted:
        return False
    try:
        _thread = _Background(recorder, configured)
        _thread.start()
    except Exception as error:  # no more threads, or the interpreter is ending
        _thread, _failed = None, True
        once.warn("thread", "the map is not checked, no thread could be started: %r", error)
    return _thread is not None


def is_running() -> bool:
    return _thread is not None and _thread.is_alive()


def wake() -> None:
    """Have the thread look at what is due."""
    if _thread is not None:
        _thread.control.wake()


def schedule(tracked: Tracked) -> None:
    """An event of ``tracked`` is over: its checks begin anew."""
    tracked.check_step = 0
    tracked.event_ended_at = time.monotonic()
    wake()


def socket_name() -> Optional[str]:
    """The control socket's file name in the output directory; None where there is none."""
    return _thread.control.name if _thread is not None and _thread.is_alive() else None


def stop(timeout: float = 0.5) -> None:
    """End the thread and take its socket away; waits ``timeout`` seconds at most."""
    global _thread
    thread, _thread = _thread, None
    if thread is not None:
        thread.stopping = True
        thread.control.wake()
        if thread is not threading.current_thread():
            thread.join(timeout)
        thread.control.close(remove=True)


def abandon() -> None:
    """In a forked child, which has no such thread: let go of its descriptors."""
    global _thread, _failed
    thread, _thread, _failed = _thread, None, False
    if thread is not None:
        thread.control.close(remove=False)


class _Background(threading.Thread):
    def __init__(self, recorder: Recorder, configured: settings.Settings) -> None:
        super().__init__(name=NAME, daemon=True)
        self.stopping = False
        self._recorder = recorder
        self._period = configured.check_seconds
        self.control = ControlSocket(
            configured.directory if self._period > 0 or configured.share is not None else None,
            self._answer,
            configured.share or (),
        )
        self._shares = configured.share is not None

    def run(self) -> None:
        try:
            # SGLang's own threads are to get its signals; a fault of our own stays ours.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)
            while not self.stopping:
                self.control.serve(self._work())
        except BaseException as error:
            once.warn("thread", "the map is checked no more: %r", error)
        finally:
            try:
                self._recorder.end_streams(time.monotonic(), everything=True)
            except Exception:
                pass

    def _work(self) -> Optional[float]:
        """Do what is due; seconds until something is due again, or None."""
        waits = [_guarded(self._recorder.end_streams, time.monotonic())]
        if subscription.current is not None:
            for tracked in self._recorder.runners():
                waits.append(_guarded(self._recorder.tell_news, tracked))
        if self._period > 0:
            for tracked in self._recorder.runners():
                waits.append(_guarded(self._check_if_due, tracked))
        return min((wait for wait in waits if wait is not None), default=None)

    def _check_if_due(self, tracked: Tracked) -> Optional[float]:
        """Check one map if its time has come; seconds until it comes again."""
        if not tracked.settled or tracked.is_busy:
            return None  # the end of the event schedules the next check
        now = time.monotonic()
        due = _due_at(tracked, self._period)
        if now < due:
            return due - now
        thoroughly = tracked.check_step == 0 or now - tracked.thorough_at >= THOROUGH_SECONDS
        ended_at = tracked.event_ended_at
        holds = self._recorder.check(tracked, thoroughly)
        if tracked.event_ended_at == ended_at:  # else an event has begun the schedule anew
            tracked.check_step += 1
            tracked.looked_at = time.monotonic()
            if thoroughly and holds is not None:
                tracked.thorough_at = tracked.looked_at
        return max(_due_at(tracked, self._period) - time.monotonic(), 0.001)

    def _answer(self, request: dict[str, Any]) -> Union[dict[str, Any], Answered]:
        """What the control socket answers."""
        op = request.get("op")
        if op != "check" and op not in sharing.OPERATIONS:
            known = ", ".join(("check", *sharing.OPERATIONS))
            return refused("unknown", f"this release answers only {known}")
        if op in sharing.OPERATIONS and not self._shares:
            return refused("not_shared", "this server was started without sharing")
        for tracked in self._recorder.runners():
            if tracked.slot.name == request.get("slot"):
                if op == "check":
                    return self._check_now(tracked)
                return sharing.answer(tracked, request)
        return refused("no_slot", "this process does not publish that slot")

    def _check_now(self, tracked: Tracked) -> dict[str, Any]:
        before = tracked.layout_generation
        holds = self._recorder.check(tracked, thoroughly=True) if tracked.settled else None
        if holds is None:
            return refused("busy", f"the slot is {tracked.state}, its weights are about to change")
        return {
            "ok": True,
            "equal": holds,
            "published": tracked.layout_generation != before,
            "checked_at": time.time(),
            "state": tracked.state,
            "instance": tracked.instance,
            "layout_generation": tracked.layout_generation,
            "content_generation": tracked.content_generation,
            "tensors": list(tracked.changes.names) if not holds else [],
        }


def _guarded(work: Callable[..., Optional[float]], argument: Any) -> Optional[float]:
    """Do it; what fails once (a model that changes while it is captured) is tried again."""
    try:
        return work(argument)
    except Exception as error:
        name = getattr(work, "__name__", "?").strip("_")
        once.warn(f"background {name}", "%s failed and is tried again: %r", name, error)
        return _RETRY_SECONDS


def _due_at(tracked: Tracked, period: float) -> float:
    """When the next check is due (time.monotonic)."""
    if tracked.check_step < len(DELAYS):
        due = tracked.event_ended_at + DELAYS[tracked.check_step]
        return min(due, tracked.event_ended_at + period * (tracked.check_step + 1))
    return tracked.looked_at + period


def _at_exit() -> None:
    if _thread is not None and _pid == os.getpid():
        stop()


_pid = os.getpid()
atexit.register(_at_exit)
