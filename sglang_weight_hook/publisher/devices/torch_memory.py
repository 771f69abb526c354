"""What torch tells of a device's memory: its caching allocator, and the device's own figures."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional


class Allocator(NamedTuple):
    """The caching allocator's own view of one device, in bytes."""

    reserved: int
    live: int
    # Live blocks: start addresses ascending, and the end of each.
    starts: list[int]
    ends: list[int]

    def holds(self, address: int) -> bool:
        """Whether ``address`` lies in a live block."""
        index = bisect.bisect_right(self.starts, address) - 1
        return index >= 0 and address < self.ends[index]


class DeviceMemory(NamedTuple):
    """One device as this process sees it."""

    total: int  # bytes
    free: int  # bytes; shared by all processes on the device
    allocator: Optional[Allocator]  # None: not known


def told_by(module: Any, index: Optional[int]) -> DeviceMemory:
    """By ``torch.cuda``, or a module like it; of its current device where there is no ``index``."""
    index = module.current_device() if index is None else index
    free, total = module.mem_get_info(index)
    segments = [segment for segment in module.memory_snapshot() if segment["device"] == index]
    return DeviceMemory(total, free, allocator(segments))


def told_by_torch(kind: str, index: Optional[int]) -> Optional[DeviceMemory]:
    """By torch's module of that name (``torch.xpu``, ``torch.npu``), as far as it can be asked."""
    module = getattr(sys.modules.get("torch"), kind, None)
    try:
        if module is None or not module.is_initialized():
            return None  # an answer would begin to use the device
        index = module.current_device() if index is None else index
        free, total = map(int, module.mem_get_info(index))
    except Exception:  # not every one has these
        return None
    try:
        return told_by(module, index)
    except Exception:
        return DeviceMemory(total, free, None)


def allocator(segments: Iterable[Mapping[str, Any]]) -> Allocator:
    """From the segments of ``torch.cuda.memory_snapshot()``.

    A block is live unless it is ``inactive``: ``active_pending_free`` ones still wait for a
    stream (c10/cuda/CUDACachingAllocator).
    """
    reserved = live = 0
    blocks = []
    for segment in segments:
        reserved += segment["total_size"]
        address = segment["address"]
        for block in segment["blocks"]:
            start = block.get("address", address)  # older torch names no address
            address = start + block["size"]
            if block["state"] != "inactive":
                live += block["size"]
                blocks.append((start, address))
    blocks.sort()
    return Allocator(reserved, live, [start for start, _ in blocks], [end for _, end in blocks])
