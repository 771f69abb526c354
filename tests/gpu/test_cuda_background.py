"""The thread that compares the map with memory, over real CUDA memory.

It has no CUDA context of its own: it makes the capturing thread's current while it asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.publisher import once, recorder
from sglang_weight_hook.publisher.devices import cuda_driver
from tests.gpu.cuda_model import MIB, Driver, a_model, layout_in, load, noise, state_in
from tests.gpu.map_checks import check_geometry, check_memory
from tests.unit.fake_sglang import FakeRunner, forget, stream

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.fixture
def runner(maps: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    """Looked at every 0.2 s."""
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CHECK_SECONDS", "0.2")
    monkeypatch.delenv("SGLANG_WEIGHT_HOOK_QUIET_MS")
    forget()
    return load(a_model())


class Document:
    """As much of a reader's document as the checks of a map ask for."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw


def wait_for(holds: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, once._said
        time.sleep(0.01)


def kind_in(maps: Path) -> str:
    return str(state_in(maps)["event"]["kind"])


def allocations() -> tuple[int, int]:
    stats = torch.cuda.memory_stats()
    return stats["allocation.all.allocated"], stats["reserved_bytes.all.current"]


def in_a_thread(act: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]


def test_what_moved_by_itself_is_published_with_the_drivers_allocation(
    runner: FakeRunner, maps: Path, driver: Driver
) -> None:
    wait_for(lambda: kind_in(maps) == "scheduler_ready")
    moved = noise(torch.uint8, 70 * MIB)  # in an allocation that nobody has asked about yet
    runner.model.layers[1].mask = moved
    wait_for(lambda: kind_in(maps) == "unannounced_change")
    layout = layout_in(maps)
    tensor = layout["tensors"]["layers.1.mask"]
    assert (tensor["ptr"], tensor["size"]) == (moved.data_ptr(), 70 * MIB)
    (region, *_) = [one for one in layout["regions"] if "layers.1.mask" in one["tensors"]]
    assert region["allocation_source"] == "driver"
    around = (region["allocation_ptr"], region["allocation_size"])
    assert around == driver.address_range(region["ptr"])
    assert region["allocation_kind"] in ("cuda_malloc", "vmm")
    check_geometry(Document(layout), {})  # type: ignore[arg-type]
    check_memory(Document(layout), {})  # type: ignore[arg-type]
    total, free = layout["memory"]["device_total_bytes"], layout["memory"]["device_free_bytes"]
    assert (free, total) == torch.cuda.mem_get_info(runner.gpu_id)
    assert bytes(driver.read(tensor["ptr"], 4096)) == bytes(moved[:4096].cpu().numpy())
    odd = {key for key in once._said if not key.startswith(("published ", "unannounced "))}
    assert odd == set()


def test_the_thread_takes_no_device_memory_and_so_makes_no_context(
    runner: FakeRunner, maps: Path
) -> None:
    one, other = noise(torch.bool, 70, 50), noise(torch.bool, 70, 50)
    torch.cuda.synchronize()
    generation = state_in(maps)["layout_generation"]
    before, free = allocations(), torch.cuda.mem_get_info()[0]
    for number, tensor in enumerate((one, other), 1):
        runner.model.layers[1].mask = tensor
        wait_for(lambda: state_in(maps)["layout_generation"] == generation + number)  # noqa: B023
    assert allocations() == before
    assert torch.cuda.mem_get_info()[0] == free


def test_a_thread_has_the_borrowed_context_only_while_it_asks(runner: FakeRunner) -> None:
    (tracked,) = recorder._Recorder.runners()
    context = tracked.context
    assert context is not None
    assert context == cuda_driver.current_context()
    address = runner.model.embed.weight.data_ptr()

    def ask() -> tuple[Any, ...]:
        before = cuda_driver.current_context()
        with cuda_driver.using_context(context):
            inside = cuda_driver.current_context()
            found = cuda_driver.allocation_of(address), cuda_driver.allocation_kind(address)
        return before, inside, found, cuda_driver.current_context()

    before, inside, found, after = in_a_thread(ask)
    assert before is None
    assert inside == context
    assert found == (cuda_driver.allocation_of(address), cuda_driver.allocation_kind(address))
    assert None not in found
    assert after is None
    assert cuda_driver.current_context() == context  # this thread's own is as it was


def test_the_thread_publishes_while_the_device_is_busy(runner: FakeRunner, maps: Path) -> None:
    other = noise(torch.bool, 70, 50)
    done = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(8_000_000_000)  # clock cycles: some four seconds
    done.record()
    runner.model.layers[1].mask = other
    wait_for(lambda: kind_in(maps) == "unannounced_change", 3.0)
    still_busy = not done.query()
    torch.cuda.synchronize()
    assert still_busy


def test_the_thread_ends_a_stream_and_publishes_what_it_moved(
    runner: FakeRunner, maps: Path, driver: Driver
) -> None:
    wait_for(lambda: state_in(maps)["state"] == "ready")
    weight = runner.model.layers[0].scale
    weight.data = noise(torch.float32, 20 * MIB)
    stream(runner)
    assert state_in(maps)["state"] == "updating"
    wait_for(lambda: state_in(maps)["state"] == "ready")
    layout = layout_in(maps)
    assert layout["event"]["kind"] == "update_weights_from_tensor"
    assert layout["tensors"]["layers.0.scale"]["ptr"] == weight.data_ptr()
    (region, *_) = [one for one in layout["regions"] if "layers.0.scale" in one["tensors"]]
    around = (region["allocation_ptr"], region["allocation_size"])
    assert around == driver.address_range(region["ptr"])
    check_geometry(Document(layout), {})  # type: ignore[arg-type]
    check_memory(Document(layout), {})  # type: ignore[arg-type]
