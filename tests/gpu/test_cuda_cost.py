"""What capture and publication cost on the device: no allocation, no synchronisation, no wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.publisher import capture as capturing
from sglang_weight_hook.publisher import document, memory, once
from tests.gpu.cuda_model import event, state_in
from tests.unit.fake_sglang import FakeRunner, stream, update

torch: Any = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("maps"),
]


def allocations() -> tuple[int, int]:
    """How often the caching allocator was asked so far, and what it holds."""
    stats = torch.cuda.memory_stats()
    return stats["allocation.all.allocated"], stats["reserved_bytes.all.current"]


def looks(runner: FakeRunner) -> dict[str, Callable[[], object]]:
    captured = capturing.capture(runner)
    return {
        "capture": lambda: capturing.capture(runner),
        "moved": lambda: capturing.moved(captured, runner),
        "regions": lambda: document.regions_of(captured),
        "memory": lambda: memory.device("cuda"),
        "update": lambda: update(runner),
        "stream": lambda: stream(runner),
        "settle": lambda: event("scheduler_ready", "settle"),
    }


def test_nothing_is_allocated_on_the_device(runner: FakeRunner, layout: Any) -> None:
    for name, look in looks(runner).items():
        look()
        torch.cuda.synchronize()
        before, free = allocations(), torch.cuda.mem_get_info()[0]
        look()
        assert allocations() == before, f"{name} allocated on the device"
        assert torch.cuda.mem_get_info()[0] == free, f"{name} took device memory"


def test_nothing_synchronises_in_torchs_eyes(runner: FakeRunner, layout: Any) -> None:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for look in looks(runner).values():
            look()
        update(runner)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    # The recorder would turn torch's complaint into a problem rather than raise it.
    assert state_in(Path(os.environ["SGLANG_WEIGHT_HOOK_DIR"]))["problem"] is None
    assert {key for key in once._said if not key.startswith("published ")} == set()


def test_nothing_waits_for_the_device(runner: FakeRunner, layout: Any) -> None:
    calls = looks(runner)
    for look in calls.values():
        look()
    torch.cuda.synchronize()
    for name, look in calls.items():
        done = torch.cuda.Event()
        torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
        done.record()
        started = time.perf_counter()
        look()
        seconds = time.perf_counter() - started
        still_busy = not done.query()
        torch.cuda.synchronize()
        assert still_busy, f"{name} returned after {seconds:.2f} s, when the device was idle"
