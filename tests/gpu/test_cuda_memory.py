"""Real CUDA memory: what is published, held against the driver's and torch's own answers.

Needs torch, a CUDA device and pytest, and nothing else: ``python3 -m pytest -m gpu
tests/gpu/test_cuda_memory.py``.  Only the runner is a stand-in; tensors, allocator, driver and
the recorder are real.  All of it runs twice: here, and once more in a child process with
torch's expandable segments.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sglang_weight_hook.layout import variables  # noqa: E402
from sglang_weight_hook.publisher import capture as capturing  # noqa: E402
from sglang_weight_hook.publisher import (  # noqa: E402
    checksum,
    cuda_driver,
    document,
    memory,
    once,
    recorder,
    settings,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a torch that warns while it is imported is torch's affair
    torch: Any = pytest.importorskip("torch")

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

MIB = 1 << 20
IN_CHILD = "SGLANG_WEIGHT_HOOK_GPU_TEST_CHILD"  # set in the run with expandable segments


# --- the driver, asked by the test itself -------------------------------------------------


class Driver:
    """libcuda through ctypes, independent of the hook's own calls.  Statuses are returned."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")

    def address_range(self, address: int) -> tuple[int, int]:
        """Base and size of the allocation at ``address`` (cuMemGetAddressRange)."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        status = self.library.cuMemGetAddressRange_v2(
            ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        )
        assert status == 0, f"cuMemGetAddressRange({address:#x}) says {status}"
        return base.value, size.value

    def is_mapped(self, address: int) -> bool:
        """Whether ``address`` was mapped with cuMemMap (cuMemRetainAllocationHandle)."""
        handle = ctypes.c_uint64()
        status = self.library.cuMemRetainAllocationHandle(
            ctypes.byref(handle), ctypes.c_void_p(address)
        )
        if status == 0:
            self.library.cuMemRelease(handle)
        return int(status) == 0

    def read(self, address: int, size: int) -> bytearray:
        """``size`` bytes of device memory (cuMemcpyDtoH)."""
        data = bytearray(size)
        if size:
            target = (ctypes.c_ubyte * size).from_buffer(data)
            status = self.library.cuMemcpyDtoH_v2(
                ctypes.byref(target), ctypes.c_uint64(address), ctypes.c_size_t(size)
            )
            assert status == 0, f"cuMemcpyDtoH({address:#x}, {size}) says {status}"
        return data


@pytest.fixture(scope="module")
def driver() -> Driver:
    try:
        return Driver()
    except OSError as error:
        pytest.skip(f"no CUDA driver: {error}")


# --- a model and its publication ----------------------------------------------------------


class Runner:
    """A stand-in for SGLang's ModelRunner."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.gpu_id = torch.cuda.current_device()
        self.device = "cuda"
        self.is_draft_worker = False


def forget_everything() -> None:
    recorder._after_fork_in_child()
    once._said.clear()
    settings._base = settings._settings = None


@pytest.fixture(autouse=True)
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The output directory, on a machine with a GPU; every test begins with a fresh hook."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.empty(1, device="cuda")  # from here on this thread has a context
    gc.collect()  # what an earlier test left must not be freed in the middle of this one
    for name in list(os.environ):
        if name.startswith("SGLANG_WEIGHT_HOOK") and name != IN_CHILD:
            monkeypatch.delenv(name)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIR", str(tmp_path / "maps"))
    forget_everything()
    yield tmp_path / "maps"
    forget_everything()


def noise(dtype: Any, *shape: int) -> Any:
    """Random bytes as a tensor; no NaN trouble, since only bytes are ever compared."""
    count = 1
    for length in shape:
        count *= length
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, device="cuda").to(torch.bool)
    size = count * torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    return data.view(dtype).view(shape)


def fixed(tensor: Any) -> Any:
    return torch.nn.Parameter(tensor, requires_grad=False)


def a_model() -> Any:
    """Of everything: tied, transposed, padded, sliced, shared, tiny, and larger than a piece."""
    model = torch.nn.Module()
    model.embed = torch.nn.Module()
    model.embed.weight = fixed(noise(torch.bfloat16, 5003, 64))
    model.head = torch.nn.Module()
    model.head.weight = model.embed.weight
    model.layers = torch.nn.ModuleList()
    for _ in range(3):
        layer = torch.nn.Module()
        layer.qweight = fixed(noise(torch.float8_e4m3fn, 512, 1024).t())
        layer.scale = fixed(noise(torch.float32, 3))
        layer.padded = fixed(noise(torch.float16, 64, 40)[:, :33])
        layer.register_buffer("mask", noise(torch.bool, 7, 5))
        layer.register_buffer("zeros", noise(torch.int8, 1))
        both = noise(torch.bfloat16, 16, 96, 32)
        layer.w_kc, layer.w_vc = both[:, :64].transpose(1, 2), both[:, 64:]
        layer.pieces = [noise(torch.float32, 5), None]
        model.layers.append(layer)
    # Larger than the 20 MiB pieces of an expandable segment.
    model.big = fixed(noise(torch.uint8, 50 * MIB + 12345))
    model.empty = fixed(torch.empty(0, 8, device="cuda"))
    return model


