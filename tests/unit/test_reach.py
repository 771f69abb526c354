"""Tensors that modules hold deeper than in their attributes are in the map, and what is beyond
the bounds is named.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle
from published_files import eventually, layout_of, log_of

from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import reach, tracked

torch = pytest.importorskip("torch")
nn = torch.nn


def capture(model: Any, **more: Any) -> Any:
    return capture_module.capture(FakeRunner(model, **more))


@pytest.fixture
def own() -> Any:
    """A class that says it is SGLang's: an object of it is looked into."""
    return type("HostStore", (), {"__module__": "sglang.srt.layers.moe.paged_experts.store"})


def test_the_split_halves_that_a_parameter_holds_are_in_the_map() -> None:
    # SGLang 0.5.23, kernels/ops/gemm/bf16_fp32.py: setattr(weight, ..., (key, high, low, flag)).
    model = nn.Linear(4, 4, bias=False)
    high, low = torch.ones(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4, dtype=torch.bfloat16)
    model.weight.cache = (("a", "key"), high, low, 7)
    tensors = capture(model).tensors
    assert {name: row.ptr for name, row in tensors.items() if name != "weight"} == {
        "weight.cache.1": high.data_ptr(),
        "weight.cache.2": low.data_ptr(),
    }


def test_sglangs_own_objects_are_looked_into_and_others_are_not(own: Any) -> None:
    model = nn.Module()
    store, foreign = own(), types.SimpleNamespace(weight=torch.ones(3))
    store.host = {"w13": torch.ones(2), "w2": torch.zeros(2)}
    model.method, model.other = store, foreign
    assert list(capture(model).tensors) == ["method.host.w13", "method.host.w2"]


def test_objects_with_slots_are_looked_into() -> None:
    kind = type(
        "Packed", (), {"__slots__": ("scale",), "__module__": "sglang.srt.layers.quantization.x"}
    )
    model = nn.Module()
    model.packed = kind()
    model.packed.scale = torch.ones(2)
    model.empty = kind()
    assert list(capture(model).tensors) == ["packed.scale"]


def test_a_module_that_is_registered_nowhere_is_found() -> None:
    model = nn.Module()
    model.hidden = [nn.Linear(2, 2)]
    assert list(capture(model).tensors) == ["hidden.0.weight", "hidden.0.bias"]


def test_a_way_back_to_the_models_own_modules_is_not_followed(own: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].method = own()
    model[0].method.layer = model[1]
    model[0].method.itself = model[0].method
    captured = capture(model)
    assert list(captured.tensors) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert captured.aliases == {}


def test_what_is_held_too_deep_is_named() -> None:
    model = nn.Module()
    held: Any = torch.ones(1)
    for _ in range(reach.DEPTH + 2):
        held = [held]
    model.deep = held
    captured = capture(model)
    assert captured.tensors == {}
    assert list(captured.left_out) == ["deep" + ".0" * reach.DEPTH]


def test_what_is_one_of_too_many_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "OBJECTS", 3)
    model = nn.Module()
    model.many = [[torch.ones(1)] for _ in range(5)]
    captured = capture(model)
    assert len(captured.tensors) + len(captured.left_out) == 5
    assert len(captured.tensors) == 2


def test_a_deep_tensor_that_moves_is_seen_by_the_quick_look(own: Any) -> None:
    model = nn.Linear(2, 2)
    model.method = own()
    model.method.host = {"w": torch.ones(2)}
    model.weight.cache = (torch.ones(2),)
    runner = FakeRunner(model)
    before = capture_module.capture(runner)
    assert not capture_module.moved(before, runner)
    model.method.host["w"] = torch.ones(2)
    assert capture_module.moved(before, runner)
    before = capture_module.capture(runner)
    model.weight.cache = (torch.ones(2),)
    assert capture_module.moved(before, runner)


def test_paged_experts_are_volatile_and_their_host_copies_are_listed(own: Any) -> None:
    class PagedExpertsMoEMethod(nn.Module):  # type: ignore[misc, unused-ignore]
        __module__ = "sglang.srt.layers.moe.paged_experts.method"

    model = nn.Module()
    model.experts = nn.Module()
    model.experts.w13_weight = nn.Parameter(torch.ones(2, 3))
    model.experts.router = nn.Parameter(torch.ones(2))
    model.experts.quant_method = PagedExpertsMoEMethod()
    model.experts.quant_method.store = own()
    model.experts.quant_method.store.host = {"w13_weight": torch.ones(8, 3)}
    captured = capture(model)
    assert captured.volatile == {"experts.w13_weight"}
    assert "experts.quant_method.store.host.w13_weight" in captured.tensors


def test_experts_fetched_from_peers_are_volatile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    buffers = types.SimpleNamespace(_tensors={0: {"weight": model.weight.data}})
    manager = types.SimpleNamespace(_weight_manager=types.SimpleNamespace(weight_buffer=buffers))
    package = types.ModuleType("sglang.srt.layers.moe.dwdp")
    package.get_global_dwdp_manager = lambda: manager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert capture(model).volatile == {"weight"}


def test_an_attribute_that_forwards_bind_again_and_again_is_left_out_and_said(
    checking: Any, maps: Any
) -> None:
    checking(0.02)
    model = nn.Linear(2, 2)
    model.workspace = torch.ones(3)
    runner = FakeRunner(model)
    load(runner)
    settle()

    def bind_anew() -> bool:
        model.workspace = model.workspace.clone()
        return "workspace" in layout_of(maps)["validation"]["left_out"]

    eventually(bind_anew)
    assert "workspace" not in layout_of(maps)["tensors"]
    count = len(log_of(maps))
    for _ in range(10):
        bind_anew()
        eventually(lambda: True)
    assert len(log_of(maps)) <= count + 1
    moves = [line for line in log_of(maps) if line["kind"] == "unannounced_change"]
    assert len(moves) <= tracked.RESTLESS + 1


def test_offloaded_storages_count_once_though_they_have_no_address_here() -> None:
    model = nn.Module()
    whole = torch.zeros(4, 4)
    model.a, model.b = nn.Parameter(whole[:2]), nn.Parameter(whole[2:])
    model.other = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    model.absent = nn.Parameter(torch.empty(8, device="meta"))
    captured = capture(model, device="cuda")
    assert [row.ptr for row in captured.tensors.values()] == [0, 0, 0, 0]
    assert sum(captured.off_device.values()) == 64 + 4
