"""Cutting tensors of any strides into pieces, fetching them, and putting the values in order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_weight_hook.memory import boxes
from sglang_weight_hook.reader import Tensor

torch = pytest.importorskip("torch")

DTYPES = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


@st.composite
def strided(draw: st.DrawFn) -> Any:
    """A torch tensor with strides of any kind: padded, permuted, expanded, overlapping."""
    itemsize = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    kind = draw(st.sampled_from(["any", "sliced"]))
    if kind == "any":
        stride = [draw(st.integers(0, 40)) for _ in shape]
        reach = sum((n - 1) * step for n, step in zip(shape, stride) if n) + 1
        base = torch.arange(max(reach, 1) + 5).to(getattr(torch, DTYPES[itemsize]))
        return base.as_strided(shape, stride, draw(st.integers(0, 4)))
    outer = [n + draw(st.integers(0, 3)) for n in shape]
    count = 1
    for n in outer:
        count *= n
    found = torch.arange(count).to(getattr(torch, DTYPES[itemsize])).view(outer)
    for k, n in enumerate(shape):
        found = found.narrow(k, 0, n)
    return found.permute(draw(st.permutations(range(len(shape)))))


def described(tensor: Any) -> Tensor:
    return Tensor.from_raw(
        "t",
        {
            "ptr": tensor.data_ptr(),
            "size": tensor.numel() * tensor.element_size(),
            "device": "cpu",
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "kind": "attribute",
        },
    )


def values_of(tensor: Any, limit: int, gather: Any = boxes.gather) -> bytes:
    """By way of boxes, out of this process's own memory."""
    import ctypes

    meta = described(tensor)
    result = b""
    for box in boxes.boxes(meta, limit):
        assert box.size <= max(limit, meta.itemsize)
        fetch = boxes.plan(box)
        for start, length in fetch.runs:  # nothing beyond what the tensor touches
            assert start >= 0
            assert start + length <= meta.span
        fetched = bytearray(
            b"".join(ctypes.string_at(meta.ptr + start, length) for start, length in fetch.runs)
        )
        assert len(fetched) == fetch.size
        if fetch.is_in_order:
            result += fetched
            continue
        target = bytearray(box.size)
        gather(box, fetch, memoryview(fetched), memoryview(target))
        result += target
    return result


def truth(tensor: Any) -> bytes:
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""


@settings(max_examples=400, deadline=None)
@given(tensor=strided(), limit=st.integers(1, 400))
def test_values_come_in_row_major_order_whatever_the_strides(tensor: Any, limit: int) -> None:
    assert values_of(tensor, limit) == truth(tensor)


@settings(max_examples=100, deadline=None)
@given(tensor=strided(), limit=st.integers(1, 400))
def test_so_they_do_without_numpy(tensor: Any, limit: int) -> None:
    assert values_of(tensor, limit, boxes._gather_slowly) == truth(tensor)


def test_a_large_transposed_matrix_is_fetched_along_its_columns_once() -> None:
    tensor = torch.zeros(3000, 2000, dtype=torch.uint8).t()
    fetched = sum(boxes.plan(box).size for box in boxes.boxes(described(tensor), 1 << 20))
    assert fetched == tensor.numel()
    assert all(len(boxes.plan(box).runs) <= 3000 for box in boxes.boxes(described(tensor), 1 << 20))


def test_scattered_elements_make_small_boxes() -> None:
    """A run an element, so that their number, not the bytes, bounds the memory."""
    tensor = torch.zeros(100_000, 50, dtype=torch.int16)[:, 7]
    pieces = list(boxes.boxes(described(tensor), 8 << 20))
    assert max(len(boxes.plan(box).runs) for box in pieces) <= 16384
    assert sum(box.size for box in pieces) == 200_000
