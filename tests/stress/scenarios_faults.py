"""Scenarios of failure: of a file operation, through faults.c, and of a line of the hook."""

from __future__ import annotations

import os
import sys
from typing import Any

from tests.stress.simulated_server import Faults, SimulatedServer, fresh, is_true, listening


def fault(
    directory: str, at: int, action: int, code: int, mask: int = 127, times: int = 1
) -> dict[str, Any]:
    """Updates while a file operation fails; what a reader finds after each, and after the end.

    The reader is this process itself: the truth does not move between an update and a look.
    """
    from sglang_weight_hook import reader

    fresh(directory, lock_timeout=0.05)
    faults, server = Faults(), SimulatedServer()
    slot = reader.open_slot(directory, "0")
    wrong: list[str] = []

    def look(when: str) -> None:
        try:
            document = slot.read(timeout=0)
        except reader.HookError:
            return
        if not document.owner_alive() or document.state["state"] == "updating":
            return
        published = {name: [t["ptr"], t["shape"]] for name, t in document.tensors.items()}
        if published and published != server.truth():
            wrong.append(f"{when}: old addresses as {document.state['state']}")

    with listening() as said:
        server.load()
        descriptors = len(os.listdir("/proc/self/fd"))
        faults.arm(directory, at, action, code, mask, times)
        for step in ("move", "bucket", "move", "memory"):
            if step == "memory":
                server.memory("release")
                server.memory("resume")
            else:
                getattr(server, step)()
            faults.disarm()
            look(step)
            faults.rearm()
        seen = faults.count
        faults.disarm()
        server.move()
        look("healed")
    name = server.tracked.slot.name
    document = reader.open_slot(directory, name).read(timeout=0)
    healed = {key: [t["ptr"], t["shape"]] for key, t in document.tensors.items()} == server.truth()
    return {
        "operations": seen,
        "wrong": wrong,
        "said": said,
        "slot": name,
        "healed": healed and document.owner_alive() and document.state["problem"] is None,
        "descriptors": len(os.listdir("/proc/self/fd")) - descriptors,
        "left": [entry for entry in os.listdir(directory) if entry.startswith(".")],
    }


def faulty_start(directory: str, at: int, action: int, code: int, times: int) -> dict[str, Any]:
    """A server that starts on a faulty place and is updated when it is well again."""
    fresh(directory, lock_timeout=0.05)
    faults, server = Faults(), SimulatedServer()
    faults.arm(directory, at, action, code, 127, times)
    with listening() as said:
        server.load()
        faults.disarm()
        server.move()
        server.move()
    return {
        "operations": faults.count,
        "said": said,
        "slot": server.tracked.slot.name if server.tracked else None,
        "truth": server.truth(),
    }


class Raised(BaseException):
    """What a signal handler throws into the middle, as Ctrl-C does."""


def thrown_into(directory: str, line: int) -> dict[str, Any]:
    """An exception out of a signal handler at the ``line``-th line of the hook in an update."""
    from sglang_weight_hook import reader

    fresh(directory, lock_timeout=0.05)
    server, left = SimulatedServer(), line
    server.load()

    def trace(frame: Any, kind: str, argument: Any) -> Any:
        nonlocal left
        if "sglang_weight_hook" not in frame.f_code.co_filename:
            return None
        if kind == "line":
            left -= 1
            if left == 0:
                raise Raised
        return trace

    thrown = False
    with listening() as said:
        sys.settrace(trace)
        try:
            server.move()
        except Raised:
            thrown = True
        finally:
            sys.settrace(None)
        slot, wrong = reader.open_slot(directory, "0"), False
        try:
            document = slot.read(timeout=0)
            found = {name: [t["ptr"], t["shape"]] for name, t in document.tensors.items()}
            shown = document.owner_alive() and document.state["state"] != "updating"
            wrong = shown and bool(found) and found != server.truth()
        except reader.HookError:
            pass
        for _ in range(2):
            server.move()
        try:
            healed = is_true(server)
        except reader.HookError:
            healed = False
    return {"thrown": thrown, "wrong": wrong, "healed": healed, "said": said}
