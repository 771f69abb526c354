"""How the published memory figures add up, for the tests that hold them against a device."""

from __future__ import annotations

from collections.abc import Mapping

PARTS = (
    "weights_bytes",
    "lora_bytes",
    "kv_cache_bytes",
    "siblings_bytes",
    "other_live_bytes",
    "reserved_free_bytes",
    "other_bytes",
    "device_free_bytes",
)


def sum_of_parts(figures: Mapping[str, int]) -> int:
    """What must be the device's total: what the parts take up, less what has no pages."""
    return sum(figures[name] for name in PARTS) - figures["unbacked_bytes"]
