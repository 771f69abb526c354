"""Asking many at the same time, so that one who does not answer keeps nobody waiting twice."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar, Union

from .errors import HookError, Unreachable

Asked = TypeVar("Asked", bound=Hashable)
Answer = TypeVar("Answer")

MOST_THREADS = 32


def gather(
    calls: Mapping[Asked, Callable[[], Answer]], timeout: float
) -> dict[Asked, Union[Answer, HookError]]:
    """What each call returns, or the HookError that it raises, in the order of ``calls``.

    Who has not answered after ``timeout`` seconds is `Unreachable`; its thread is left behind, as
    a daemon: it keeps no process from ending.  Another exception than HookError is raised here.

    >>> gather({"a": lambda: 1, "b": lambda: 2}, 1.0)
    {'a': 1, 'b': 2}
    """
    if len(calls) == 1:
        [(asked, call)] = calls.items()
        return {asked: _answer(call)}
    work: queue.SimpleQueue[tuple[Asked, Callable[[], Answer]]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Asked, Union[Answer, HookError, BaseException]]]
    done = queue.SimpleQueue()
    for item in calls.items():
        work.put(item)

    def run() -> None:
        while True:
            try:
                asked, call = work.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((asked, _answer(call)))
            except BaseException as error:
                done.put((asked, error))

    for _ in range(min(len(calls), MOST_THREADS)):
        threading.Thread(target=run, name="gather", daemon=True).start()
    found: dict[Asked, Union[Answer, HookError]] = {}
    deadline = time.monotonic() + timeout
    while len(found) < len(calls):
        try:
            asked, answer = done.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            break
        if isinstance(answer, BaseException) and not isinstance(answer, HookError):
            raise answer
        found[asked] = answer
    late = Unreachable(f"no answer within {timeout:g} s; ask again, or look at that machine")
    return {asked: found.get(asked, late) for asked in calls}


def _answer(call: Callable[[], Answer]) -> Union[Answer, HookError]:
    try:
        return call()
    except HookError as error:
        return error
