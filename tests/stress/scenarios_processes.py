"""Scenarios of threads, forks, signals and the interpreter's end."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.stress.processes import measure
from tests.stress.simulated_server import SimulatedServer, fresh, is_true, listening
from tests.unit.fake_sglang import event, update

_kept: list[SimulatedServer] = []


def threads_and_forks(directory: str, rounds: int) -> dict[str, Any]:
    """Two engines of one process, updated by threads, while children are forked off."""
    fresh(directory, lock_timeout=5.0)
    servers = [SimulatedServer(), SimulatedServer()]
    with listening() as said:
        for server in servers:
            server.load()
        errors: list[str] = []
        forked: list[int] = []

        def work(server: SimulatedServer, number: int) -> None:
            try:
                for turn in range(rounds):
                    (server.bucket, server.session, server.bucket)[(number + turn) % 3]()
            except BaseException as error:
                errors.append(repr(error))

        threads = [
            threading.Thread(target=work, args=(servers[number % 2], number)) for number in range(6)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and len(forked) < rounds:
            pid = os.fork()
            if pid == 0:  # wherever the threads were: it locks nothing, publishes nothing, ends
                try:
                    servers[0].bucket()
                    servers[1].move()
                    gc.collect()
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            forked.append(pid)
            time.sleep(0.005)
        statuses = [os.waitpid(pid, 0)[1] for pid in forked]
        for thread in threads:
            thread.join()
        calm = [not server.tracked.inside and is_true(server) for server in servers]
        for server in servers:
            server.move()
    return {
        "said": said,
        "errors": errors,
        "forks": len(forked),
        "statuses": sorted(set(statuses)),
        "calm": calm,
        "true": [is_true(server) for server in servers],
        "slots": [server.tracked.slot.name for server in servers],
    }


def fork_and_go_on(directory: str) -> dict[str, Any]:
    """A child forked after the load outlives its parent; the slot does not live on in it."""
    fresh(directory)
    server = SimulatedServer()
    server.load()
    _kept.append(server)
    pid = os.fork()
    if pid == 0:
        os.close(1)
        os.close(2)
        time.sleep(600)
        os._exit(0)
    return {"child": pid}


def leave_while_publishing(directory: str, how: str) -> None:
    """The interpreter ends while threads publish."""
    fresh(directory)
    logging.disable()
    server = SimulatedServer()
    server.load()
    _kept.append(server)

    def work() -> None:
        while True:
            server.bucket()
            server.memory("release")
            server.memory("resume")

    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    if how == "at exit":
        import atexit

        atexit.register(server.bucket)
    if how == "collected":
        server.runner.model = None
    time.sleep(0.05)
    if how == "exception":
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    raise SystemExit({"exception": "with a message"}.get(how, 0))


def interrupted_often(directory: str, updates: int) -> dict[str, Any]:
    """A signal with a handler (as SGLang has for SIGQUIT) every fraction of a millisecond."""
    fresh(directory)
    server, count = SimulatedServer(), 0

    def handler(number: int, frame: Any) -> None:
        nonlocal count
        count += 1

    signal.signal(signal.SIGALRM, handler)
    with listening() as said:
        server.load()
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        for _ in range(updates):
            server.move()
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"said": said, "signals": count, "true": is_true(server)}


def grows(directory: str, rounds: int) -> dict[str, Any]:
    """Everything that a server does, over and over: resident bytes, descriptors and objects.

    Each of them once a quarter of the rounds are over, and at the end.
    """
    fresh(directory)
    server = SimulatedServer()
    server.load()
    seen = []
    for number in range(rounds + 1):
        if number in (rounds // 4, rounds):
            gc.collect()
            resident, descriptors, files = measure(os.getpid(), Path(directory))
            seen.append(
                {
                    "resident": resident,
                    "descriptors": descriptors,
                    "objects": len(gc.get_objects()),
                    "files": len(files),
                }
            )
        update(server.runner)
        server.bucket()
        server.session()
        server.memory("release")
        server.memory("resume")
        event("update_weights_from_disk", "update", [server.runner], result=(False, "missing"))
    return {"early": seen[0], "late": seen[1]}
