"""Runs inside the process that owns the weights: how long registering takes, and beside it alone.

A subscriber (`timed`) around the hook's own.  With the first map it registers all regions again and
again, in turn with a bare engine that registers the same; then it counts what an update costs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from sglang_weight_hook.publisher.subscribers import Diff, Event, Region

OUTPUT, ROUNDS = "BENCHMARK_OUTPUT", "BENCHMARK_ROUNDS"


class Timed:
    """The subscriber ``mooncake``, and what it takes."""

    def __init__(self) -> None:
        from sglang_weight_hook.publisher.engines import mooncake

        self._new = mooncake.Mooncake
        self._inner = self._new()
        self._measured = False
        self._calls = 0
        self._after = 0.0

    def before(self, slot: str, event: Event) -> None:
        self._inner.before(slot, event)

    def after(self, slot: str, document: Mapping[str, Any], diff: Diff) -> None:
        if not self._measured and document["state"] == "ready":
            self._measured = True
            self._measure(slot, document)
            self._inner = self._new()
            self._inner.after(slot, document, _everything(document))
            self._count()
            return
        started = time.perf_counter()
        self._inner.after(slot, document, diff)
        if self._measured:
            self._say({"calls": self._calls, "after": time.perf_counter() - started})

    def gone(self, slot: str) -> None:
        self._inner.gone(slot)

    def _measure(self, slot: str, document: Mapping[str, Any]) -> None:
        from mooncake.engine import TransferEngine

        everything = _everything(document)
        pointers = [region.ptr for region in everything.regions_added]
        sizes = [region.size for region in everything.regions_added]
        times: dict[str, list[float]] = {"hook": [], "alone": []}
        for number in range(2 * int(os.environ[ROUNDS]) + 2):
            if number % 2:
                inner = self._new()
                started = time.perf_counter()
                inner.after(slot, document, everything)
                times["hook"].append(time.perf_counter() - started)
                inner.gone(slot)
            else:
                engine = TransferEngine()
                assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
                started = time.perf_counter()
                assert engine.batch_register_memory(pointers, sizes, "*") == 0
                times["alone"].append(time.perf_counter() - started)
                assert engine.batch_unregister_memory(pointers) == 0
        self._say(
            {
                "tensors": len(document["tensors"]),
                "regions": len(pointers),
                **{name: values[1:] for name, values in times.items()},
            }
        )

    def _count(self) -> None:
        """Count every further call of the engine that registers or deregisters."""
        engine: Any = self._inner._engine
        exchange = engine.exchange

        def counted(old: list[Any], new: list[Any]) -> None:
            self._calls += len(old) + len(new)
            exchange(old, new)

        engine.exchange = counted

    def _say(self, what: Mapping[str, Any]) -> None:
        with open(os.environ[OUTPUT], "a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


def _everything(document: Mapping[str, Any]) -> Diff:
    regions = tuple(Region(r["ptr"], r["size"], r["device"]) for r in document["regions"])
    return Diff(regions, (), (), (), tuple(document["tensors"]), (), True, False, True)


def timed() -> Timed:
    return Timed()
