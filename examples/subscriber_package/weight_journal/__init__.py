"""A subscriber to copy: keeps (a stand-in for) registrations of all weights, and a journal of it.

    pip install examples/subscriber_package         into the server's environment
    SGLANG_WEIGHT_HOOK_SUBSCRIBERS=weight_journal:make WEIGHT_JOURNAL=journal-{pid}.jsonl \
        python -m sglang.launch_server …

It runs in the server's process, in a thread of its own, while SGLang waits: be quick.  Put calls of
your library into `Registrations`; the rest can stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_weight_hook.publisher.subscribers import Diff, Event, Region


class Registrations:
    """In the place of a library that registers memory: a set of regions."""

    def __init__(self) -> None:
        self.regions: set[Region] = set()
        self.calls = 0

    def register(self, region: Region) -> None:
        self.calls += 1
        self.regions.add(region)

    def deregister(self, region: Region) -> None:
        self.calls += 1
        self.regions.discard(region)


class Journal:
    """The subscriber: the three methods that the hook calls."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._slots: dict[str, Registrations] = {}

    def before(self, slot: str, event: Event) -> None:
        """Nothing has been changed yet.  What is about to lose its pages must be deregistered."""
        known = self._slots.get(slot)
        if known is not None and "weights" in event.releases:
            for region in list(known.regions):
                known.deregister(region)
        self._write(slot, "before", kind=event.kind, effects=sorted(event.effects))

    def after(self, slot: str, document: Mapping[str, Any], diff: Diff) -> None:
        """The document is true again, and SGLang waits for this call before it goes on."""
        known = self._slots.setdefault(slot, Registrations())
        calls = known.calls
        # While the model loads, everything will move once more.
        served = document["state"] in ("ready", "failed")
        wanted = {*diff.regions_kept, *diff.regions_added} if served else set()
        # Other pages behind the same addresses: a registration of before is of no use.
        old = known.regions if diff.repaged else known.regions - wanted
        for region in list(old):
            known.deregister(region)
        for region in wanted - known.regions:
            known.register(region)
        self._write(
            slot,
            "after",
            kind=document["event"]["kind"],
            success=document["event"]["success"],
            state=document["state"],
            layout_generation=document["layout_generation"],
            content_generation=document["content_generation"],
            registered=len(known.regions),
            calls=known.calls - calls,
            moved=len(diff.moved),
        )

    def gone(self, slot: str) -> None:
        """The memory may be freed already: forget it, touch nothing."""
        self._slots.pop(slot, None)
        self._write(slot, "gone")

    def _write(self, slot: str, method: str, **more: Any) -> None:
        line = {"slot": slot, "method": method, "pid": os.getpid(), **more}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def make() -> Journal:
    """What ``SGLANG_WEIGHT_HOOK_SUBSCRIBERS`` names.  Called once a process."""
    path = os.environ.get("WEIGHT_JOURNAL", "weight_journal-{pid}.jsonl")
    return Journal(path.replace("{pid}", str(os.getpid())))
