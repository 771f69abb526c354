"""The legacy format's four documents."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..layout.documents import GIB
from ..layout.geometry import Region
from .capture import Capture


def weights_meta(captured: Capture, updated: bool) -> dict[str, dict[str, Any]]:
    """``weights_meta_{slot}.json``: parameters on the runner's device, under torch's names."""
    meta: dict[str, dict[str, Any]] = {}
    rows = captured.tensors
    for name, canonical in captured.torch_names.items():
        _, ptr, size, _, device, dtype, shape, _, _, _, _, resident = rows[canonical]
        if resident:
            meta[name] = {
                "ptr": ptr,
                "size": size,
                "device": device,
                "dtype": dtype,
                "shape": shape,
            }
    if updated:
        for entry in meta.values():
            entry["updated"] = True
    return meta


def total_weight_meta(meta: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """``total_weight_meta_{slot}.json``: GiB per device, each parameter counted by itself."""
    sizes: dict[str, int] = {}
    for entry in meta.values():
        sizes[entry["device"]] = sizes.get(entry["device"], 0) + entry["size"]
    return {device: size / GIB for device, size in sizes.items()}


def update_summary(
    meta: Mapping[str, Any], totals: Mapping[str, float], gpu_id: int, now: float
) -> dict[str, Any]:
    """``weight_update_summary_{slot}.json``."""
    return {
        "update_timestamp": now,
        "update_time_readable": _readable(now),
        "gpu_id": gpu_id,
        "total_weights": len(meta),
        "total_devices": len(totals),
        "device_weight_summary": dict(totals),
        "memory_usage_gb": sum(totals.values()),
    }


def renewed_summary(summary: Mapping[str, Any], now: float) -> dict[str, Any]:
    """The same summary after one more update."""
    return {**summary, "update_timestamp": now, "update_time_readable": _readable(now)}


def _readable(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def merged_weights(captured: Capture, regions: list[Region]) -> list[dict[str, Any]]:
    """``merged_weights_meta_{slot}.json``: contiguous spans, never across two allocations."""
    return [
        {
            "ptr": region.start,
            "size": region.end - region.start,
            "device": captured.tensors[region.names[0]].device,
            "weights": region.names,
        }
        for region in regions
    ]
