#!/usr/bin/env python3
"""Keep the weights of a slot registered with an RDMA library; register only what has changed.

    python register_regions.py weights_metadata 0

Prints one JSON object a line: what was registered and deregistered, and why.

`StandInLibrary` stands in for the library (pyverbs: ``MR(pd, length, access, address=ptr)``).
Where the real one runs decides what can be registered: inside the serving process the addresses
are its own; another process first has to import the allocation (``allocation_ptr``,
``allocation_size`` and ``allocation_kind`` of the region; CUDA IPC for ``cuda_malloc``) and
registers the same offsets in its own mapping.

What the state file asks for, see docs/format.md:

* another process, another ``instance`` (a runner made again), or the owner has exited: every
  registration is stale;
* ``layout_generation`` rose: register new regions, deregister removed ones, keep all others;
* ``physical_epoch`` rose: the pages behind the addresses are others, register everything again;
* ``released``: there are no pages; deregister, and wait for the resume;
* ``content_generation`` rose: the registrations stay good.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

try:
    import sglang_weight_hook as hook
except ImportError:  # run from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import sglang_weight_hook as hook


class Region(NamedTuple):
    """What one registration covers, with its allocation, which owns the pages."""

    ptr: int
    size: int
    allocation_ptr: int
    allocation_size: int


class StandInLibrary:
    """The two calls of an RDMA library that are needed here, with a record of registrations."""

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}  # by handle
        self._next = 1

    def register(self, region: Region) -> int:
        handle, self._next = self._next, self._next + 1
        self.regions[handle] = region
        return handle

    def deregister(self, handle: int) -> None:
        del self.regions[handle]


class Registrar:
    """Keeps the library's registrations equal to the published map."""

    def __init__(self, slot: hook.Slot, library: StandInLibrary) -> None:
        self.slot = slot
        self.library = library
        self.handles: dict[Region, int] = {}
        self.process: tuple[Any, ...] | None = None
        self.layout_generation = -1
        self.physical_epoch = -1
        self.content_generation = -1

    def look(self) -> dict[str, Any] | None:
        """One look at the state file, and what it takes; what was done, or None.

        Raises HookError when the map cannot be read.
        """
        if not self.slot.owner_alive():
            return self.drop("the owner has exited")
        state = self.slot.read_state()
        if state["state"] == "released":
            return self.drop("the weights are released")
        if state["state"] in ("loading", "updating"):
            return None  # it says so again when it is over
        if self.is_current(state):
            if state["content_generation"] == self.content_generation:
                return None
            self.content_generation = state["content_generation"]
            return self.report("new values", kept=len(self.handles))
        # No update starts while this runs, so the regions read are the regions in memory.  After
        # a failed update the addresses are good, too, whatever the values.
        try:
            with self.slot.weights_held(allow=("failed",)):
                return self.register_again(self.slot.read())
        except (hook.NotReady, hook.OwnerGone):
            return None  # it has just begun; the next look sees it

    def is_current(self, state: dict[str, Any]) -> bool:
        return (
            self.process == _process(state)
            and self.layout_generation == state["layout_generation"]
            and self.physical_epoch == state.get("physical_epoch", 0)
        )

    def register_again(self, document: hook.Document) -> dict[str, Any] | None:
        state = document.state
        if self.process != _process(state):
            why, stale = self.why_another(_process(state)), True
        elif self.physical_epoch != state.get("physical_epoch", 0):
            why, stale = "other pages", True
        else:
            why, stale = "another layout", False
        wanted = {Region(*(region[name] for name in Region._fields)) for region in document.regions}
        removed = [region for region in self.handles if stale or region not in wanted]
        for region in removed:
            self.library.deregister(self.handles.pop(region))
        new = sorted(wanted - self.handles.keys())
        kept = len(self.handles)
        for region in new:
            self.handles[region] = self.library.register(region)
        self.process = _process(state)
        self.layout_generation = state["layout_generation"]
        self.physical_epoch = state.get("physical_epoch", 0)
        self.content_generation = state["content_generation"]
        return self.report(why, registered=len(new), deregistered=len(removed), kept=kept)

    def why_another(self, process: tuple[Any, ...]) -> str:
        if self.process is None:
            return "first look"
        return "another runner" if self.process[:3] == process[:3] else "another process"

    def drop(self, why: str) -> dict[str, Any] | None:
        if not self.handles:
            return None
        count = len(self.handles)
        for handle in self.handles.values():
            self.library.deregister(handle)
        self.handles.clear()
        self.layout_generation = -1
        return self.report(why, deregistered=count)

    def report(self, why: str, **counts: int) -> dict[str, Any]:
        return {
            "why": why,
            "registered": 0,
            "deregistered": 0,
            "kept": 0,
            **counts,
            "bytes": sum(region.size for region in self.handles),
            "layout_generation": self.layout_generation,
            "content_generation": self.content_generation,
        }


def _process(state: dict[str, Any]) -> tuple[Any, ...]:
    """Whose addresses they are; release 0.1 of the server has no ``instance``."""
    owner = (state["pid"], state["process_start_ticks"], state["boot_id"])
    return (*owner, state.get("instance"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Keep the weights of one slot of a running SGLang registered for RDMA."
    )
    parser.add_argument("directory", help="the server's output directory (weights_metadata)")
    parser.add_argument("slot", help="the slot to follow: 0, 0_draft, ...")
    parser.add_argument(
        "--interval", type=float, default=0.2, help="seconds between reads of the state file"
    )
    options = parser.parse_args()
    registrar = Registrar(hook.open_slot(options.directory, options.slot), StandInLibrary())
    while True:
        try:
            done = registrar.look()
        except hook.HookError as error:
            print(f"register_regions: {error}", file=sys.stderr)
            return 1
        if done is not None:
            print(json.dumps(done), flush=True)
        time.sleep(options.interval)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
