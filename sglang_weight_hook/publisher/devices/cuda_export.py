"""How other processes can open this process's GPU memory, and what they open it with.

`export_of` is asked once an allocation, for the published regions.  `handed_over` makes
handles and descriptors for the control socket.  Neither synchronises, and neither allocates on the
device.  A handle and a descriptor are keys to write, too: they go to who asked, never to a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from collections.abc import Iterator
from typing import Any, Optional

from ...layout.sharing import FABRIC, LEGACY_IPC, NO_EXPORT, POSIX_FD, SHARED_ALLOCATIONS
from . import cuda_driver
from .device import UNKNOWN, Export, HandedOver

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
# CUmemAllocationHandleType.
_TYPE_POSIX_FD, _TYPE_FABRIC = 1, 8
_GPU_DIRECT_RDMA_SUPPORTED = 116  # CUdevice_attribute


class _Flags(ctypes.Structure):
    """CUmemAllocationProp.allocFlags."""

    _fields_ = (
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Properties(ctypes.Structure):
    """CUmemAllocationProp (cuda.h)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", ctypes.c_int * 2),
        ("win32_handle_metadata", ctypes.c_void_p),
        ("flags", _Flags),
    )


# --- what can be opened -------------------------------------------------------------------


def export_of(base: int, kind: Optional[str]) -> Export:
    """How the allocation at ``base`` can be opened by another process."""
    if kind == cuda_driver.CUDA_MALLOC:
        return Export(LEGACY_IPC, _rdma_on(cuda_driver.device_of(base)))
    if kind == cuda_driver.VMM:
        properties = _properties_of(base)
        if properties is None:
            return UNKNOWN
        return Export(_export_by(properties), bool(properties.flags.gpu_direct_rdma_capable))
    # Memory that another process made is not exported again (cuIpcGetMemHandle).
    return Export(NO_EXPORT) if kind == cuda_driver.IMPORTED else UNKNOWN


def _export_by(properties: _Properties) -> str:
    """What the memory was made exportable by (cuMemCreate); nothing makes it so later."""
    if properties.requested_handle_types & _TYPE_POSIX_FD:
        return POSIX_FD
    return FABRIC if properties.requested_handle_types & _TYPE_FABRIC else NO_EXPORT


@functools.cache
def _rdma_on(ordinal: Optional[int]) -> Optional[bool]:
    """Whether GPUDirect RDMA reaches memory that cudaMalloc makes on a device."""
    if ordinal is None:
        return None
    value = cuda_driver.device_attribute(ordinal, _GPU_DIRECT_RDMA_SUPPORTED)
    return None if value is None else bool(value)


def _properties_of(address: int) -> Optional[_Properties]:
    """Of memory mapped with cuMemMap."""
    with _handle_of(address) as (library, handle):
        ask = getattr(library, "cuMemGetAllocationPropertiesFromHandle", None)
        properties = _Properties()
        if handle is None or ask is None or ask(ctypes.byref(properties), handle) != 0:
            return None
        return properties


@contextlib.contextmanager
def _handle_of(address: int) -> Iterator[tuple[Any, Optional[ctypes.c_uint64]]]:
    """The driver and the allocation handle at ``address``, given back at the end; or None."""
    library: Any = cuda_driver._library()
    handle = ctypes.c_uint64()
    if (
        library is None
        or library.cuMemRetainAllocationHandle(ctypes.byref(handle), ctypes.c_uint64(address)) != 0
    ):
        yield library, None
        return
    try:
        yield library, handle
    finally:
        library.cuMemRelease(handle)


# --- what it is opened with ---------------------------------------------------------------


def handed_over(address: int, size: int) -> HandedOver:
    """The first allocations under ``size`` bytes at ``address``, in the current context.

    The caller closes the descriptors.  Raises OSError.
    """
    allocations: list[dict[str, Any]] = []
    descriptors: list[int] = []
    position, end = address, address + size
    try:
        while position < end and len(allocations) < SHARED_ALLOCATIONS:
            found = cuda_driver.allocation_of(position)
            if found is None or sum(found) <= position:
                raise OSError(errno.EFAULT, f"the CUDA driver knows no memory at {position:#x}")
            allocation, descriptor = _handed_over(*found)
            allocations.append(allocation)
            if descriptor is not None:
                descriptors.append(descriptor)
            position = sum(found)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return HandedOver(allocations, tuple(descriptors), min(position, end))


def _handed_over(base: int, size: int) -> tuple[dict[str, Any], Optional[int]]:
    allocation: dict[str, Any] = {"ptr": base, "size": size, "export": NO_EXPORT}
    export, _ = export_of(base, cuda_driver.allocation_kind(base))
    if export == LEGACY_IPC:
        handle = _ipc_handle(base)
        if handle is not None:
            allocation.update(export=LEGACY_IPC, handle=handle.hex())
    elif export == POSIX_FD:
        descriptor = _descriptor(base)
        if descriptor is not None:
            allocation.update(export=POSIX_FD)
            return allocation, descriptor
    return allocation, None


def _ipc_handle(base: int) -> Optional[bytes]:
    """``cuIpcGetMemHandle``, which does not wait for the device; None where it refuses."""
    library: Any = cuda_driver._library()
    handle = (ctypes.c_ubyte * _HANDLE_BYTES)()
    if library.cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(base)) != 0:
        return None
    return bytes(handle)


def _descriptor(base: int) -> Optional[int]:
    """A file descriptor for memory mapped with cuMemMap; None where the driver refuses."""
    with _handle_of(base) as (library, handle):
        descriptor = ctypes.c_int(-1)
        if handle is None or (
            library.cuMemExportToShareableHandle(
                ctypes.byref(descriptor), handle, ctypes.c_int(_TYPE_POSIX_FD), ctypes.c_uint64(0)
            )
            != 0
        ):
            return None
        # The server's children are not to inherit it.
        os.set_inheritable(descriptor.value, False)
        return descriptor.value
