"""One consistent publication of a slot: look-up by name and by address."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional, Union

from ..layout import files
from .diff import Diff, compare
from .errors import FOREIGN, HookError
from .fields import is_size
from .ownership import process_of, same_instance
from .spans import SpanIndex
from .tensors import CacheBuffer, Hit, Region, Tensor

if TYPE_CHECKING:
    from ..memory import Memory
    from .slot import Slot


class Document:
    """One consistent publication of a slot: layout and state of the same generation.

    ``raw``: the layout document; ``state``: the state document, which is the newer of the
    two about ``content_generation`` (buckets written in place rewrite only the state).
    ``is_live`` is false for a saved copy (`open_file`), which is not kept up to date.
    """

    def __init__(
        self, slot: Slot, raw: dict[str, Any], state: dict[str, Any], is_live: bool = True
    ) -> None:
        self.slot = slot
        self.raw = raw
        self.state = state
        self.is_live = is_live
        # Typed objects, made of the published ones when they are asked for.
        self._typed: dict[str, Tensor] = {}
        self._by_address: Optional[SpanIndex[str]] = None
        self._regions_by_address: Optional[SpanIndex[Region]] = None

    @property
    def tensors(self) -> Mapping[str, dict[str, Any]]:
        """Every tensor by canonical name: the ``tensors`` object of the layout."""
        tensors: Mapping[str, dict[str, Any]] = self.raw["tensors"]
        return tensors

    @property
    def regions(self) -> list[dict[str, Any]]:
        """Merged spans ready for registration: the ``regions`` list of the layout."""
        regions: list[dict[str, Any]] = self.raw["regions"]
        return regions

    @property
    def identity(self) -> Mapping[str, Any]:
        """Host, process, device, ranks and model of the runner: the layout's ``identity``."""
        found: Mapping[str, Any] = self.raw["identity"]
        return found

    @property
    def memory(self) -> Mapping[str, Any]:
        """The layout's ``memory``, in bytes; empty where it is not told."""
        found = self.raw.get("memory")
        return found if isinstance(found, dict) else {}

    @property
    def layout_generation(self) -> int:
        return int(self.raw["layout_generation"])

    @property
    def content_generation(self) -> int:
        return int(self.state["content_generation"])

    @property
    def physical_epoch(self) -> Optional[int]:
        """Rises when other physical pages came behind unchanged addresses; None: not told."""
        value = self.state.get("physical_epoch", self.raw.get("physical_epoch"))
        return value if isinstance(value, int) else None

    @property
    def instance(self) -> Optional[str]:
        """Which runner it is, also within one process; None: not told (release 0.1).

        Another instance in the same slot means that everything known of it is stale.
        """
        value = self.state.get("instance")
        return value if isinstance(value, str) else None

    @property
    def checked_at(self) -> Optional[float]:
        """When this map and memory were last found equal, in seconds since 1970-01-01 UTC.

        As the header says now, if it is still about this map; else as of the document.  None: not
        yet, or not told.
        """
        if self.is_live:
            with contextlib.suppress(HookError):
                header = self.slot.header()
                if (header.pid, header.instance, header.layout_generation) == (
                    self.state.get("pid"),
                    self.instance,
                    self.layout_generation,
                ):
                    return header.checked_at
        value = self.state.get("checked_at")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return value

    def open_memory(
        self,
        via: Optional[str] = None,
        allow: Collection[str] = (),
        address: Optional[str] = None,
    ) -> Memory:
        """The bytes behind this document, to be read from outside.

            with slot.weights_held():
                document = slot.read()
                with document.open_memory() as memory:
                    memory.array("lm_head.weight")

        ``via``: insist on one way to the memory (`process`, `cuda`, `owner`; through a transfer
        engine in the server, also from another machine: `mooncake`, `nixl`); None takes for each
        tensor the first that reaches it, an engine only where the owner is on another machine.
        ``allow``: further states of the slot than ``ready`` in which it may be read.  ``address``:
        ``host`` or ``host:port`` of the server's mooncake, instead of the one that it has
        published.  Raises HookError: `Changed` where the weights are no longer the document's,
        `NotReadable` where they cannot be reached.
        """
        # The other way round as a rule: memory is built on the reader.
        from ..memory import Memory

        return Memory(self, via, allow, address)

    # -- as typed objects

    def iter_tensors(self) -> Iterator[Tensor]:
        """Every tensor, in the model's order.  Raises HookError."""
        return map(self._tensor, self.tensors)

    def iter_storages(self) -> Iterator[tuple[str, int, int]]:
        """Kind of tensor, address and bytes of the storage of each resident tensor with memory.

        Without making an object of each tensor, for sums over many slots.  Raises HookError.
        """
        for name, raw in self.tensors.items():
            fields = raw if isinstance(raw, dict) else {}
            kind, resident = fields.get("kind"), fields.get("resident", True)
            ptr: Any = fields.get("storage_ptr")
            size: Any = fields.get("storage_size")
            if isinstance(kind, str) and is_size(ptr) and is_size(size):
                if ptr and resident is True:
                    yield kind, int(ptr), int(size)
                continue
            tensor = self._tensor(name)  # has its own idea of what is absent, or raises
            if tensor.storage_ptr and tensor.resident:
                yield tensor.kind, tensor.storage_ptr, tensor.storage_size

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, canonical or alias.  Raises HookError."""
        if name in self.tensors:
            return self._tensor(name)
        for tensor in self.iter_tensors():
            if name in tensor.aliases:
                return tensor
        raise HookError(
            f"slot {self.slot.name} has no tensor {name!r}; the names are those of "
            f"{self.slot.path(files.LAYOUT)}"
        )

    def iter_regions(self) -> Iterator[Region]:
        """Every region, by address.  Raises HookError."""
        return map(Region.from_raw, self.regions)

    def iter_kv_cache(self) -> Iterator[CacheBuffer]:
        """The tensors of the KV cache.  Raises HookError."""
        buffers = self.memory.get("kv_cache", [])
        if not isinstance(buffers, list):
            raise HookError(f"{self._where()} has no valid 'kv_cache'; {FOREIGN}")
        return map(CacheBuffer.from_raw, buffers)

    # -- by address

    def lookup(self, address: int) -> list[Hit]:
        """The tensors at ``address``: those that hold the byte first, then those around it.

        Views overlap, so there may be several; a tensor with padding spans bytes that it does
        not hold (``hit.holds`` is false).  The first call builds an index over the document,
        every further one takes O(log n + hits).  Raises HookError.
        """
        if self._by_address is None:
            self._by_address = SpanIndex(self._spans())
        names = self._by_address.at(address)
        if len(names) == 1:  # nearly always
            return [self._hit(names[0], address)]
        hits = [self._hit(name, address) for name in names]
        return sorted(hits, key=lambda hit: (not hit.holds, hit.tensor.span))

    def _spans(self) -> Iterator[tuple[int, int, str]]:
        """From where to where each tensor reaches, without making an object of each."""
        for name, raw in self.tensors.items():
            ptr, span = (raw.get("ptr"), raw.get("span")) if isinstance(raw, dict) else (None, None)
            if not (is_size(ptr) and is_size(span)):
                tensor = self._tensor(name)  # has no span of its own, or raises HookError
                ptr, span = tensor.ptr, tensor.span
            if ptr:
                yield ptr, ptr + span, name

    def _hit(self, name: str, address: int) -> Hit:
        tensor = self._typed.get(name) or self._tensor(name)
        offset = address - tensor.ptr
        return Hit(tensor, offset, *tensor.element_at(offset))

    def occupied(self) -> Iterator[tuple[int, int]]:
        """From where to where each tensor, region and buffer of the KV cache reaches, in no order.

        Raises HookError.
        """
        yield from ((start, end) for start, end, _ in self._spans())
        yield from ((region.ptr, region.end) for region in self.iter_regions())
        yield from ((buffer.ptr, buffer.end) for buffer in self.iter_kv_cache())

    def region_at(self, address: int) -> Optional[Region]:
        """The region that covers ``address``, if any.  Raises HookError."""
        if self._regions_by_address is None:
            self._regions_by_address = SpanIndex(
                (region.ptr, region.end, region) for region in self.iter_regions()
            )
        return next(iter(self._regions_by_address.at(address)), None)

    def changes_since(self, old: Union[Document, Mapping[str, Any]]) -> Diff:
        """What changed since ``old`` (a Document, or a saved layout) of this slot."""
        return compare(old._current() if isinstance(old, Document) else old, self._current())

    def _current(self) -> dict[str, Any]:
        """The layout with the state's counts, which are the newer ones after buckets."""
        names = ("content_generation", "physical_epoch")
        return {**self.raw, **{name: self.state[name] for name in names if name in self.state}}

    def owner_alive(self) -> bool:
        """Whether the process that published this document lives, with the same runner.

        More than `Slot.owner_alive`, which may speak of a successor that came after the document
        was read, in another process or the same.  False for a saved copy.  Raises HookError.
        """
        if not self.is_live or not self.slot.owner_alive():
            return False
        # In this order: who owns the slot has removed its predecessor's documents before.
        state = self.slot.state_if_any()
        return (
            state is not None
            and process_of(state) == process_of(self.state)
            and same_instance(state, self.state)
        )

    def _tensor(self, name: str) -> Tensor:
        tensor = self._typed.get(name)
        if tensor is None:
            tensor = self._typed[name] = Tensor.from_raw(name, self.tensors[name])
        return tensor

    def _where(self) -> str:
        return self.slot.path(files.LAYOUT)

    def __repr__(self) -> str:
        return (
            f"<Document slot={self.slot.name!r} state={self.state['state']!r} "
            f"layout={self.layout_generation} content={self.content_generation}>"
        )