def event(kind: str, effect: str, runner: Any = None, **details: Any) -> None:
    begun = recorder.begin(kind, effect, [] if runner is None else [runner], details)
    recorder.finish(begun, (True, "ok"), None)


def load(model: Any) -> Runner:
    runner = Runner(model)
    event("load_model", "load", runner)
    event("scheduler_ready", "settle")
    return runner


def update(runner: Runner) -> None:
    event("update_weights_from_disk", "update", runner)


def stream(runner: Runner) -> None:
    event("update_weights_from_tensor", "stream", runner)


def layout_in(maps: Path) -> Any:
    (path,) = maps.glob("weight_layout_*.json")
    return json.loads(path.read_bytes())


def state_in(maps: Path) -> Any:
    (path,) = maps.glob("weight_state_*.json")
    return json.loads(path.read_bytes())


def live_tensors(runner: Runner) -> dict[str, Any]:
    """Every tensor of `a_model` under the name that is published, found by the test itself."""
    model = runner.model
    found = dict(model.named_parameters())
    found.update(model.named_buffers())
    for number, layer in enumerate(model.layers):
        for name in ("w_kc", "w_vc"):
            found[f"layers.{number}.{name}"] = getattr(layer, name)
        found[f"layers.{number}.pieces.0"] = layer.pieces[0]
    return found


@pytest.fixture
def runner(maps: Path) -> Runner:
    return load(a_model())


@pytest.fixture
def layout(runner: Runner, maps: Path) -> Any:
    published = layout_in(maps)
    assert published["validation"]["left_out"] == {}
    return published


# --- addresses ----------------------------------------------------------------------------


def test_every_tensor_is_published_where_torch_has_it(runner: Runner, layout: Any) -> None:
    live = live_tensors(runner)
    assert set(layout["tensors"]) == set(live)
    for name, tensor in live.items():
        published = layout["tensors"][name]
        assert published["ptr"] == tensor.data_ptr(), name
        assert published["storage_ptr"] == tensor.untyped_storage().data_ptr(), name
        assert published["storage_size"] == tensor.untyped_storage().nbytes(), name
        assert published["device"] == f"cuda:{runner.gpu_id}", name
        assert published["resident"] is True, name
    assert layout["tensors"]["embed.weight"]["aliases"] == ["head.weight"]


def test_every_byte_of_every_tensor_is_read_back_through_its_published_address(
    runner: Runner, layout: Any, driver: Driver
) -> None:
    torch.cuda.synchronize()
    for name, tensor in live_tensors(runner).items():
        published = layout["tensors"][name]
        if tensor.numel() == 0:
            assert published["span"] == 0
            continue
        raw = torch.frombuffer(driver.read(published["ptr"], published["span"]), dtype=torch.uint8)
        dtype = getattr(torch, published["dtype"].rpartition(".")[2])
        seen = raw.view(dtype).as_strided(published["shape"], published["stride"])
        expected = tensor.detach().cpu()
        same = torch.equal(
            seen.contiguous().view(-1).view(torch.uint8),
            expected.contiguous().view(-1).view(torch.uint8),
        )
        assert same, f"{name} at {published['ptr']:#x} reads differently: {published}"


def test_every_region_can_be_read_from_its_first_to_its_last_byte(
    layout: Any, driver: Driver
) -> None:
    for region in layout["regions"]:
        assert len(driver.read(region["ptr"], region["size"])) == region["size"]


def test_each_region_lies_in_one_driver_allocation(layout: Any, driver: Driver) -> None:
    assert layout["regions"]
    for region in layout["regions"]:
        first, last = region["ptr"], region["ptr"] + region["size"] - 1
        said = (region["allocation_ptr"], region["allocation_size"])
        assert region["allocation_source"] == "driver", region
        assert driver.address_range(first) == driver.address_range(last) == said, region
        assert said[0] <= first, region
        assert last < sum(said), region


