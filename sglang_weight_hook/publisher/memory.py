"""What this process's GPU memory is taken up by, adding up to the device's total.

Asked of torch's caching allocator and of the driver (`devices`), which neither synchronises nor
allocates.  Asked only when a whole document is published, never for a bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from ..layout import accounting
from . import devices
from .devices.torch_memory import DeviceMemory


def device(device_type: str, index: Optional[int] = None) -> Optional[DeviceMemory]:
    """The device ``index``, or the thread's current one; None for a runner that is on none."""
    return devices.of(device_type).memory(index)


def account(
    found: Optional[DeviceMemory],
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
    if found is None or found.allocator is None:
        untold = ("other_live_bytes", "reserved_free_bytes", "other_bytes", "unbacked_bytes")
        return {
            **figures,
            **dict.fromkeys(untold),
            "device_free_bytes": None if found is None else found.free,
            "device_total_bytes": None if found is None else found.total,
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


def reconcile(found: Optional[DeviceMemory], named: Mapping[int, int]) -> Optional[dict[str, int]]:
    """What the allocator has live against what the documents of this process explain.

    ``unexplained_bytes`` includes the allocator's rounding (512 bytes a block) and the
    activations and workspaces that belong to no weight.
    """
    if found is None or found.allocator is None:
        return None
    inside = {start: size for start, size in named.items() if found.allocator.holds(start)}
    explained = sum(inside.values())
    return {
        "live_bytes": found.allocator.live,
        "explained_bytes": explained,
        "unexplained_bytes": found.allocator.live - explained,
        "storages_outside": len(named) - len(inside),
    }
