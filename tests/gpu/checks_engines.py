"""Checks of weights read through a transfer engine from a real server's GPU.

The server registers its own device memory; this process pulls it into its host memory over the
engine, with nothing from the server but the published files, and holds it against the checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import sglang_weight_hook as hook
from tests.gpu.checks_bytes import compare, stands
from tests.gpu.gpu_server import GpuServer
from tests.gpu.map_checks import Report

SUBSCRIBERS = "SGLANG_WEIGHT_HOOK_SUBSCRIBERS"


def engine(name: str) -> Callable[..., None]:
    """The check of one engine: after the load, an update from disk, release and resume."""

    def check(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
        arguments = ["--enable-memory-saver"]
        with GpuServer(python, a, folder, arguments, {SUBSCRIBERS: name}) as server:
            slot = server.maps.slot("0")
            with report.check(f"{name}: what is registered") as seen:
                seen.update(_registered(slot, name))
            with report.check(f"{name}: bytes pulled are the checkpoint's") as seen:
                started = time.perf_counter()
                seen.update(compare(slot, a, name))
                seen["seconds"] = round(time.perf_counter() - started, 3)
            with report.check(f"{name}: bytes pulled after an update from disk") as seen:
                status, answer = server.update_weights_from_disk(b)
                assert status == 200, answer
                seen.update(compare(slot, b, name))
            with report.check(f"{name}: released memory is not read") as seen:
                document = slot.read()
                server.wait_idle()
                status, answer = server.post("/release_memory_occupation", {"tags": ["weights"]})
                assert status == 200, answer
                try:
                    with document.open_memory(via=name) as memory:
                        memory.read(next(iter(document.iter_tensors())).name)
                except hook.HookError as error:
                    seen["said"] = f"{type(error).__name__}: {error}"
                else:
                    raise AssertionError("released memory was read")
            with report.check(f"{name}: bytes pulled after resume and an update") as seen:
                status, answer = server.post("/resume_memory_occupation", {"tags": ["weights"]})
                assert status == 200, answer
                status, answer = server.update_weights_from_disk(b)
                assert status == 200, answer
                seen.update(compare(slot, b, name))
                seen.update(_registered(slot, name))
            stands(report, server)

    return check


def _registered(slot: hook.Slot, name: str) -> dict[str, object]:
    transport = json.loads(Path(slot.path("weight_transport_{}.json")).read_text())
    found = transport["engines"][name]
    assert found["state"] == "registered", found
    return {key: value for key, value in found.items() if key not in ("metadata", "session")}