def test_the_regions_cover_every_tensor_and_nothing_twice(layout: Any) -> None:
    regions = layout["regions"]
    for one, following in zip(regions, regions[1:]):
        assert one["ptr"] + one["size"] <= following["ptr"], (one, following)
    for name, tensor in layout["tensors"].items():
        start, end = tensor["ptr"], tensor["ptr"] + tensor["span"]
        held = [region for region in regions if name in region["tensors"]]
        covered = sum(
            max(0, min(end, region["ptr"] + region["size"]) - max(start, region["ptr"]))
            for region in held
        )
        assert covered == tensor["span"], (name, tensor, held)


def expandable_segments(device: int) -> list[tuple[int, int]]:
    return [
        (segment["address"], segment["total_size"])
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device and segment.get("is_expandable")
    ]


def test_the_kind_of_each_allocation_is_as_the_driver_and_the_allocator_have_it(
    runner: Runner, layout: Any, driver: Driver
) -> None:
    expandable = expandable_segments(runner.gpu_id)
    assert bool(expandable) == bool(os.environ.get(IN_CHILD)), "the allocator is not as it was set"
    for region in layout["regions"]:
        mapped = driver.is_mapped(region["ptr"])
        in_expandable = any(start <= region["ptr"] < start + size for start, size in expandable)
        assert region["allocation_kind"] == ("vmm" if mapped else "cuda_malloc"), (
            f"{region} lies in memory of cuMemMap: {mapped}; in an expandable segment: "
            f"{in_expandable}; allocation_kind() now: "
            f"{cuda_driver.allocation_kind(region['ptr'])}"
        )
        assert mapped == in_expandable, region


def test_a_tensor_over_several_driver_allocations_has_a_region_in_each(
    runner: Runner, layout: Any, driver: Driver
) -> None:
    big = layout["tensors"]["big"]
    pieces = []
    position, end = big["ptr"], big["ptr"] + big["span"]
    while position < end:
        pieces.append(driver.address_range(position))
        position = sum(pieces[-1])
    held = [region for region in layout["regions"] if "big" in region["tensors"]]
    assert [(r["allocation_ptr"], r["allocation_size"]) for r in held] == pieces
    if expandable_segments(runner.gpu_id):
        assert len(pieces) > 1, f"torch no longer maps in pieces: {pieces}"


def test_a_weight_on_the_host_is_never_a_device_address(maps: Path) -> None:
    model = torch.nn.Module()
    model.here = fixed(noise(torch.float32, 4))
    model.offloaded = fixed(torch.zeros(4))
    model.pinned = fixed(torch.zeros(4).pin_memory())
    model.nowhere = fixed(torch.zeros(4, device="meta"))
    runner = load(model)
    layout = layout_in(maps)
    for name in ("offloaded", "pinned", "nowhere"):
        published = layout["tensors"][name]
        assert (published["ptr"], published["resident"]) == (0, False), name
    assert sorted(layout["validation"]["not_resident"]) == ["nowhere", "offloaded", "pinned"]
    assert [region["tensors"] for region in layout["regions"]] == [["here"]]
    assert runner.model.here.data_ptr() == layout["regions"][0]["ptr"]


def test_a_thread_without_a_cuda_context_of_its_own_publishes_the_same_regions(
    runner: Runner, layout: Any, maps: Path
) -> None:
    thread = threading.Thread(target=update, args=(runner,))
    thread.start()
    thread.join()
    after = layout_in(maps)
    assert after["event"]["kind"] == "update_weights_from_disk"
    assert after["regions"] == layout["regions"]
    assert after["layout_generation"] == layout["layout_generation"]
    assert after["content_generation"] == layout["content_generation"] + 1


def test_a_weight_that_moved_in_one_bucket_is_published_at_its_new_address(
    runner: Runner, layout: Any, maps: Path, driver: Driver
) -> None:
    stream(runner)
    assert state_in(maps)["layout_generation"] == layout["layout_generation"]
    old = runner.model.embed.weight.data
    runner.model.embed.weight.data = old.clone()
    stream(runner)
    after = layout_in(maps)
    assert after["layout_generation"] == layout["layout_generation"] + 1
    assert after["tensors"]["embed.weight"]["ptr"] == runner.model.embed.weight.data_ptr()
    assert after["tensors"]["embed.weight"]["ptr"] != old.data_ptr()
    assert after["event"]["moved"] == 1


# --- memory -------------------------------------------------------------------------------


def active_bytes() -> int:
    return int(torch.cuda.memory_stats()["active_bytes.all.current"])


