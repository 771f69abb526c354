"""Pages taken away behind addresses that stay, as the memory saver does it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.cuda_model import MIB, Driver, event, fixed, layout_in, load, state_in

torch: Any = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("maps"),
]


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
