"""Tensors whose bytes SGLang rewrites or swaps in a forward, without a call that is wrapped.

Their addresses are as true as any; their contents are outside ``content_generation``.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    """
    return frozenset(
        name
        for name, row in tensors.items()
        if row.kind == LORA
        or (row.kind in (PARAMETER, BUFFER) and not row.resident)
        or name in walk.paged
    )
