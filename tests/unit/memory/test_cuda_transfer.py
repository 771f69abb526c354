"""How runs of device memory become copies: arithmetic alone, without a driver."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_weight_hook.memory.cuda_transfer import Rows, batches, rows_of


def addresses(rows: Iterable[Rows]) -> list[int]:
    """Of every byte that is copied, in order."""
    return [
        each.address + number * each.pitch + byte
        for each in rows
        for number in range(each.height)
        for byte in range(each.width)
    ]


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Runs as tensors have them, some a regular step apart, and some as nobody would ask for."""
    found: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, 4))):
        start, length = draw(st.integers(0, 500)), draw(st.integers(0, 20))
        step = draw(st.integers(-30, 60))
        count = draw(st.integers(1, 7))
        found += [
            (start + number * step, length) for number in range(count) if start + number * step >= 0
        ]
    return found


@settings(max_examples=500, deadline=None)
@given(runs=runs())
def test_rows_are_the_runs_and_never_overlap_themselves(runs: list[tuple[int, int]]) -> None:
    rows = list(rows_of(runs))
    assert addresses(rows) == [start + n for start, length in runs for n in range(length)]
    for each in rows:
        assert each.width > 0
        assert each.pitch >= each.width  # what cuMemcpy2D asks for
        assert each.reach == (each.height - 1) * each.pitch + each.width


def test_a_regular_step_is_one_copy() -> None:
    assert list(rows_of([(n * 64, 16) for n in range(1000)])) == [Rows(0, 16, 1000, 64)]


@settings(max_examples=500, deadline=None)
@given(runs=runs(), limit=st.integers(1, 50))
def test_batches_hold_every_byte_in_order_and_none_is_too_large(
    runs: list[tuple[int, int]], limit: int
) -> None:
    rows = list(rows_of(runs))
    found = list(batches(rows, limit))
    assert addresses(each for batch in found for each in batch) == addresses(rows)
    for batch in found:
        assert 0 < sum(each.size for each in batch) <= limit
        assert all(each.pitch >= each.width for each in batch)
