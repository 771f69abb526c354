"""Tensors whose bytes SGLang rewrites or swaps in a forward, without a call that is wrapped.

Their addresses are current; their contents are outside ``content_generation``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..layout.documents import ATTRIBUTE, BUFFER, LORA, PARAMETER
from .rows import Row
from .walk import Walk


def lora_attributes(tensors: dict[str, Row]) -> None:
    """What lies in the LoRA pool's storages is ``lora``, also where a layer holds a view of it."""
    pool = {row.storage_ptr for row in tensors.values() if row.kind == LORA and row.storage_ptr}
    if pool:
        for name, row in tensors.items():
            if row.kind == ATTRIBUTE and row.storage_ptr in pool:
                tensors[name] = row._replace(kind=LORA)


def volatile_names(tensors: Mapping[str, Row], walk: Walk) -> frozenset[str]:
    """Canonical names of the volatile tensors.

    The LoRA pool (``prepare_lora_batch`` fills it, lora/mem_pool.py).  Offloaded parameters and
    buffers: while a forward runs, a copy on the device is in their place (utils/offloader.py).
    Caches of paged experts, refilled from the host by each forward (layers/moe/paged_experts).
    Experts of other ranks, fetched two layers ahead by each forward (layers/moe/dwdp).
    """
    fetched = _fetched_experts()
    return frozenset(
        name
        for name, row in tensors.items()
        if row.kind == LORA
        or (row.kind in (PARAMETER, BUFFER) and not row.resident)
        or name in walk.paged
        or (row.ptr and row.ptr in fetched)
    )


def _fetched_experts() -> set[int]:
    """Addresses of the weights that SGLang's DWDP fills from peers (since 0.5.22)."""
    module: Any = sys.modules.get("sglang.srt.layers.moe.dwdp")
    manager = module.get_global_dwdp_manager() if module is not None else None
    buffers = getattr(getattr(manager, "_weight_manager", None), "weight_buffer", None)
    tensors = getattr(buffers, "_tensors", None)
    if not isinstance(tensors, dict):
        return set()
    return {tensor.data_ptr() for layer in tensors.values() for tensor in layer.values()}
