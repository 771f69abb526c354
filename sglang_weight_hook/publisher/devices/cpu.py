"""The host's memory, of this process itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Optional

from ...layout.sharing import NO_EXPORT
from .device import Device, Export
from .torch_memory import DeviceMemory


class Cpu(Device):
    # Memory that a transfer engine can register, as all of the host's.
    export_otherwise = Export(NO_EXPORT, True)
    unshared = "the weights are in no CUDA device's memory"

    def memory(self, index: Optional[int]) -> Optional[DeviceMemory]:
        return None  # torch has no caching allocator there

    def copied(self, runs: Sequence[tuple[int, int]]) -> bytes:
        """By process_vm_readv(2), which refuses an address without memory, where a load would end
        the server.
        """
        size = sum(length for _, length in runs)
        if not size:
            return b""
        target = bytearray(size)
        local = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_char.from_buffer(target)), size)
        remote = (ctypes.c_size_t * (2 * len(runs)))(*(number for run in runs for number in run))
        library = ctypes.CDLL(None, use_errno=True)
        library.process_vm_readv.restype = ctypes.c_ssize_t
        got = library.process_vm_readv(
            ctypes.c_int(os.getpid()),
            local,
            ctypes.c_ulong(1),
            remote,
            ctypes.c_ulong(len(runs)),
            ctypes.c_ulong(0),
        )
        if got != size:
            code = ctypes.get_errno() if got < 0 else 14  # EFAULT: a part of it has no memory
            raise OSError(code, os.strerror(code))
        return bytes(target)
