"""Sums over slots, directories and hosts: which memory is weights, KV cache or something else.

Nothing is counted twice: a storage that several tensors or several slots of one process share
(a draft has its target's embedding) counts once.  All sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

from ..layout import accounting
from .directory import slot_order
from .document import Document
from .errors import HookError
from .layout_start import has_all_sums

# Of the layout's `memory`: what only the process itself can tell.
_PROCESS_FIGURES = ("other_live_bytes", "reserved_free_bytes")
# What the storages that a document names add up to: each counts once, under the first.
_NAMED = ("weights_bytes", "lora_bytes", "kv_cache_bytes")
_LONG = ("tensors", "regions")  # parts of a document


class Gpu(NamedTuple):
    """One device.  A figure is None where the map does not have it: a CPU server, an older release.

    On a GPU: weights + lora + kv_cache + other_live + reserved_free + outside + free
    - unbacked == total.
    """

    hostname: str
    gpu_id: int
    uuid: Optional[str]
    device: str  # the runner's: ``cuda``, ``cpu``
    slots: tuple[str, ...]
    weights: int
    lora: int
    kv_cache: int
    released: int  # of these three, addresses without physical memory now
    elsewhere: int  # weights on another device, e.g. offloaded to the CPU
    other_live: Optional[int]  # live in the allocator: activations, workspaces, CUDA graphs
    reserved_free: Optional[int]  # the allocator keeps it, and nothing lives in it
    outside: Optional[int]  # used by none of these processes' allocators: CUDA, NCCL, others
    unbacked: Optional[int]  # the allocator counts it, but its pages are given back
    free: Optional[int]
    total: Optional[int]

    @property
    def label(self) -> str:
        return f"{self.hostname} {self.device}:{self.gpu_id}"

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


def per_gpu(documents: Iterable[Document]) -> list[Gpu]:
    """One entry for each device that the documents tell of.  Raises HookError."""
    groups: dict[tuple[Any, ...], list[Document]] = {}
    for document in documents:
        groups.setdefault(_gpu_key(document), []).append(document)
    found = [_sum(group) for group in groups.values()]
    return sorted(found, key=lambda gpu: (gpu.hostname, gpu.device, gpu.gpu_id, gpu.uuid or ""))


def together(gpus: Iterable[Gpu]) -> Gpu:
    """The sum over several devices; a figure that one of them lacks is None."""
    rows = list(gpus)

    def add(name: str) -> Optional[int]:
        values = [getattr(gpu, name) for gpu in rows]
        return None if not values or None in values else sum(values)

    return Gpu(
        hostname="total",
        gpu_id=len(rows),
        uuid=None,
        device="",
        slots=tuple(slot for gpu in rows for slot in gpu.slots),
        weights=sum(gpu.weights for gpu in rows),
        lora=sum(gpu.lora for gpu in rows),
        kv_cache=sum(gpu.kv_cache for gpu in rows),
        released=sum(gpu.released for gpu in rows),
        elsewhere=sum(gpu.elsewhere for gpu in rows),
        other_live=add("other_live"),
        reserved_free=add("reserved_free"),
        outside=add("outside"),
        unbacked=add("unbacked"),
        free=add("free"),
        total=add("total"),
    )


def without_tensors(document: Document) -> Document:
    """The same for sums, if no other document is of its process, and much smaller.

    All of it where it does not say by itself what its storages add up to, as of release 0.1.
    """
    if not has_all_sums(document):
        return document
    raw = {name: value for name, value in document.raw.items() if name not in _LONG}
    return Document(document.slot, raw, document.state, document.is_live)


# --- one device ---------------------------------------------------------------------------


class _Storages:
    """The storages that a process's documents name, each once: address -> size."""

    def __init__(self) -> None:
        self.weights: dict[int, int] = {}
        self.lora: dict[int, int] = {}
        self.kv_cache: dict[int, int] = {}
        self.elsewhere = 0
        self.released: dict[int, int] = {}

    def add(self, document: Document) -> None:
        released = _released(document)
        self.elsewhere += _off_device(document)
        if "tensors" not in document.raw:
            self._add_told(document, released)
            return
        for kind, place, size in document.iter_storages():
            (self.lora if kind == "lora" else self.weights)[place] = size
            if "weights" in released:
                self.released[place] = size
        for buffer in document.iter_kv_cache():
            self.kv_cache[buffer.storage_ptr] = buffer.storage_size
            if "kv_cache" in released:
                self.released[buffer.storage_ptr] = buffer.storage_size

    def _add_told(self, document: Document, released: set[str]) -> None:
        """What the document says of its storages: one of each kind, at no address, for all."""
        kinds = (self.weights, "weights"), (self.lora, "weights"), (self.kv_cache, "kv_cache")
        for place, (name, (found, tag)) in enumerate(zip(_NAMED, kinds), -len(_NAMED)):
            found[place] = _figure(document, name) or 0
            if tag in released:
                self.released[place] = found[place]

    def settle(self) -> None:
        """A storage under several of the three counts under the first."""
        for place in self.weights:
            self.lora.pop(place, None)
            self.kv_cache.pop(place, None)
        for place in self.lora:
            self.kv_cache.pop(place, None)

    @property
    def named(self) -> int:
        return sum(sum(found.values()) for found in (self.weights, self.lora, self.kv_cache))


