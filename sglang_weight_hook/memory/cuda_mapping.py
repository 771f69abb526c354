"""The owner's allocations as this process has opened them.

Legacy IPC handles open one allocation each.  Allocations mapped with cuMemMap come as pieces: they
are mapped side by side, for reading, into one reserved range, so that a tensor over many of them
is whole here, too.  Everything stays open until `close`: an imported piece pins the owner's pages,
so none must outlive an event.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import NamedTuple, Optional

from ..layout.sharing import LEGACY_IPC, POSIX_FD
from .cuda_calls import Device, Driver
from .cuda_share import Allocation
from .errors import Changed, NotReadable

_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_TYPE_POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_ON_DEVICE, _READ = 1, 1  # CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READ


class Range(NamedTuple):
    """Memory of the owner's that is open here."""

    start: int  # in the owner's address space
    end: int
    here: int  # the address of its first byte in this process's context

    def address_of(self, address: int) -> int:
        return self.here + address - self.start


class _IpcHandle(ctypes.Structure):
    """CUipcMemHandle (cuda.h): passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class _Access(ctypes.Structure):
    """CUmemAccessDesc (cuda.h)."""

    _fields_ = (
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("flags", ctypes.c_int),
    )


class Mappings:
    """What is open, by address.  Every method but `at` with the device's context current."""

    def __init__(self, driver: Driver, device: Device) -> None:
        self._driver = driver
        self._device = device
        self._ranges: list[Range] = []
        self._opened: list[int] = []  # by legacy IPC
        self._mapped: list[tuple[int, int]] = []  # address, bytes
        self._reserved: list[tuple[int, int]] = []
        self._handles: dict[tuple[int, int], int] = {}  # of pieces, by the owner's address and size

    def at(self, start: int, end: int) -> Optional[Range]:
        """The open range that holds all of ``start`` to ``end``."""
        for found in self._ranges:
            if found.start <= start and end <= found.end:
                return found
        return None

    def holding(self, address: int) -> Optional[Range]:
        """An open range that holds the byte at ``address``."""
        return self.at(address, address + 1)

    def open(self, groups: Iterable[list[Allocation]]) -> None:
        """Open allocations that follow each other.

        Raises CudaError, and NotReadable where one of them can be opened by nobody.
        """
        pieces: list[Allocation] = []
        try:
            for group in groups:
                for allocation in group:
                    if allocation.export == LEGACY_IPC:
                        self._open_ipc(allocation)
                    elif allocation.export == POSIX_FD:
                        self._import(allocation)
                        pieces.append(allocation)
                    else:
                        raise NotReadable(
                            f"the memory at {allocation.ptr:#x} cannot be opened by another "
                            f"process; have the server copy it with open_memory(via='owner')"
                        )
            for run in _without_gaps(pieces):
                self._map(run)
        finally:
            handles, self._handles = self._handles, {}
            for handle in handles.values():  # what is mapped stays
                self._driver.status("cuMemRelease", ctypes.c_uint64(handle))

    # -- legacy IPC

    def _open_ipc(self, allocation: Allocation) -> None:
        if self.at(allocation.ptr, allocation.end) is not None:
            return
        assert allocation.handle is not None
        address = ctypes.c_uint64()
        self._driver.call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _IpcHandle.from_buffer_copy(allocation.handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        self._opened.append(address.value)
        if not self._holds(address.value, allocation.size):
            raise Changed(
                f"the memory at {allocation.ptr:#x} is smaller than the server has said; read the "
                f"document again"
            )
        self._ranges.append(Range(allocation.ptr, allocation.end, address.value))

    def _holds(self, address: int, size: int) -> bool:
        """Whether the allocation opened at ``address`` has ``size`` bytes from there on."""
        base, length = ctypes.c_uint64(), ctypes.c_size_t()
        self._driver.call(
            "cuMemGetAddressRange_v2",
            ctypes.byref(base),
            ctypes.byref(length),
            ctypes.c_uint64(address),
        )
        return address + size <= base.value + length.value

    # -- pieces

    def _import(self, allocation: Allocation) -> None:
        handle = ctypes.c_uint64()
        self._driver.call(
            "cuMemImportFromShareableHandle",
            ctypes.byref(handle),
            ctypes.c_void_p(allocation.descriptor),
            ctypes.c_int(_TYPE_POSIX_FD),
        )
        self._handles[allocation.ptr, allocation.size] = handle.value

    def _map(self, pieces: list[Allocation]) -> None:
        """Map imported pieces side by side, for reading alone."""
        driver = self._driver
        start, end = pieces[0].ptr, pieces[-1].end
        size, nothing = ctypes.c_size_t(end - start), ctypes.c_uint64(0)
        reserved = ctypes.c_uint64()
        driver.call(
            "cuMemAddressReserve",
            ctypes.byref(reserved),
            size,
            ctypes.c_size_t(0),
            nothing,
            nothing,
        )
        here = reserved.value
        self._reserved.append((here, end - start))
        for piece in pieces:
            at = here + piece.ptr - start
            driver.call(
                "cuMemMap",
                ctypes.c_uint64(at),
                ctypes.c_size_t(piece.size),
                ctypes.c_size_t(0),
                ctypes.c_uint64(self._handles[piece.ptr, piece.size]),
                nothing,
            )
            self._mapped.append((at, piece.size))
        access = _Access(_ON_DEVICE, self._device.ordinal, _READ)
        driver.call(
            "cuMemSetAccess", ctypes.c_uint64(here), size, ctypes.byref(access), ctypes.c_size_t(1)
        )
        self._ranges.append(Range(start, end, here))

    # -- closing

    def close(self) -> None:
        """Close everything, whatever the driver says to a part of it."""
        driver = self._driver
        self._ranges.clear()
        while self._opened:
            driver.status("cuIpcCloseMemHandle", ctypes.c_uint64(self._opened.pop()))
        while self._mapped:
            address, size = self._mapped.pop()
            driver.status("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(size))
        while self._reserved:
            address, size = self._reserved.pop()
            driver.status("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(size))


def _without_gaps(pieces: Iterable[Allocation]) -> list[list[Allocation]]:
    """Pieces in runs of which each begins where the one before ends."""
    runs: list[list[Allocation]] = []
    for piece in pieces:
        if runs and runs[-1][-1].end == piece.ptr:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs
