"""Where the KV cache lies: the buffers of SGLang's pools (mem_cache/memory_pool.py)."""

from __future__ import annotations

import re
from typing import Any, Optional

from .rows import row_of
from .walk import tensors_of_object


def kv_cache(runner: Any) -> list[dict[str, Any]]:
    """Where the KV cache lies: SGLang, mem_cache/memory_pool.py, its pools' buffers."""
    pool = getattr(runner, "token_to_kv_pool", None)
    if pool is None:
        return []
    ranges = []
    seen: set[int] = set()
    for name, tensor in tensors_of_object("", pool, depth=3):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.dim() < 2:
            continue  # the pools' own books: vectors of addresses and strides
        try:
            row = row_of("kv_cache", tensor, tensor.device.type)
        except Exception:
            continue
        if row.ptr and row.size:
            role, layer = _kv_place(name)
            first = getattr(pool, "start_layer", 0)
            ranges.append(
                {
                    "name": name,
                    "role": role,
                    "layer": None if layer is None else layer + (first or 0),
                    "ptr": row.ptr,
                    "size": row.span,
                    "device": row.device,
                    "dtype": row.dtype,
                    "shape": row.shape,
                    "storage_ptr": row.storage_ptr,
                    "storage_size": row.storage_size,
                }
            )
    return ranges


# k_buffer and v_buffer of an MHA pool, kv_buffer of an MLA pool, one tensor a layer
# (SGLang, mem_cache/memory_pool.py); pools of pools put their own name in front.
_KV_BUFFER = re.compile(r"(?:^|\.)(k|v|kv)_buffer\.(\d+)$")


def _kv_place(name: str) -> tuple[Optional[str], Optional[int]]:
    """Role and layer within its pool, from the name of a KV buffer."""
    match = _KV_BUFFER.search(name)
    return (match.group(1), int(match.group(2))) if match else (None, None)
