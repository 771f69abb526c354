"""Random models: every address, span, total and region against the live tensors' own.

Models and tensors are real torch's; the runner around them is a fake (`fake_sglang`).
"""

from __future__ import annotations

from typing import Any

import pytest
from captured_model import capture, live_tensors
from fake_sglang import FakeRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_weight_hook.layout.documents import ATTRIBUTE, BUFFER, PARAMETER
from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import document
from sglang_weight_hook.publisher.capture import moved

torch = pytest.importorskip("torch")
nn = torch.nn


@st.composite
def models(draw: st.DrawFn, depth: int = 2) -> Any:
    """Modules with parameters, buffers and attributes, some tied, shared, strided or empty."""
    pool: list[Any] = []

    def tensor() -> Any:
        if len(pool) > 0 and draw(st.booleans()):
            base = draw(st.sampled_from(pool))
            view = draw(st.sampled_from(["same", "data", "t", "slice", "expand"]))
            if view == "same":
                return base
            data = base.detach()
            if view == "t" and data.dim() == 2:
                return data.t()
            if view == "slice" and data.dim():
                return data[: draw(st.integers(0, 2))]
            if view == "expand":
                return data.expand(2, *data.shape)
            return data
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.float64]))
        device = draw(st.sampled_from(["cpu"] * 7 + ["meta"]))
        made = torch.empty(shape, dtype=dtype, device=device)
        pool.append(made)
        return made

    def module(left: int) -> Any:
        made = nn.Module()
        for number in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from([PARAMETER, BUFFER, ATTRIBUTE, "list"]))
            value = tensor()
            if kind == PARAMETER:
                value = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
                pool.append(value)
                made.register_parameter(f"p{number}", value)
            elif isinstance(value, nn.Parameter):
                made.register_parameter(f"q{number}", value)
            elif kind == BUFFER:
                made.register_buffer(f"b{number}", value, persistent=draw(st.booleans()))
            else:
                setattr(made, f"a{number}", value if kind == ATTRIBUTE else [None, value])
        if left:
            for number in range(draw(st.integers(0, 2))):
                made.add_module(f"m{number}", module(left - 1))
        return made

    return module(depth)


def end_of(tensor: Any) -> int:
    """One past the end, from every element's own address."""
    if tensor.numel() == 0:
        return int(tensor.data_ptr())
    places = torch.ones(tensor.shape).nonzero().tolist()
    return max(int(tensor[tuple(place)].data_ptr()) for place in places) + int(
        tensor.element_size()
    )


slow_start = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


@slow_start
@given(models())
def test_every_address_and_span_is_the_live_tensors_own(model: Any) -> None:
    captured = capture(model)
    live = live_tensors(model)
    names = {name: name for name in captured.tensors}
    for canonical, aliases in captured.aliases.items():
        names.update(dict.fromkeys(aliases, canonical))
    assert set(names) == set(live)
    assert captured.left_out == {}
    for name, canonical in names.items():
        tensor, row = live[name], captured.tensors[canonical]
        if tensor.device.type == "meta":
            assert (row.ptr, row.resident) == (0, False)
            continue
        assert row.ptr == tensor.data_ptr()
        assert row.ptr + row.span == end_of(tensor)
        assert row.shape == list(tensor.shape)
        assert row.stride == list(tensor.stride())
        assert row.storage_ptr == tensor.untyped_storage().data_ptr()


@slow_start
@given(models())
def test_totals_count_each_storage_once(model: Any) -> None:
    storages = {}
    for tensor in live_tensors(model).values():
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    totals = document.totals(capture(model)).get("cpu", {"storage_bytes": 0})
    assert totals["storage_bytes"] == sum(storages.values())


@slow_start
@given(models())
def test_every_resident_byte_lies_in_a_region(model: Any) -> None:
    captured = capture(model)
    regions = document.regions_of(captured)
    for name, row in captured.tensors.items():
        holders = [region for region in regions if name in region.names]
        assert len(holders) == (1 if row.resident and row.ptr and row.span else 0)
        for region in holders:
            assert region.start <= row.ptr
            assert row.ptr + row.span <= region.end


@slow_start
@given(models())
def test_an_unchanged_model_has_not_moved(model: Any) -> None:
    runner = FakeRunner(model)
    before = capture_module.capture(runner)
    assert not moved(before, runner)
    assert document.same_layout(before, capture_module.capture(runner))
