"""Scenarios of a server's life: what SGLang does with its weights, and who disturbs it."""

from __future__ import annotations

import gc
import logging
import os
import time
from typing import Any

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import recorder
from tests.stress.simulated_server import Faults, SimulatedServer, fresh, listening, state_of

_kept: list[SimulatedServer] = []


def whole_life(server: SimulatedServer) -> None:
    """Claim, publish in every way there is, and release the slot."""
    server.load()
    server.move()
    server.bucket()
    server.memory("release")
    server.memory("resume")
    server.session()
    server.move()
    server.runner = None
    gc.collect()
    recorder.begin("nothing", "open")  # reaps


def life(directory: str, at: int, action: int) -> dict[str, Any]:
    """`whole_life`, with something happening at the ``at``-th file operation."""
    fresh(directory)
    faults = Faults()
    faults.arm(directory, at, action)
    with listening() as said:
        whole_life(SimulatedServer())
    faults.disarm()
    return {"operations": faults.count, "trail": faults.trail, "said": said}


def successor(directory: str) -> dict[str, Any]:
    """The next process on the slot; what it knows of itself."""
    fresh(directory)
    server = SimulatedServer()
    with listening() as said:
        server.load()
        server.move()
    _kept.append(server)  # a runner that is collected takes its documents with it
    return {"slot": server.tracked.slot.name, "truth": server.truth(), "said": said}


def publish_for_ever(directory: str, gpu_id: int = 0) -> None:
    """As fast as it goes, until killed."""
    fresh(directory, lock_timeout=1.0)
    logging.disable()
    server = SimulatedServer(gpu_id)
    server.load()
    for number in range(1, 1_000_000_000):
        server.move()
        if number % 7 == 0:
            server.bucket()
        if number % 50 == 0:
            server.memory("release")
            server.memory("resume")
        if number % 10 == 0:
            time.sleep(0.006)  # who polls for the lock has to find it free at times


def update_under_abuse(
    directory: str, talk: str, lock_timeout: float, updates: int
) -> dict[str, Any]:
    """Updates while somebody abuses the lock: how long each asked to sleep, and what it said."""
    fresh(directory, lock_timeout)
    server = SimulatedServer()
    server.load()
    # The two ends of a conversation, opened in the same order as by `processes.RunningScenario`.
    hearing, telling = open(f"{talk}.in"), open(f"{talk}.out", "w", buffering=1)  # noqa: SIM115
    print("loaded", file=telling)
    hearing.readline()
    slept: list[float] = []
    really = time.sleep

    def sleep(seconds: float) -> None:
        slept[-1] += seconds
        really(seconds)

    time.sleep = sleep  # type: ignore[assignment]  # for publish, too
    statuses = []
    with listening() as said:
        for _ in range(updates):
            slept.append(0.0)
            server.move()
            statuses.append(state_of(server.tracked.slot.path(files.STATE))["lock"])
    print("abused", file=telling)
    hearing.readline()
    slept.append(0.0)
    server.move()
    path = server.tracked.slot.path(files.STATE)
    return {
        "slept": slept,
        "locks": statuses,
        "after": state_of(path)["lock"],
        "said": said,
        "truth": server.truth(),
    }


def clock_backwards(directory: str) -> dict[str, Any]:
    """Every look at the time of day is an hour before the last."""
    from sglang_weight_hook import reader

    fresh(directory)
    server, states = SimulatedServer(), []
    slot = reader.open_slot(directory, "0")
    with listening() as said:
        server.load()
        Faults().clock(3600)
        known = slot.read_state()
        for _ in range(10):
            server.move()
            changed = slot.wait_for_change(known, timeout=10)
            assert changed is not None
            known = changed
            states.append([known["layout_generation"], known["updated_at"], known["lock"]])
        document = slot.read(timeout=0)
        followed = [found.layout_generation for found in slot.generations(timeout=0)]
    Faults().clock(0)
    return {
        "states": states,
        "said": said,
        "followed": followed,
        "true": {k: [t["ptr"], t["shape"]] for k, t in document.tensors.items()} == server.truth(),
    }


def as_another_user(directory: str, uid: int) -> dict[str, Any]:
    """A server that is not root."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    fresh(directory)
    server = SimulatedServer()
    with listening() as said:
        server.load()
        for _ in range(3):
            server.move()
    _kept.append(server)
    return {
        "said": said,
        "slot": server.tracked.slot.name if server.tracked else None,
        "truth": server.truth(),
    }
