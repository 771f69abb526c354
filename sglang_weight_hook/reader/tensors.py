"""Tensors, regions and cache buffers of a document as small typed objects."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple, Optional

from ..layout.geometry import touched_bytes
from .errors import HookError
from .fields import Fields, is_size
from .indices import Undecided, index_at
from .names import layer_of, role_of


class Tensor(NamedTuple):
    """One tensor of a document.  Addresses and sizes in bytes, all else in elements."""

    name: str  # the canonical one
    ptr: int  # address of the first element; 0 where it has no memory (``meta``)
    size: int  # what the values take: number of elements * bytes of one
    span: int  # from the first byte touched to one past the last: read or register this
    device: str  # ``cuda:0``, ``cpu``, ...
    dtype: str  # ``torch.bfloat16``, ...
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    storage_ptr: int
    storage_size: int
    kind: str  # ``parameter``, ``buffer``, ``attribute`` or ``lora``
    resident: bool  # whether it lies on the runner's own device
    aliases: tuple[str, ...]  # its other names
    checksum: Optional[str]  # only with SGLANG_WEIGHT_HOOK_CHECKSUM=1
    raw: Mapping[str, Any]  # as published
    # Whether SGLang rewrites it on the forward path: its values count for no content generation.
    volatile: bool = False

    @classmethod
    def from_raw(cls, name: str, raw: Any) -> Tensor:
        """From an entry of the layout's ``tensors``.  Raises HookError where it is none.

        >>> half = Tensor.from_raw("model.layers.17.self_attn.w_kc", {
        ...     "ptr": 4096, "size": 24, "device": "cuda:0", "dtype": "torch.bfloat16",
        ...     "shape": [3, 4], "stride": [8, 1], "kind": "attribute"})
        >>> half.layer, half.role, half.itemsize
        (17, 'attention', 2)
        >>> half.span, hex(half.end)   # rows lie 16 bytes apart, so it reaches beyond 24
        (40, '0x1028')
        >>> half.index_of(4096 + 16 + 3)   # byte 1 of an element
        (1, 1)
        >>> half.index_of(4096 + 8) is None   # between two rows
        True
        """
        fields = Fields(f"tensor {name!r}", raw)
        ptr, size = fields.number("ptr"), fields.number("size")
        shape, stride = fields.numbers("shape"), fields.numbers("stride")
        if len(shape) != len(stride):
            raise fields.improper("stride")
        if "span" in raw:
            span = fields.number("span")
        else:
            span = touched_bytes(shape, stride, _itemsize(shape, size))
            if not is_size(span):
                raise fields.improper("span")
        return cls(
            name=name,
            ptr=ptr,
            size=size,
            span=span,
            device=fields.text("device"),
            dtype=fields.text("dtype"),
            shape=shape,
            stride=stride,
            storage_offset=fields.number("storage_offset", 0),
            storage_ptr=fields.number("storage_ptr", ptr),
            storage_size=fields.number("storage_size", size),
            kind=fields.text("kind"),
            resident=raw.get("resident", True) is True,
            aliases=fields.texts("aliases"),
            checksum=fields.text("checksum") if raw.get("checksum") is not None else None,
            raw=raw,
            volatile=raw.get("volatile") is True,
        )

    @property
    def end(self) -> int:
        """Address one past the last byte touched."""
        return self.ptr + self.span

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 for a tensor without elements."""
        return _itemsize(self.shape, self.size)

    @property
    def layer(self) -> Optional[int]:
        """Number of the layer, from the name; None for a tensor of no layer."""
        return layer_of(self.name)

    @property
    def role(self) -> str:
        """What it is for, from the name: one of `ROLES`."""
        return "lora" if self.kind == "lora" else role_of(self.name)

    def index_of(self, address: int) -> Optional[tuple[int, ...]]:
        """Index of the element that holds the byte at ``address``; None between elements.

        Where elements overlap (stride 0) it is one of those that hold it.  Raises HookError where
        that cannot be told: see `element_at`.
        """
        if not self.ptr <= address < self.end:
            return None
        index, _, is_unknown = self.element_at(address - self.ptr)
        if is_unknown:
            raise HookError(
                f"which element of tensor {self.name!r} lies at {address:#x} cannot be told: its "
                f"dimensions overlap in too many ways, or its shape and its size contradict each "
                f"other; look the address up in the tensor that it is a view of"
            )
        return index

    def element_at(self, offset: int) -> tuple[Optional[tuple[int, ...]], Optional[int], bool]:
        """Index of the element that holds the byte at ``offset``, which byte of it, or unknown.

        ``offset``: bytes from the first element's address, below ``span``.  Two None and False
        between elements.  Two None and True where it is unknown whether an element holds it: many
        dimensions overlap in no regular way, or shape and size contradict each other.
        """
        itemsize = _itemsize(self.shape, self.size)
        if not itemsize:
            return None, None, True
        number, byte = divmod(offset, itemsize)
        try:
            index = index_at(self.shape, self.stride, number)
        except Undecided:
            return None, None, True
        return index, None if index is None else byte, False


