"""Spans and regions against oracles that count every single byte."""

from __future__ import annotations

import doctest
import itertools
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from sglang_weight_hook.layout import geometry
from sglang_weight_hook.layout.geometry import merge, touched_bytes


def consecutive(regions: list[geometry.Region]) -> list[tuple[geometry.Region, geometry.Region]]:
    return list(zip(regions, regions[1:]))  # itertools.pairwise is of Python 3.10


class Strided(NamedTuple):
    shape: list[int]
    stride: list[int]
    itemsize: int


@st.composite
def layouts(draw: st.DrawFn) -> Strided:
    dimensions = draw(st.integers(0, 4))
    shape = draw(st.lists(st.integers(0, 4), min_size=dimensions, max_size=dimensions))
    stride = draw(st.lists(st.integers(0, 30), min_size=dimensions, max_size=dimensions))
    return Strided(shape, stride, draw(st.sampled_from([1, 2, 4, 8])))


@given(layouts())
def test_touched_bytes_ends_behind_the_last_byte_of_the_furthest_element(layout: Strided) -> None:
    elements = [
        sum(index * step for index, step in zip(place, layout.stride))
        for place in itertools.product(*(range(length) for length in layout.shape))
    ]
    expected = (max(elements) + 1) * layout.itemsize if elements else 0
    assert touched_bytes(*layout) == expected


def test_a_scalar_touches_its_own_bytes() -> None:
    assert touched_bytes((), (), 8) == 8


class Span(NamedTuple):
    start: int
    end: int
    allocation: tuple[int, int]
    name: str


@st.composite
def spans(draw: st.DrawFn) -> list[Span]:
    """Spans in allocations that never overlap, but may be directly adjacent."""
    allocations, base = [], 16
    for _ in range(draw(st.integers(1, 4))):
        base += draw(st.sampled_from([0, 0, 3]))
        size = draw(st.integers(1, 40))
        allocations.append((base, size))
        base += size
    found = []
    for number in range(draw(st.integers(0, 12))):
        allocation = draw(st.sampled_from(allocations))
        start = draw(st.integers(allocation[0], sum(allocation)))
        end = draw(st.integers(start, sum(allocation)))
        found.append(Span(start, end, allocation, f"t{number}"))
    return found


@given(spans())
def test_regions_cover_exactly_the_bytes_of_the_spans(given_spans: list[Span]) -> None:
    wanted = {byte for span in given_spans for byte in range(span.start, span.end)}
    covered = [byte for region in merge(given_spans) for byte in range(region.start, region.end)]
    assert sorted(wanted) == sorted(covered)


@given(spans())
def test_regions_are_disjoint_sorted_and_inside_one_allocation(given_spans: list[Span]) -> None:
    regions = merge(given_spans)
    for region in regions:
        base, size = region.allocation
        assert base <= region.start < region.end <= base + size
    for one, following in consecutive(regions):
        assert one.end <= following.start


@given(spans())
def test_regions_that_touch_lie_in_different_allocations(given_spans: list[Span]) -> None:
    for one, following in consecutive(merge(given_spans)):
        assert one.end < following.start or one.allocation != following.allocation


@given(spans())
def test_each_span_with_bytes_is_named_in_the_one_region_that_holds_it(
    given_spans: list[Span],
) -> None:
    regions = merge(given_spans)
    for span in given_spans:
        holders = [region for region in regions if span.name in region.names]
        assert len(holders) == (span.start < span.end)
        for region in holders:
            assert region.start <= span.start
            assert span.end <= region.end
            assert region.names.count(span.name) == 1


@given(spans(), st.randoms())
def test_the_order_of_the_spans_does_not_matter_to_the_regions(
    given_spans: list[Span], random: object
) -> None:
    shuffled = list(given_spans)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    plain = [(r.start, r.end, r.allocation, sorted(r.names)) for r in merge(given_spans)]
    assert [(r.start, r.end, r.allocation, sorted(r.names)) for r in merge(shuffled)] == plain


def test_the_examples_of_the_module_hold() -> None:
    assert doctest.testmod(geometry).failed == 0
