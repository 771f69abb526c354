"""What this process's GPU memory is taken up by, adding up to the device's total.

Asked of torch's caching allocator (``torch.cuda.memory_snapshot``) and of the driver
(``cudaMemGetInfo``); neither synchronises nor allocates.  Asked only when a whole document is
published, never for a bucket.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional

from ..layout import accounting
from . import cuda_driver


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


class Device(NamedTuple):
    """One device as this process sees it."""

    total: int  # bytes
    free: int  # bytes; shared by all processes on the device
    allocator: Allocator


def device(device_type: str, index: Optional[int] = None) -> Optional[Device]:
    """CUDA device ``index``, or the thread's current one; None for a runner that is on no GPU."""
    if device_type != "cuda" or not cuda_driver.is_initialised():
        return None
    import torch

    index = torch.cuda.current_device() if index is None else index
    free, total = torch.cuda.mem_get_info(index)
    snapshot: Any = torch.cuda.memory_snapshot  # torch has no annotations for it
    segments = [segment for segment in snapshot() if segment["device"] == index]
    return Device(total, free, allocator(segments))


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


def account(
    found: Optional[Device],
    weights: Mapping[int, int],
    lora: Mapping[int, int],
    kv_cache: Mapping[int, int],
    others: Mapping[int, int],
    released: int = 0,
) -> dict[str, Any]:
    """The figures of the layout's ``memory``; each mapping is from a storage to its bytes.

    ``others``: storages of this process's other slots that this one does not share.  On a
    GPU: weights + lora + kv_cache + siblings + other_live + reserved_free + other + free
    - unbacked == total.  ``unbacked`` is what the allocator holds in addresses while the
    memory saver has taken the pages away: ``released``, the bytes of the storages known to be
    released, or more where the device's own figures say so.
    """
    figures: dict[str, Any] = {
        "weights_bytes": sum(weights.values()),
        "lora_bytes": sum(lora.values()),
        "kv_cache_bytes": sum(kv_cache.values()),
        "siblings_bytes": sum(others.values()),
    }
    named = {**others, **kv_cache, **lora, **weights}
    if found is None:
        return {
            **figures,
            **dict.fromkeys(
                (
                    "other_live_bytes",
                    "reserved_free_bytes",
                    "other_bytes",
                    "unbacked_bytes",
                    "device_free_bytes",
                    "device_total_bytes",
                )
            ),
        }
    inside = sum(size for start, size in named.items() if found.allocator.holds(start))
    outside = sum(figures.values()) - inside
    counted = found.allocator.reserved + outside
    rest = accounting.remainder(found.total, found.free, counted, released)
    return {
        **figures,
        "other_live_bytes": found.allocator.live - inside,
        "reserved_free_bytes": found.allocator.reserved - found.allocator.live,
        "other_bytes": rest.other,
        "unbacked_bytes": rest.unbacked,
        "device_free_bytes": found.free,
        "device_total_bytes": found.total,
    }


def reconcile(found: Optional[Device], named: Mapping[int, int]) -> Optional[dict[str, int]]:
    """What the allocator has live against what the documents of this process explain.

    ``unexplained_bytes`` includes the allocator's rounding (512 bytes a block) and the
    activations and workspaces that belong to no weight.
    """
    if found is None:
        return None
    inside = {start: size for start, size in named.items() if found.allocator.holds(start)}
    explained = sum(inside.values())
    return {
        "live_bytes": found.allocator.live,
        "explained_bytes": explained,
        "unexplained_bytes": found.allocator.live - explained,
        "storages_outside": len(named) - len(inside),
    }
