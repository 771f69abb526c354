"""What is noted of one tensor, and which driver allocations lie under it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..layout.geometry import touched_bytes
from . import cuda_driver


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


def allocations_of(rows: Iterable[Row]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The driver allocations under each storage; empty where there is no CUDA."""
    if not cuda_driver.is_initialised():
        return {}
    allocations: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row in rows:
        storage = (row.storage_ptr, row.storage_size)
        if row.storage_ptr and storage not in allocations and row.device.startswith("cuda"):
            found = cuda_driver.allocations_under(*storage)
            if found:
                allocations[storage] = found
    return allocations


def allocation_kinds(allocations: dict[tuple[int, int], list[tuple[int, int]]]) -> dict[int, str]:
    kinds: dict[int, str] = {}
    for pieces in allocations.values():
        for base, _ in pieces:
            kind = kinds.get(base) or cuda_driver.allocation_kind(base)
            if kind is not None:
                kinds[base] = kind
    return kinds
