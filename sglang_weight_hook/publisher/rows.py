"""What is noted of one tensor, and which driver allocations lie under it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from ..layout.geometry import touched_bytes
from . import devices


class Row(NamedTuple):
    """One tensor under its canonical name.  Addresses and sizes in bytes, strides in elements."""

    kind: str
    ptr: int
    size: int  # numel * itemsize: what the values take
    span: int  # from the first to behind the last byte touched: what a reader must cover
    device: str
    dtype: str
    shape: list[int]
    stride: list[int]
    storage_offset: int
    storage_ptr: int
    storage_size: int
    resident: bool


class _Texts(dict[Any, str]):
    """``str`` of devices, dtypes and layouts: few objects, and torch builds each text anew."""

    def __missing__(self, value: Any) -> str:
        text = self[value] = str(value)
        return text


_text = _Texts()


def row_of(kind: str, tensor: Any, device_type: str) -> Row:
    if _text[tensor.layout] != "torch.strided":
        raise TypeError(f"layout {tensor.layout} has no strides")
    device, dtype = _text[tensor.device], _text[tensor.dtype]
    shape, stride, size = list(tensor.shape), list(tensor.stride()), tensor.nbytes
    if device == "meta":
        return Row(kind, 0, size, size, device, dtype, shape, stride, 0, 0, 0, False)
    contiguous = tensor.is_contiguous()
    storage = tensor.untyped_storage()
    resident = device == device_type or device.partition(":")[0] == device_type
    # In the order of Row's fields: naming each would cost more than reading it.
    return Row._make(
        (
            kind,
            # The address of an offloaded weight is one of the host's, and must not be taken
            # for one of the device's.
            tensor.data_ptr() if resident else 0,
            size,
            size if contiguous else touched_bytes(shape, stride, tensor.element_size()),
            device,
            dtype,
            shape,
            stride,
            tensor.storage_offset(),
            storage.data_ptr() if resident else 0,
            storage.nbytes(),
            resident,
        )
    )


class Allocations(NamedTuple):
    """The driver allocations that storages lie in."""

    # (storage_ptr, storage_size) -> the allocations (base, size) under it.  One as a rule; several
    # where the caching allocator maps expandable segments piece by piece.
    under: dict[tuple[int, int], list[tuple[int, int]]]
    kinds: dict[int, str]  # base -> how it came to be, where that is known
    exports: dict[int, devices.Export]  # base -> how others can open it, where the kind is known


def allocations_of(rows: Collection[Row]) -> Allocations:
    """What the devices' drivers say of each storage; nothing where there is none to ask."""
    found = Allocations({}, {}, {})
    places = {place: devices.of(place) for place in {row.device for row in rows}}
    asked = {place: device for place, device in places.items() if device.is_in_use()}
    if not asked:
        return found
    for row in rows:
        storage, device = (row.storage_ptr, row.storage_size), asked.get(row.device)
        if device is None or not row.storage_ptr or storage in found.under:
            continue
        under = device.allocations_under(*storage)
        if not under:
            continue
        found.under[storage] = under
        for base, _ in under:
            kind = None if base in found.kinds else device.allocation_kind(base)
            if kind is not None:
                found.kinds[base] = kind
                found.exports[base] = device.export_of(base, kind)
    return found