class Region(NamedTuple):
    """A run of weight bytes inside one allocation, ready to be registered.  In bytes."""

    ptr: int
    size: int
    device: str
    allocation_ptr: int
    allocation_size: int
    allocation_source: str  # ``driver``, or ``storage`` where only the tensor's own is known
    allocation_kind: Optional[str]  # ``cuda_malloc``, ``vmm``, ``imported``; None: not told
    tensors: tuple[str, ...]  # canonical names
    raw: Mapping[str, Any]
    # What another process can open the allocation with: ``legacy_ipc``, ``posix_fd``, ``fabric``
    # or ``none``.  None: not told.
    export: Optional[str] = None
    rdma_capable: Optional[bool] = None  # whether it can be registered for RDMA; None: not told

    @classmethod
    def from_raw(cls, raw: Any) -> Region:
        """From an entry of the layout's ``regions``.  Raises HookError where it is none."""
        fields = Fields("a region", raw)
        ptr, size = fields.number("ptr"), fields.number("size")
        kind, rdma_capable = raw.get("allocation_kind"), raw.get("rdma_capable")
        return cls(
            ptr=ptr,
            size=size,
            device=fields.text("device"),
            allocation_ptr=fields.number("allocation_ptr", ptr),
            allocation_size=fields.number("allocation_size", size),
            allocation_source=fields.text("allocation_source", "storage"),
            allocation_kind=None if kind is None else fields.text("allocation_kind"),
            tensors=fields.texts("tensors"),
            raw=raw,
            export=None if raw.get("export") is None else fields.text("export"),
            rdma_capable=rdma_capable if isinstance(rdma_capable, bool) else None,
        )

    @property
    def end(self) -> int:
        return self.ptr + self.size


class CacheBuffer(NamedTuple):
    """One tensor of the KV cache.  Addresses and sizes in bytes."""

    name: str
    ptr: int
    size: int
    device: str
    dtype: str
    shape: tuple[int, ...]
    layer: Optional[int]
    role: Optional[str]  # ``k``, ``v`` or ``kv``
    storage_ptr: int
    storage_size: int
    raw: Mapping[str, Any]

    @classmethod
    def from_raw(cls, raw: Any) -> CacheBuffer:
        """From an entry of ``memory.kv_cache``.  Raises HookError where it is none."""
        fields = Fields("a KV cache buffer", raw)
        ptr, size = fields.number("ptr"), fields.number("size")
        return cls(
            name=fields.text("name", ""),
            ptr=ptr,
            size=size,
            device=fields.text("device"),
            dtype=fields.text("dtype", ""),
            shape=fields.numbers("shape"),
            layer=None if raw.get("layer") is None else fields.number("layer"),
            role=None if raw.get("role") is None else fields.text("role"),
            storage_ptr=fields.number("storage_ptr", ptr),
            storage_size=fields.number("storage_size", size),
            raw=raw,
        )

    @property
    def end(self) -> int:
        return self.ptr + self.size


class Hit(NamedTuple):
    """A tensor at an address."""

    tensor: Tensor
    offset: int  # bytes from the tensor's first byte
    element: Optional[tuple[int, ...]]  # its index; None between elements (padding), or unknown
    byte: Optional[int]  # which byte of that element
    is_unknown: bool = False  # whether it could not be told which element, if any, holds the byte

    @property
    def holds(self) -> Optional[bool]:
        """Whether the byte belongs to one of the tensor's elements; None: unknown."""
        return None if self.is_unknown else self.element is not None


def _itemsize(shape: tuple[int, ...], size: int) -> int:
    count = prod(shape)
    # Larger than its bytes is no tensor.
    return size // count if 0 < count <= size and size % count == 0 else 0
