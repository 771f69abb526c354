"""Driver allocations, asked of a fake driver: ``tests/gpu`` asks the real one."""

from __future__ import annotations

import pytest
from captured_model import capture, parameter

from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import document

torch = pytest.importorskip("torch")
nn = torch.nn


def test_a_region_ends_where_its_driver_allocation_does(
    driver: dict[int, list[tuple[int, int]]],
) -> None:
    model = nn.Module()
    whole = torch.zeros(64, dtype=torch.uint8)
    model.a, model.b = whole[:32], whole[32:]
    base = whole.data_ptr()
    driver[base] = [(base, 48), (base + 48, 16)]
    regions = document.regions_of(capture(model, device="cuda"))
    assert [(r.start - base, r.end - base, r.names) for r in regions] == [
        (0, 48, ["a", "b"]),
        (48, 64, ["b"]),
    ]


def test_allocations_that_the_driver_no_longer_tells_are_remembered(
    driver: dict[int, list[tuple[int, int]]],
) -> None:
    model = nn.Linear(2, 2, bias=False)
    ptr = model.weight.data_ptr()
    driver[ptr] = [(ptr - 64, 4096)]
    before = capture(model, device="cuda")
    driver.clear()
    after = capture_module.known_allocations(before, capture(model, device="cuda"))
    assert after.allocations == before.allocations
    assert document.same_layout(before, after)
    model.weight = parameter(2, 2)
    moved_away = capture_module.known_allocations(before, capture(model, device="cuda"))
    assert moved_away.allocations == {}
