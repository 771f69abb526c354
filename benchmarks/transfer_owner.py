"""Runs inside the process that owns the weights: how long registering takes, and beside it alone.

A subscriber (`mooncake`, `nixl`) around the hook's own.  With the first map it registers all
regions again and again, in turn with the engine alone, each time until a reader could reach them.
Then it counts what an update costs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from sglang_weight_hook.publisher.subscribers import Diff, Event, Region

OUTPUT, ROUNDS = "BENCHMARK_OUTPUT", "BENCHMARK_ROUNDS"


# Makes the regions readable by the engine; what undoes that.
Alone = Callable[[list[Region]], Callable[[], None]]


class Timed:
    """One of the hook's subscribers, and what it takes beside its engine alone."""

    def __init__(self, new: Callable[[], Any], alone: Alone) -> None:
        self._new, self._alone = new, alone
        self._inner = new()
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
        everything = _everything(document)
        regions = list(everything.regions_added)
        times: dict[str, list[float]] = {"hook": [], "alone": []}
        for number in range(2 * int(os.environ[ROUNDS]) + 2):
            gc.collect()
            if number % 2:
                inner = self._new()
                started = time.perf_counter()
                inner.after(slot, document, everything)
                times["hook"].append(time.perf_counter() - started)
                inner.gone(slot)
            else:
                started = time.perf_counter()
                undo = self._alone(regions)
                times["alone"].append(time.perf_counter() - started)
                undo()
        self._say(
            {
                "tensors": len(document["tensors"]),
                "regions": len(regions),
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


def _mooncake_alone() -> Alone:
    """In one engine that is there before: more of them in a process hinder each other (0.3.13)."""
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0

    def register(regions: list[Region]) -> Callable[[], None]:
        pointers, sizes = [one.ptr for one in regions], [one.size for one in regions]
        assert engine.batch_register_memory(pointers, sizes, "*") == 0

        def undo() -> None:
            assert engine.batch_unregister_memory(pointers) == 0

        return undo

    return register


def _nixl_alone(regions: list[Region]) -> Callable[[], None]:
    bindings = importlib.import_module("nixl_cu12._bindings")
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.syncMode = bindings.NIXL_THREAD_SYNC_STRICT
    config.pthrDelay = 10_000
    agent = bindings.nixlAgent(f"alone-{time.monotonic_ns()}", config)
    backend = agent.createBackend("UCX", {})
    rows = [(one.ptr, one.size, 0, b"") for one in regions]
    agent.registerMem(bindings.nixlRegDList(bindings.DRAM_SEG, rows), [backend])
    agent.getLocalMD()
    kept = [agent, backend]
    del agent, backend
    return kept.clear


def mooncake() -> Timed:
    from sglang_weight_hook.publisher.engines.mooncake import Mooncake

    return Timed(Mooncake, _mooncake_alone())


def nixl() -> Timed:
    from sglang_weight_hook.publisher.engines.nixl import Nixl

    return Timed(Nixl, _nixl_alone)
