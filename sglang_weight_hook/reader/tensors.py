"""Tensors, regions and cache buffers of a document as small typed objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, Optional

from ..layout.geometry import touched_bytes
from .fields import Fields
from .names import layer_of, role_of

# How many ways to divide an offset among overlapping dimensions are tried.  Tensors as torch
# makes them need one for each dimension.
_INDEX_TRIES = 10_000


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
        itemsize = _itemsize(shape, size)
        return cls(
            name=name,
            ptr=ptr,
            size=size,
            span=fields.number("span", touched_bytes(shape, stride, itemsize)),
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

        Where elements overlap (stride 0) it is one of those that hold it.
        """
        if not self.ptr <= address < self.end:
            return None
        return self.element_at(address - self.ptr)[0]

    def element_at(self, offset: int) -> tuple[Optional[tuple[int, ...]], Optional[int]]:
        """Index of the element that holds the byte at ``offset``, and which byte of it.

        ``offset``: bytes from the first element's address, below ``span``.  Two None between
        elements.
        """
        itemsize = _itemsize(self.shape, self.size)
        if not itemsize:
            return None, None
        number, byte = divmod(offset, itemsize)
        index = _index(self.shape, self.stride, number)
        return index, None if index is None else byte


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
    element: Optional[tuple[int, ...]]  # its index; None between elements (padding)
    byte: Optional[int]  # which byte of that element

    @property
    def holds(self) -> bool:
        """Whether the byte belongs to one of the tensor's elements."""
        return self.element is not None


def _itemsize(shape: tuple[int, ...], size: int) -> int:
    count = prod(shape)
    # Larger than its bytes is no tensor.
    return size // count if 0 < count <= size and size % count == 0 else 0


def _index(
    shape: tuple[int, ...], stride: tuple[int, ...], element: int
) -> Optional[tuple[int, ...]]:
    """An index with ``sum(index * stride) == element``, if there is one.

    The widest stride goes first.  Where dimensions do not overlap at most one number fits
    each; where they do (as_strided, unfold) the others are tried one by one.
    """
    plain = []  # dimensions from the widest to the narrowest, as nearly all tensors have them
    left = element
    for length, step in zip(shape, stride):
        steps, left = divmod(left, step) if step else (0, left)
        if steps >= length:
            break
        plain.append(steps)
    else:
        if not left:
            return tuple(plain)
    dimensions = sorted(
        (k for k in range(len(shape)) if stride[k] and shape[k] > 1), key=lambda k: -stride[k]
    )
    # reach[n]: how far the dimensions from the n-th on get.
    reach = [0]
    for k in reversed(dimensions):
        reach.append(reach[-1] + (shape[k] - 1) * stride[k])
    reach.reverse()
    index = [0] * len(shape)
    # Per dimension decided: the numbers still to try, and what is left of the offset before it.
    choices: list[tuple[Iterator[int], int]] = []
    left = element
    for _ in range(_INDEX_TRIES):
        depth = len(choices)
        if depth == len(dimensions):
            if left == 0:
                return tuple(index)
        else:
            step, length = stride[dimensions[depth]], shape[dimensions[depth]]
            least = max(0, -((reach[depth + 1] - left) // step))
            most = min(length - 1, left // step)
            choices.append((iter(range(most, least - 1, -1)), left))
        while choices:
            numbers, before = choices[-1]
            number = next(numbers, None)
            if number is not None:
                k = dimensions[len(choices) - 1]
                index[k] = number
                left = before - number * stride[k]
                break
            choices.pop()
        else:
            return None
    return None
