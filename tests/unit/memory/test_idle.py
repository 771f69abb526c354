"""Connections that wait for the next who asks: few, not for long, and not in a forked child."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable

from sglang_weight_hook.memory.idle import Idle


class Connection:
    pass


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_was_put_is_taken_once() -> None:
    idle: Idle[Connection] = Idle()
    one = Connection()
    idle.put("a", one)
    assert idle.take("b") is None
    assert idle.take("a") is one
    assert idle.take("a") is None


def test_the_oldest_goes_where_there_are_too_many() -> None:
    idle: Idle[Connection] = Idle(most=2)
    kept = [Connection() for _ in range(3)]
    gone = weakref.ref(kept[0])
    for number, connection in enumerate(kept):
        idle.put(number, connection)
    kept.clear()
    del connection
    assert gone() is None
    assert idle.take(0) is None
    assert idle.take(1) is not None


def test_none_is_kept_for_long_and_the_thread_ends_with_the_last() -> None:
    idle: Idle[Connection] = Idle(seconds=0.2)
    for round_ in range(2):
        connection = Connection()
        gone = weakref.ref(connection)
        idle.put(round_, connection)
        del connection
        assert gone() is not None
        wait_until(lambda gone=gone: gone() is None)  # type: ignore[misc]
        wait_until(lambda: not idle._is_watched)


def test_one_of_the_same_name_replaces_the_other() -> None:
    idle: Idle[Connection] = Idle()
    one, two = Connection(), Connection()
    gone = weakref.ref(one)
    idle.put("a", one)
    del one
    idle.put("a", two)
    assert gone() is None
    assert idle.take("a") is two


def test_a_forked_child_has_none_and_ends_none() -> None:
    idle: Idle[Connection] = Idle(seconds=0.05)
    connection = Connection()
    ended = weakref.ref(connection)
    idle.put("a", connection)
    del connection
    child = os.fork()
    if child == 0:
        mine = Connection()
        good = idle.take("a") is None and ended() is not None
        idle.put("a", mine)
        good = good and idle.take("a") is mine and ended() is not None
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
