"""Looking up an address: the tensor, the element and the region it lies in.

The documents are published by the real recorder over a real torch model, unless a test is about
spans that no recorder makes.
"""

from __future__ import annotations

import time
from typing import Any

from fake_sglang import FakeRunner
from hypothesis import given
from hypothesis import strategies as st

from sglang_weight_hook.reader import (
    Document,
    Slot,
    SpanIndex,
    Tensor,
)


def test_every_element_of_every_tensor_is_found_at_its_address(
    runner: FakeRunner, document: Document
) -> None:
    parameter = runner.model.layers[1].mlp.weight
    for i in range(6):
        for j in range(6):
            address = parameter[i, j].data_ptr() + 3
            (hit,) = document.lookup(address)
            assert hit.tensor.name == "layers.1.mlp.weight"
            assert (hit.element, hit.byte) == ((i, j), 3)
            assert hit.offset == address - parameter.data_ptr()


def test_the_view_that_holds_the_byte_comes_before_one_that_only_spans_it(
    runner: FakeRunner, document: Document
) -> None:
    attention = runner.model.layers[0].self_attn
    hits = document.lookup(attention.w_vc[1, 2, 0].data_ptr())
    names = [hit.tensor.name.rpartition("self_attn.")[2] for hit in hits if hit.holds]
    assert set(names) == {"kv_b_proj.weight", "w_vc"}
    by_name = {hit.tensor.name.rpartition(".")[2]: hit for hit in hits}
    assert by_name["w_vc"].element == (1, 2, 0)
    between = document.lookup(attention.w_vc[0, 0, 0].data_ptr())
    assert [hit.holds for hit in between] == [True, True, False]
    assert between[-1].tensor.name.endswith("w_kc")
    assert between[-1].element is None


def test_nothing_lies_where_nothing_is(document: Document) -> None:
    for address in (0, 1, 2**64 - 1, -1):
        assert document.lookup(address) == []
        assert document.region_at(address) is None


def test_the_region_of_an_address_names_the_tensor_there(document: Document) -> None:
    tensor = document.tensor("layers.0.mlp.weight")
    region = document.region_at(tensor.end - 1)
    assert region is not None
    assert tensor.name in region.tensors


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=40),
    st.integers(-2, 62),
)
def test_the_index_finds_the_spans_that_brute_force_finds(
    spans: list[tuple[int, int]], address: int
) -> None:
    triples = [(start, start + length, number) for number, (start, length) in enumerate(spans)]
    found = SpanIndex(triples).at(address)
    assert sorted(found) == [n for start, end, n in triples if start <= address < end]
    assert [spans[n][0] for n in found] == sorted(spans[n][0] for n in found)


def test_a_look_up_costs_its_hits_and_not_the_number_of_spans() -> None:
    """One span around 100,000 others: going back through them all would be found out."""
    count = 100_000
    spans = [(0, 16 * count, -1)] + [(16 * n, 16 * n + 8, n) for n in range(count)]
    index = SpanIndex(spans)
    looked = 0
    later = index._later

    def counting(one: int, other: int) -> int:
        nonlocal looked
        looked += 1
        return later(one, other)

    index._later = counting  # type: ignore[method-assign]
    assert index.at(16 * (count - 1) + 12) == [-1]
    assert index.at(16 * (count - 1)) == [-1, count - 1]
    assert looked < 20


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, stride and itemsize: also expanded, transposed, padded and self-overlapping."""
    dimensions = draw(st.integers(0, 3))
    shape = tuple(draw(st.integers(0, 4)) for _ in range(dimensions))
    stride = tuple(draw(st.integers(0, 9)) for _ in range(dimensions))
    return shape, stride, draw(st.sampled_from([1, 2, 4, 8]))


def elements(shape: tuple[int, ...], stride: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """Every index with its offset in elements."""
    found = {(): 0}
    for length, step in zip(shape, stride):
        found = {(*i, n): at + n * step for i, at in found.items() for n in range(length)}
    return found


@given(st.lists(st.tuples(strided(), st.integers(1, 60)), max_size=6), st.integers(0, 200))
def test_look_up_agrees_with_writing_every_byte_down(
    made: list[tuple[tuple[tuple[int, ...], tuple[int, ...], int], int]], address: int
) -> None:
    tensors: dict[str, Any] = {}
    for number, ((shape, stride, itemsize), ptr) in enumerate(made):
        tensors[str(number)] = {
            "ptr": ptr,
            "size": len(elements(shape, stride)) * itemsize,
            "device": "cuda:0",
            "dtype": "torch.uint8",
            "shape": list(shape),
            "stride": list(stride),
            "kind": "parameter",
        }
    document = Document(Slot("/nowhere", "0"), {"tensors": tensors, "regions": []}, {})
    hits = {hit.tensor.name: hit for hit in document.lookup(address)}
    for number, ((shape, stride, itemsize), ptr) in enumerate(made):
        places = elements(shape, stride)
        holders = {
            index
            for index, at in places.items()
            if ptr + at * itemsize <= address < ptr + (at + 1) * itemsize
        }
        end = ptr + (max(places.values()) + 1) * itemsize if places else ptr
        assert (str(number) in hits) == (ptr <= address < end)
        if str(number) in hits:
            hit = hits[str(number)]
            assert hit.holds == bool(holders)
            if holders:
                assert hit.element in holders
                assert hit.element is not None
                assert hit.byte == (address - ptr) % itemsize
    order = [hit.holds for hit in document.lookup(address)]
    assert order == sorted(order, reverse=True)


def test_an_index_that_trying_would_take_for_ever_to_find_is_proven_not_to_exist() -> None:
    tensor = Tensor.from_raw(
        "w",
        {
            "ptr": 0,
            "size": 2**40,
            "device": "cpu",
            "dtype": "torch.uint8",
            "shape": [2] * 40,
            "stride": [2 * n for n in range(10**6, 10**6 + 40)],
            "kind": "parameter",
        },
    )
    started = time.monotonic()
    assert tensor.index_of(41 * 10**6 + 1) is None
    assert time.monotonic() - started < 2