def test_memory_adds_up_to_the_devices_total(runner: Runner, layout: Any) -> None:
    free, total = torch.cuda.mem_get_info()
    figures = layout["memory"]
    parts = (
        "weights_bytes",
        "lora_bytes",
        "kv_cache_bytes",
        "siblings_bytes",
        "other_live_bytes",
        "reserved_free_bytes",
        "other_bytes",
        "device_free_bytes",
    )
    said = {name: figures[name] for name in (*parts, "unbacked_bytes", "device_total_bytes")}
    assert figures["device_total_bytes"] == total
    assert sum(figures[name] for name in parts) - figures["unbacked_bytes"] == total, said
    assert figures["unbacked_bytes"] == 0, f"reserved more than is used: {said}"
    assert all(value >= 0 for value in said.values()), said
    # Everybody's, so it may have changed meanwhile, but not by much.
    assert abs(figures["device_free_bytes"] - free) <= 512 * MIB, (said, free)


def test_the_parts_of_memory_are_the_allocators_own(runner: Runner, layout: Any) -> None:
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


def test_a_live_tensor_that_is_nobodys_weight_is_other_live_memory(
    runner: Runner, layout: Any, maps: Path
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


# --- the memory saver's way: pages taken away behind addresses that stay --------------------


class Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp (cuda.h)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", Location),
        ("win32_handle_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class AccessDescription(ctypes.Structure):
    """CUmemAccessDesc (cuda.h)."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class Pages:
    """An address range of a fixed place whose pages come and go, as torch_memory_saver's do."""

    def __init__(self, library: Any, size: int) -> None:
        self.library = library
        device = torch.cuda.current_device()
        self.properties = AllocationProperties(type=1, location=Location(1, device))
        granularity = ctypes.c_size_t()
        self._do("cuMemGetAllocationGranularity", ctypes.byref(granularity), self._by_ref(), 0)
        self.size = -(-size // granularity.value) * granularity.value
        address = ctypes.c_uint64()
        arguments = (ctypes.c_size_t(self.size), ctypes.c_size_t(0), ctypes.c_uint64(0))
        self._do("cuMemAddressReserve", ctypes.byref(address), *arguments, ctypes.c_ulonglong(0))
        self.address = address.value
        self.access = AccessDescription(Location(1, device), 3)
        self.handle = ctypes.c_uint64()

    def _by_ref(self) -> Any:
        return ctypes.byref(self.properties)

    def _do(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            pytest.skip(f"{name} says {status}: no virtual memory management here")

    def back(self) -> None:
        size, nothing = ctypes.c_size_t(self.size), ctypes.c_ulonglong(0)
        self._do("cuMemCreate", ctypes.byref(self.handle), size, self._by_ref(), nothing)
        where = ctypes.c_uint64(self.address)
        self._do("cuMemMap", where, size, ctypes.c_size_t(0), self.handle, nothing)
        one = ctypes.c_size_t(1)
        self._do("cuMemSetAccess", where, size, ctypes.byref(self.access), one)

    def take(self) -> None:
        torch.cuda.synchronize()
        self._do("cuMemUnmap", ctypes.c_uint64(self.address), ctypes.c_size_t(self.size))
        self._do("cuMemRelease", self.handle)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }


def test_addresses_hold_while_the_pages_behind_them_are_taken_and_given_back(
    driver: Driver, maps: Path
) -> None:
    pages = Pages(driver.library, 4 * MIB)
    pages.back()
    model = torch.nn.Module()
    model.weight = fixed(torch.as_tensor(pages, device="cuda"))
    if model.weight.data_ptr() != pages.address:
        pytest.skip("torch copied the foreign memory")
    runner = load(model)
    before = layout_in(maps)
    (region,) = before["regions"]
    assert (region["ptr"], region["size"]) == (pages.address, pages.size)
    assert region["allocation_kind"] == "vmm"
    assert before["validation"]["allocator"]["storages_outside"] == 1

    pages.take()
    event("release_memory_occupation", "release", tags=["weights"], physical=True)
    released = layout_in(maps)
    assert released["state"] == state_in(maps)["state"] == "released"
    assert released["regions"] == before["regions"]
    assert released["layout_generation"] == before["layout_generation"]
    assert released["physical_epoch"] == before["physical_epoch"]

    pages.back()
    event("resume_memory_occupation", "resume", tags=["weights"], physical=True)
    after = layout_in(maps)
    assert after["state"] == "ready"
    assert after["regions"] == before["regions"]
    assert after["layout_generation"] == before["layout_generation"]
    assert after["physical_epoch"] == before["physical_epoch"] + 1
    runner.model.weight.fill_(7)
    torch.cuda.synchronize()
    assert driver.read(pages.address, 16) == bytearray([7] * 16)
    del model.weight, runner, model
    pages.take()


# --- which device -------------------------------------------------------------------------


def test_the_gpu_is_named_as_torch_names_it(runner: Runner, layout: Any) -> None:
    properties = torch.cuda.get_device_properties(runner.gpu_id)
    owner = layout["identity"]
    if not hasattr(properties, "uuid"):
        pytest.skip("this torch tells no UUID")
    assert owner["gpu_uuid"] == "GPU-" + str(properties.uuid).replace("GPU-", "")
    domain, bus, place = owner["pci_bus_id"].split(":")
    assert int(bus, 16) == properties.pci_bus_id
    assert int(domain, 16) == properties.pci_domain_id
    assert int(place.partition(".")[0], 16) == properties.pci_device_id


def test_the_gpu_is_named_as_nvidia_smi_names_it(layout: Any) -> None:
    command = ["nvidia-smi", "--query-gpu=uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no nvidia-smi: {error}")
    if asked.returncode:
        pytest.skip(f"nvidia-smi says {asked.stdout}{asked.stderr}")
    devices = dict(line.split(", ") for line in asked.stdout.splitlines() if ", " in line)
    owner = layout["identity"]
    assert owner["gpu_uuid"] in devices, devices
    # nvidia-smi writes the domain with eight digits, the driver with four.
    said = devices[owner["gpu_uuid"]].strip().lower()
    assert said.lstrip("0") == owner["pci_bus_id"].lower().lstrip("0")


# --- checksums ----------------------------------------------------------------------------


def test_checksums_on_the_device_equal_those_on_the_host(
    maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variables.CHECKSUM, "1")
    runner = load(a_model())
    layout = layout_in(maps)
    live = live_tensors(runner)
    on_host = checksum.checksums([(name, tensor.detach().cpu()) for name, tensor in live.items()])
    on_device = {name: tensor["checksum"] for name, tensor in layout["tensors"].items()}
    differ = {name for name in on_host if on_device.get(name) != on_host[name]}
    assert on_device == on_host, sorted(differ)
    assert layout["checksums"]["content_generation"] == layout["content_generation"]
    runner.model.big.view(torch.uint8)[12345] ^= 4
    update(runner)
    again = {n: t["checksum"] for n, t in layout_in(maps)["tensors"].items()}
    assert {name for name in again if again[name] != on_device[name]} == {"big"}


def test_checksums_need_no_more_than_a_few_pieces_of_device_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checksum, "PIECE", MIB)
    tensors = [("flat", noise(torch.uint8, 96 * MIB)), ("t", noise(torch.uint8, 4096, 8192).t())]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    checksum.checksums(tensors)
    peak = torch.cuda.max_memory_allocated() - before
    # One byte becomes a word of eight four times over, and its index: some 20 bytes a byte.
    assert peak <= 40 * MIB, f"{peak / MIB:.1f} MiB of scratch memory for pieces of 1 MiB"


# --- what it costs on the device ----------------------------------------------------------


def allocations() -> tuple[int, int]:
    """How often the caching allocator was asked so far, and what it holds."""
    stats = torch.cuda.memory_stats()
    return stats["allocation.all.allocated"], stats["reserved_bytes.all.current"]


def looks(runner: Runner) -> dict[str, Callable[[], object]]:
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


def test_nothing_is_allocated_on_the_device(runner: Runner, layout: Any) -> None:
    for name, look in looks(runner).items():
        look()
        torch.cuda.synchronize()
        before, free = allocations(), torch.cuda.mem_get_info()[0]
        look()
        assert allocations() == before, f"{name} allocated on the device"
        assert torch.cuda.mem_get_info()[0] == free, f"{name} took device memory"


def test_nothing_synchronises_in_torchs_eyes(runner: Runner, layout: Any) -> None:
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


def test_nothing_waits_for_the_device(runner: Runner, layout: Any) -> None:
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


# --- the same again with expandable segments ----------------------------------------------


@pytest.mark.skipif(bool(os.environ.get(IN_CHILD)), reason="this is that run")
def test_all_of_this_holds_with_expandable_segments(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        IN_CHILD: "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'child'}", str(Path(__file__).resolve())],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-20000:] + finished.stderr[-4000:]
    assert " passed" in finished.stdout, finished.stdout[-4000:]