def _sum(documents: list[Document]) -> Gpu:
    storages: dict[tuple[Any, ...], _Storages] = {}
    newest: dict[tuple[Any, ...], Document] = {}
    for document in documents:
        process = _process_key(document)
        storages.setdefault(process, _Storages()).add(document)
        if process not in newest or _updated(document) >= _updated(newest[process]):
            newest[process] = document
    for found in storages.values():
        found.settle()
    last = max(newest.values(), key=_updated)
    figures = {name: _figure(last, name) for name in ("device_free_bytes", "device_total_bytes")}
    free, total = figures["device_free_bytes"], figures["device_total_bytes"]

    other_live: Optional[int] = 0
    reserved_free: Optional[int] = 0
    for process, document in newest.items():
        live, kept = (_figure(document, name) for name in _PROCESS_FIGURES)
        if other_live is None or reserved_free is None or live is None or kept is None:
            other_live = reserved_free = None
            continue
        # The process's other slots are live, too, also where their documents are not given.
        named = sum(_figure(document, name) or 0 for name in (*_NAMED, "siblings_bytes"))
        other_live += live + max(named - storages[process].named, 0)
        reserved_free += kept

    named = sum(found.named for found in storages.values())
    outside = unbacked = None
    if total is not None and free is not None and other_live is not None:
        counted = named + other_live + (reserved_free or 0)
        released = sum(sum(found.released.values()) for found in storages.values())
        outside, unbacked = accounting.remainder(total, free, counted, released)
    return Gpu(
        hostname=_text(last.identity.get("hostname")),
        gpu_id=_gpu_id(last),
        uuid=_text(last.identity.get("gpu_uuid")) or None,
        device=_device(last),
        slots=tuple(sorted({document.slot.name for document in documents}, key=slot_order)),
        weights=sum(sum(found.weights.values()) for found in storages.values()),
        lora=sum(sum(found.lora.values()) for found in storages.values()),
        kv_cache=sum(sum(found.kv_cache.values()) for found in storages.values()),
        released=sum(sum(found.released.values()) for found in storages.values()),
        elsewhere=sum(found.elsewhere for found in storages.values()),
        other_live=other_live,
        reserved_free=reserved_free,
        outside=outside,
        unbacked=unbacked,
        free=free,
        total=total,
    )


def _off_device(document: Document) -> int:
    """Bytes of weights on another device; of an older map the values, which may share storage."""
    told = _figure(document, "off_device_bytes")
    if told is not None:
        return told
    return sum(
        tensor.size
        for tensor in document.iter_tensors()
        if not tensor.resident and tensor.device != "meta"
    )


def _released(document: Document) -> set[str]:
    """Which of ``weights`` and ``kv_cache`` have no physical memory now."""
    residency = document.state.get("residency", document.raw.get("residency"))
    if isinstance(residency, dict):
        return {name for name, where in residency.items() if where == "released"}
    return {"weights"} if document.state["state"] == "released" else set()


def _process_key(document: Document) -> tuple[Any, ...]:
    owner = document.identity
    return tuple(
        _text(owner.get(field))
        for field in ("hostname", "boot_id", "pid_namespace", "pid", "process_start_ticks")
    )


def _gpu_key(document: Document) -> tuple[Any, ...]:
    owner = document.identity
    uuid = owner.get("gpu_uuid")
    if isinstance(uuid, str) and uuid:
        return ("uuid", uuid)
    # Two servers with other CUDA_VISIBLE_DEVICES both have a GPU 0.
    fields = ("hostname", "cuda_visible_devices")
    return (
        "id",
        *(_text(owner.get(field)) for field in fields),
        _device(document),
        _gpu_id(document),
    )


def _device(document: Document) -> str:
    return _text(document.identity.get("device")).split(":")[0] or "device"


def _gpu_id(document: Document) -> int:
    value = document.identity.get("gpu_id")
    return value if isinstance(value, int) else 0


def _updated(document: Document) -> float:
    value = document.raw.get("updated_at")
    return float(value) if isinstance(value, (int, float)) else 0.0


def _figure(document: Document, name: str) -> Optional[int]:
    value: Any = document.memory.get(name)
    if value is None:
        return None
    if not isinstance(value, int):
        raise HookError(
            f"slot {document.slot.name}: memory has no valid {name!r}; "
            f"it was not written by the hook"
        )
    return value


def _text(value: Any) -> str:
    return "" if value is None else str(value)
