"""Questions to the CUDA driver that torch does not ask, through ctypes.

Only calls that neither synchronise nor allocate: ``cuMemGetAddressRange``,
``cuPointerGetAttribute``, ``cuMemRetainAllocationHandle``, ``cuDeviceGetUuid``,
``cuDeviceGetPCIBusId``.  Used only when torch has initialised CUDA in
this process; without CUDA every question answers None.  What hands out memory or copies it is in
`cuda_export` and `cuda_copy`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import uuid
from collections.abc import Iterator
from typing import Any, Optional


def is_initialised() -> bool:
    """Whether this process has a CUDA context already.  Never creates one."""
    torch: Any = sys.modules.get("torch")
    if torch is None or torch.version.cuda is None:
        return False
    return bool(torch.cuda.is_initialized())


@functools.lru_cache(maxsize=1)
def _library() -> Optional[Any]:
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def allocation_of(address: int) -> Optional[tuple[int, int]]:
    """Base address and size (bytes) of the driver allocation that holds ``address``.

    ``cuMemGetAddressRange_v2`` (CUDA driver API, memory management).  None when the address
    belongs to no allocation of this process's current context.
    """
    library = _library()
    if library is None:
        return None
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    status = library.cuMemGetAddressRange_v2(
        ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
    )
    return (base.value, size.value) if status == 0 else None


def allocations_under(address: int, size: int) -> list[tuple[int, int]]:
    """The driver allocations that ``size`` bytes at ``address`` lie in, ascending.

    Memory from cudaMalloc gives one.  With ``expandable_segments:True`` torch maps physical
    pieces side by side (cuMemMap), each of which is a separate allocation to code that wants
    to register or export it.  Empty when the driver knows none, or not all of them.
    """
    found: list[tuple[int, int]] = []
    position, end = address, address + max(size, 1)
    while position < end:
        allocation = allocation_of(position)
        if allocation is None or sum(allocation) <= position:
            return []
        found.append(allocation)
        position = sum(allocation)
    return found


def current_context() -> Optional[int]:
    """The CUDA context that is current in this thread (``cuCtxGetCurrent``), if any."""
    library = _library() if is_initialised() else None
    if library is None:
        return None
    context = ctypes.c_void_p()
    if library.cuCtxGetCurrent(ctypes.byref(context)) != 0:
        return None
    return context.value


@contextlib.contextmanager
def using_context(context: Optional[int]) -> Iterator[None]:
    """Make ``context`` current in this thread (``cuCtxSetCurrent``), which asks the device nothing.

    Another thread's context: the driver answers questions about addresses only where theirs is
    current.  None changes nothing.
    """
    library = _library() if context is not None else None
    if library is None:
        yield
        return
    before = current_context()
    library.cuCtxSetCurrent(ctypes.c_void_p(context))
    try:
        yield
    finally:
        library.cuCtxSetCurrent(ctypes.c_void_p(before))


_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextlib.contextmanager
def outside_captures() -> Iterator[None]:
    """What this thread calls inside is no part of a CUDA graph that another thread captures.

    While SGLang captures one, calls of other threads that allocate or synchronise would break it
    (``cuThreadExchangeStreamCaptureMode``, CUDA driver API, stream management).
    """
    exchange = getattr(_library(), "cuThreadExchangeStreamCaptureMode", None)
    mode = ctypes.c_int(_RELAXED)
    if exchange is None or exchange(ctypes.byref(mode)) != 0:
        yield
        return
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


# CUpointer_attribute values (cuda.h).
_MEMORY_TYPE = 2
_IS_MANAGED = 8
_DEVICE_ORDINAL = 9
_IS_LEGACY_CUDA_IPC_CAPABLE = 10
_MEMPOOL_HANDLE = 17

_ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE

CUDA_MALLOC, VMM, IMPORTED = "cuda_malloc", "vmm", "imported"


def allocation_kind(address: int) -> Optional[str]:
    """How the memory at ``address`` came to be.

    ``cuda_malloc``: cudaMalloc in this process, exportable with cudaIpcGetMemHandle, which the
    driver says (``IS_LEGACY_CUDA_IPC_CAPABLE``).  ``vmm``: mapped with cuMemMap, as expandable
    segments and the memory saver do; such memory has a handle (``cuMemRetainAllocationHandle``),
    which is given back at once.  ``imported``: opened from another process's cudaIpcGetMemHandle,
    for it is none of these nor managed memory nor a pool's (cudaMallocAsync).  None for those
    two, and when the driver does not know the address.
    """
    library = _library()
    if library is None:
        return None
    capable = _attribute(library, _IS_LEGACY_CUDA_IPC_CAPABLE, address)
    if capable is None:
        return None
    if capable:
        return CUDA_MALLOC
    handle = ctypes.c_uint64()
    if library.cuMemRetainAllocationHandle(ctypes.byref(handle), ctypes.c_uint64(address)) == 0:
        library.cuMemRelease(handle)
        return VMM
    if _attribute(library, _IS_MANAGED, address) or _attribute(library, _MEMPOOL_HANDLE, address):
        return None
    return IMPORTED


def _attribute(library: Any, attribute: int, address: int) -> Optional[int]:
    """A pointer attribute (CUpointer_attribute in cuda.h); None where the driver has none."""
    value = ctypes.c_uint64()
    status = library.cuPointerGetAttribute(
        ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_uint64(address)
    )
    return value.value if status == 0 else None


def is_device_memory(address: int, size: int) -> bool:
    """Whether all ``size`` bytes at ``address`` are mapped memory of a device."""
    library = _library()
    return (
        library is not None
        and bool(allocations_under(address, size))
        and _attribute(library, _MEMORY_TYPE, address) == _ON_DEVICE
    )


def device_of(address: int) -> Optional[int]:
    """Ordinal of the device that the memory at ``address`` is on."""
    library = _library()
    return None if library is None else _attribute(library, _DEVICE_ORDINAL, address)


def device_attribute(ordinal: int, attribute: int) -> Optional[int]:
    """``cuDeviceGetAttribute`` (CUdevice_attribute in cuda.h) of a visible device."""
    library = _library()
    device, value = ctypes.c_int(), ctypes.c_int()
    if (
        library is None
        or library.cuDeviceGet(ctypes.byref(device), ctypes.c_int(ordinal)) != 0
        or library.cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(attribute), device) != 0
    ):
        return None
    return value.value


def device_identity(ordinal: int) -> tuple[Optional[str], Optional[str]]:
    """UUID (``GPU-…``, as nvidia-smi prints it) and PCI bus id of a visible device."""
    library = _library()
    if library is None:
        return None, None
    device = ctypes.c_int()
    if library.cuDeviceGet(ctypes.byref(device), ctypes.c_int(ordinal)) != 0:
        return None, None
    text = ctypes.create_string_buffer(32)
    bus_id = None
    if library.cuDeviceGetPCIBusId(text, ctypes.c_int(len(text)), device) == 0:
        bus_id = text.value.decode("ascii", "replace")
    return _uuid_of(library, device), bus_id


def current_device_uuid() -> Optional[str]:
    """UUID of the device of this thread's current context."""
    library = _library()
    device = ctypes.c_int()
    if library is None or library.cuCtxGetDevice(ctypes.byref(device)) != 0:
        return None
    return _uuid_of(library, device)


def _uuid_of(library: Any, device: ctypes.c_int) -> Optional[str]:
    raw = (ctypes.c_ubyte * 16)()
    get_uuid = getattr(library, "cuDeviceGetUuid_v2", None) or library.cuDeviceGetUuid
    if get_uuid(ctypes.byref(raw), device) != 0:
        return None
    return "GPU-" + str(uuid.UUID(bytes=bytes(raw)))
