"""The published memory figures, held against the driver's and torch's own answers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.cuda_model import MIB, Driver, a_model, fixed, layout_in, live_tensors, load, noise
from tests.unit.fake_sglang import FakeRunner, update
from tests.unit.memory_figures import PARTS, sum_of_parts

torch: Any = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("maps"),
]


def active_bytes() -> int:
    return int(torch.cuda.memory_stats()["active_bytes.all.current"])


def test_memory_adds_up_to_the_devices_total(runner: FakeRunner, layout: Any) -> None:
    free, total = torch.cuda.mem_get_info()
    figures = layout["memory"]
    said = {name: figures[name] for name in (*PARTS, "unbacked_bytes", "device_total_bytes")}
    assert figures["device_total_bytes"] == total
    assert sum_of_parts(figures) == total, said
    assert figures["unbacked_bytes"] == 0, f"reserved more than is used: {said}"
    assert all(value >= 0 for value in said.values()), said
    # Everybody's, so it may have changed meanwhile, but not by much.
    assert abs(figures["device_free_bytes"] - free) <= 512 * MIB, (said, free)


def test_the_parts_of_memory_are_the_allocators_own(runner: FakeRunner, layout: Any) -> None:
    figures = layout["memory"]
    storages = {}
    for tensor in live_tensors(runner).values():
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    assert figures["weights_bytes"] == sum(storages.values())
    # Nothing has been allocated or freed since: the figures are exact.
    live, reserved = active_bytes(), torch.cuda.memory_reserved()
    assert layout["validation"]["allocator"]["live_bytes"] == live
    assert figures["weights_bytes"] + figures["other_live_bytes"] == live
    assert figures["reserved_free_bytes"] == reserved - live


def test_what_is_live_and_unexplained_is_what_was_live_before_and_the_rounding(
    maps: Path,
) -> None:
    before = active_bytes()
    runner = load(a_model())
    allocator = layout_in(maps)["validation"]["allocator"]
    starts = {
        tensor.untyped_storage().data_ptr()
        for tensor in live_tensors(runner).values()
        if tensor.untyped_storage().nbytes()
    }
    blocks = {}
    for segment in torch.cuda.memory_snapshot():
        address = segment["address"]
        for block in segment["blocks"]:
            blocks[address] = block
            address += block["size"]
    missing = [f"{start:#x}" for start in starts if start not in blocks]
    assert not missing, f"storages that begin no block of the allocator: {missing}"
    rounding = sum(blocks[s]["size"] - blocks[s]["requested_size"] for s in starts)
    assert allocator["storages_outside"] == 0
    assert allocator["unexplained_bytes"] == before + rounding, (allocator, before, rounding)
    assert rounding <= len(starts) * MIB


def test_a_live_tensor_that_is_no_weight_is_other_live_memory(
    runner: FakeRunner, layout: Any, maps: Path
) -> None:
    activation = torch.zeros(4 * MIB, dtype=torch.uint8, device="cuda")
    update(runner)
    after = layout_in(maps)
    grown = after["memory"]["other_live_bytes"] - layout["memory"]["other_live_bytes"]
    assert 4 * MIB <= grown <= 6 * MIB, grown
    assert after["memory"]["weights_bytes"] == layout["memory"]["weights_bytes"]
    assert activation.numel() == 4 * MIB


def test_a_weight_in_a_private_pool_is_inside_the_allocator(maps: Path) -> None:
    if not (hasattr(torch.cuda, "MemPool") and hasattr(torch.cuda, "use_mem_pool")):
        pytest.skip("this torch has no private pools")
    model = torch.nn.Module()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        model.weight = fixed(torch.zeros(3 * MIB, dtype=torch.uint8, device="cuda"))
    runner = load(model)
    layout = layout_in(maps)
    assert layout["validation"]["allocator"]["storages_outside"] == 0
    assert layout["memory"]["weights_bytes"] == 3 * MIB
    assert runner.model.weight.data_ptr() == layout["tensors"]["weight"]["ptr"]


EXPORTER = """
import os, sys, torch, torch.multiprocessing
from multiprocessing.reduction import ForkingPickler
tensor = torch.arange(3 << 20, dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
sys.stdout.buffer.write(bytes(ForkingPickler.dumps(tensor)))
sys.stdout.flush()
os.close(1)
sys.stdin.read()
"""


@pytest.fixture
def imported() -> Iterator[Any]:
    """A tensor in another process's memory, through CUDA IPC."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    }
    exporter = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", EXPORTER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert exporter.stdout is not None
        data = exporter.stdout.read()
        if not data:
            pytest.skip(f"no CUDA IPC here: {exporter.communicate()[1].decode()[-500:]}")
        try:
            tensor = pickle.loads(data)
        except Exception as error:
            pytest.skip(f"no CUDA IPC here: {error}")
        yield tensor
        del tensor
    finally:
        exporter.kill()
        exporter.communicate()
        torch.cuda.ipc_collect()


def test_a_weight_imported_from_another_process_is_counted_outside_the_allocator(
    imported: Any, maps: Path, driver: Driver
) -> None:
    model = torch.nn.Module()
    model.own = fixed(noise(torch.float32, 8))
    model.imported = fixed(imported)
    runner = load(model)
    layout = layout_in(maps)
    published = layout["tensors"]["imported"]
    assert published["ptr"] == imported.data_ptr()
    assert layout["validation"]["allocator"]["storages_outside"] == 1, layout["validation"]
    figures = layout["memory"]
    assert figures["weights_bytes"] == 12 * MIB + 32
    assert figures["other_live_bytes"] >= 0
    (region,) = (r for r in layout["regions"] if "imported" in r["tensors"])
    assert driver.address_range(published["ptr"]) == (
        region["allocation_ptr"],
        region["allocation_size"],
    )
    data = torch.frombuffer(driver.read(published["ptr"], published["span"]), dtype=torch.int32)
    assert torch.equal(data, imported.cpu())
    assert region["allocation_kind"] == "imported"
    del model.imported, runner, model
